"""The devices that a run can be planned for.

Rates of GPUs are the makers' peaks of dense products and of memory. A plan takes MATMUL_SHARE and
BANDWIDTH_SHARE of them, which large matmuls and copies reach. A device `cpu` is one core.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from renee_ray.errors import ConfigError
from renee_ray.machine import limit_bytes
from renee_ray.xfc.device import native_bf16

GIB = 2**30
MATMUL_SHARE, BANDWIDTH_SHARE = 0.6, 0.8


@dataclass(frozen=True)
class Device:
    """A device of a worker.

    memory: bytes; of `cpu`: those of this machine or its container, for all workers on it.
    narrow, wide: FLOPS of products in bf16 or fp16, and in fp32; bandwidth: bytes/s of memory.
    network: bytes/s that the device sends to others of the run, an assumption.
    framework: bytes of a process, of which nothing is the model's.
    bf16: whether bf16 products are native; on a GPU Triton's kernels then run too (sm_80 on).
    """

    name: str
    kind: str
    memory: int
    narrow: float
    wide: float
    bandwidth: float
    network: float
    framework: int
    bf16: bool = True

    @property
    def fp16(self) -> bool:
        return self.kind == "cuda"


def _gpu(
    name: str, gib: float, narrow: float, wide: float, memory: float, network: float = 50,
    new: bool = True,
) -> Device:  # fmt: skip
    """A GPU, in TFLOPS and GB/s. Context and libraries take an estimated 0.8 GiB."""
    return Device(
        name, "cuda", int(gib * GIB), narrow * 1e12, wide * 1e12, memory * 1e9, network * 1e9,
        int(0.8 * GIB), new,
    )  # fmt: skip


GPUS = {
    each.name: each
    for each in (
        _gpu("t4", 14.7, 65, 8.1, 320, 10, new=False),
        _gpu("v100", 31.7, 125, 15.7, 900, new=False),
        _gpu("a100", 79.2, 312, 19.5, 2039),
        _gpu("a10g", 22.0, 70, 31, 600, 10),
        _gpu("a6000", 47.5, 155, 38.7, 768, 10),
        _gpu("l4", 22.0, 121, 30.3, 300, 10),
        _gpu("h100", 79.2, 989, 67, 3350),
        _gpu("h200", 139.8, 989, 67, 4800),
    )
}
NAMES = (*GPUS, "cpu")
CPU_FRAMEWORK = int(0.82 * GIB)
"""What a worker on a CPU takes with next to no model (`empty` of tests/plan/measure.py)."""


def find_device(name: str, use_gpu: str = "auto", num_workers: int = 1) -> Device:
    """Returns the device of that name; of `auto`: that of a run on this machine.

    use_gpu, num_workers: of the run, which has GPUs if it may and each worker gets one.

    Raises:
        ConfigError: the plan has no rates of the GPU.
    """
    if name != "auto":
        return _cpu() if name == "cpu" else GPUS[name]
    found = local_device(use_gpu != "no" and usable_gpus() >= num_workers)
    if found.name not in NAMES:
        raise ConfigError(
            f"the plan has no rates of a {found.name}; give --device, one of {', '.join(NAMES)}"
        )
    return found


def usable_gpus() -> int:
    """Returns the number of this machine's GPUs, 0 where torch cannot use their driver."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def local_device(on_gpu: bool) -> Device:
    """Returns this machine's GPU, with the memory that it says it has, or its CPU.

    The rates of a GPU that is not known are an A100's.
    """
    if not on_gpu:
        return _cpu()
    seen, device = torch.cuda.get_device_properties(0), torch.device("cuda")
    words = seen.name.lower().replace("-", " ").split()
    known = next((GPUS[each] for each in words if each in GPUS), None)
    if known is None:
        known = replace(GPUS["a100"], name=seen.name, bf16=native_bf16(device))
    return replace(known, memory=seen.total_memory)


def cluster_device(nodes: Sequence[Mapping[str, float]], on_gpu: bool) -> Device | None:
    """Returns the device of a cluster's workers, as Ray's resources of its nodes describe it.

    That is the largest GPU or, without, a CPU with the memory that all nodes had when they joined.
    None: the plan does not know the GPUs.
    """
    if not on_gpu:
        memory = sum(n.get("memory", 0) + n.get("object_store_memory", 0) for n in nodes)
        return replace(_cpu(), memory=int(memory), bf16=True)  # if any CPU has it, `auto` may too
    kinds = [key.lower() for node in nodes for key in node]
    known = [gpu for name, gpu in GPUS.items() if f"accelerator_type:{name}" in kinds]
    return max(known, key=lambda gpu: gpu.memory, default=None)


def _cpu() -> Device:
    bf16 = native_bf16(torch.device("cpu"))
    narrow = 300e9 if bf16 else 150e9
    return Device("cpu", "cpu", limit_bytes(), narrow, 150e9, 10e9, 1e9, CPU_FRAMEWORK, bf16)


def cores() -> int:
    """Returns the cores that this process may use."""
    return len(os.sched_getaffinity(0))
