"""Facts about a device: the dtype of its matmuls, the storage that suits it, its memory.

    storage      multiplies in, where the device does so in hardware     elsewhere
    fp32         fp32                                                    -
    bf16_split   bf16                                                    fp32, of the exact weights
    bf16_sr      bf16                                                    fp32
    fp16         fp16                                                    fp32, of the master weights
    fp8_sr       bf16; the logits e4m3, on a GPU that has it             fp32

Elsewhere a chunk is expanded to fp32 in a buffer before it is multiplied. A CPU without bf16
instructions emulates bf16 products, ten times slower than fp32 ones on AVX2.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from renee_ray.machine import available_bytes

GPU_CHUNK_BYTES = 256 << 20
"""Memory of a GPU that the buffers of one chunk may take.

Chunks that fit L2 would spare up to half of the bytes, but be bound by launches: half of an H100's
L2 holds a chunk of 30 us (D = 768, B = 256), and the host takes some 100 us for its five launches.
"""
CPU_CHUNK_BYTES = 24 << 20
"""The most on a CPU: larger chunks are no faster, and a cloud host may report all of its L3."""
DEFAULT_CACHE_BYTES = 2 << 20
"""Cache of a core where the operating system does not say."""


def current(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the one that Triton launches on, which looks at no tensor for it."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def native_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported()) or bool(torch.cpu._is_amx_tile_supported())


def native_e4m3(device: torch.device) -> bool:
    """Whether the device multiplies e4m3 matrices in hardware: NVIDIA's from Ada on."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)


def native(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device multiplies matrices of `dtype` (fp32, bf16 or fp16) in hardware."""
    if dtype == torch.bfloat16:
        return native_bf16(device)
    return dtype == torch.float32 or device.type == "cuda"


def native_narrow(device: torch.device) -> tuple[bool, bool]:
    """Returns whether the device multiplies bf16, and fp16, in hardware."""
    return native_bf16(device), native(torch.float16, device)


def choose_precision(precision: str, bf16: bool, fp16: bool) -> str:
    """Returns `precision`, or for `auto` what suits a device that multiplies these or does not.

    Without narrow products a narrower storage saves memory but not time, so fp32 stands.
    """
    if precision != "auto":
        return precision
    return "bf16_sr" if bf16 else "fp16" if fp16 else "fp32"


def upload(host: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor of host memory to `device`.

    To a GPU it travels from pinned memory, in the order of the stream. From other memory the host
    would wait until the GPU has done all that was asked of it before.
    """
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def free_memory(device: torch.device) -> int:
    """Returns the bytes that are free on a GPU, or on the machine or in its container."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()


def chunk_bytes(device_type: str) -> int:
    """Returns the bytes that the buffers of one chunk of labels may take together.

    On a CPU it is half of a core's cache, so that the embeddings and dE stay there too.
    """
    if device_type == "cuda":
        return GPU_CHUNK_BYTES
    return min(_cache_bytes() // 2, CPU_CHUNK_BYTES)


@functools.cache
def _cache_bytes() -> int:
    """Returns the largest of a core's shares of the caches, as Linux reports them."""
    shares = [DEFAULT_CACHE_BYTES]
    for cache in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            size = int((cache / "size").read_text().strip().removesuffix("K")) << 10
            sharing = (cache / "shared_cpu_map").read_text().replace(",", "")
        except (OSError, ValueError):  # a machine that says nothing of this cache
            continue
        shares.append(size // max(1, int(sharing, 16).bit_count()))
    return max(shares)
