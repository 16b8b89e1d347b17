"""Which operations a chunk of labels is computed with, by device and storage.

CPU, weights in memory as fp32    plain torch: BLAS accumulates the gradient into them
CPU, other weights                plain torch and the compiled update of `cpu_update`
GPU where Triton runs             the kernels of `gpu`, unless matmuls are fp32, where cuBLAS wins
elsewhere                         plain torch
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from renee_ray.xfc.device import native_e4m3
from renee_ray.xfc.kernels.plain import Update, residual
from renee_ray.xfc.weights.buffers import E4M3
from renee_ray.xfc.weights.gpu_trial import has_kernels
from renee_ray.xfc.weights.storages import Weights


@dataclass(frozen=True)
class Operations:
    """How a chunk is computed: `residual` and `update`, as `plain.residual` and `plain.Update`.

    padding: the rows of G are padded to a multiple of it.
    scaled: whether logits come from e4m3 numbers, whose scales `residual` then takes as well.
    """

    residual: Callable[..., Tensor]
    update: type[Update]
    padding: int = 1
    scaled: bool = False

    def padded(self, batch: int) -> int:
        """Returns how many numbers a row of G takes in memory for a batch, at least 1."""
        return -(-max(batch, 1) // self.padding) * self.padding


def choose_operations(weights: Weights) -> Operations:
    """Returns the fastest operations on these weights that run on their device."""
    if weights.device.type == "cpu":
        if not weights.weight.aliased:
            from renee_ray.xfc.kernels import cpu_update  # numba takes a second to import

            cpu_update.compile_for(weights)
            return Operations(residual, cpu_update.FusedUpdate)
    elif weights.compute_dtype != torch.float32 and has_kernels(weights.device):
        from renee_ray.xfc.kernels import gpu  # triton is not on every machine

        narrow = isinstance(weights.weight, E4M3) and weights.compute_dtype == torch.bfloat16
        scaled = narrow and native_e4m3(weights.device)
        return Operations(gpu.residual, gpu.FusedUpdate, gpu.PADDING, scaled)
    return Operations(residual, Update)
