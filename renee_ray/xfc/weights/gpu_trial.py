"""Whether Triton kernels run on a device, which only a trial tells."""

from __future__ import annotations

import functools
import logging

import torch

log = logging.getLogger(__name__)


@functools.cache
def has_kernels(device: torch.device) -> bool:
    """Whether the device is a GPU on which a Triton kernel was compiled and ran."""
    if device.type != "cuda":
        return False
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        log.warning("Triton does not support this GPU: the classifier takes a slower path")
        return False
    try:
        from renee_ray.xfc.weights import gpu_rows  # triton is not on every machine

        gpu_rows.try_out(device)
    except Exception as error:  # a missing package, compiler or header, or a driver too old
        log.warning(
            "Triton's kernels do not run here, so the classifier takes a slower path on the GPU: "
            "%s: %s", type(error).__name__, error,
        )  # fmt: skip
        return False
    return True
