"""How a GPU reads and writes the numbers of each storage: functions of Triton kernels.

They read and write weights as integers, which needs no fp8 instructions. `buffer` is what
`stored` gives; `start` (64-bit) is where a tile begins in it, and `at` (32-bit) the places of the
tile's numbers from there. Import this module only to use it: it needs triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from renee_ray.xfc.device import current
from renee_ray.xfc.weights.rounding import (
    BF16_DROPPED,
    E4M3_DROPPED,
    E4M3_MAX,
    FACTORS,
    PERIOD,
    STRIDE,
    Noise,
)

INTEGERS = {torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.uint8}
EXPANDED = 4096
"""Codes that one program expands."""

_PERIOD, _STRIDE = tl.constexpr(PERIOD), tl.constexpr(STRIDE)
_BF16_DROPPED, _E4M3_DROPPED = tl.constexpr(BF16_DROPPED), tl.constexpr(E4M3_DROPPED)
_E4M3_MAX = tl.constexpr(E4M3_MAX)
_FACTOR_0, _FACTOR_1, _FACTOR_2 = (tl.constexpr(factor % 2**64) for factor in FACTORS)


def stored(
    tensors: list[Tensor], noise: Noise | None, unused: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns a buffer's one or two tensors and the base of its noise, or `unused`, for kernels."""
    found = [t.view(INTEGERS.get(t.dtype, t.dtype)) for t in tensors]
    return found[0], found[-1], noise.base if noise else unused


def expand_e4m3(codes: Tensor, out: Tensor) -> None:
    """Writes the numbers of float8_e4m3fn `codes` to `out`, bf16 or fp32; both are contiguous."""
    grid = (triton.cdiv(codes.numel(), EXPANDED),)
    _expand[grid](codes.view(torch.uint8), out, codes.numel(), EXPANDED, num_warps=8)


def try_out(device: torch.device) -> None:
    """Compiles and runs the smallest of kernels, and raises whatever prevents it.

    Triton is more than its package: it starts a C compiler, which needs Python's headers.
    """
    one = torch.ones(1, device=device).to(torch.float8_e4m3fn)
    number = torch.zeros(1, device=device)
    with current(device):
        expand_e4m3(one, number)
    if float(number) != 1:
        raise RuntimeError("a kernel that expands the e4m3 code of 1 did not give 1")


@triton.jit
def _expand(codes, out, count, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = tl.arange(0, BLOCK)
    inside = at < count - start
    numbers = _of_e4m3(tl.load(codes + start + at, mask=inside, other=0).to(tl.int32))
    tl.store(out + start + at, numbers.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _of_e4m3(code):
    """Returns the fp32 number of an e4m3 code, int32."""
    exponent, mantissa = (code >> 3) & 15, code & 7
    normal = (((exponent + 120) << 23) | (mantissa << 20)).to(tl.float32, bitcast=True)
    size = tl.where(exponent == 0, mantissa.to(tl.float32) * 0.001953125, normal)
    size = tl.where(code & 127 == 127, float("nan"), size)
    return tl.where(code >= 128, -size, size)


@triton.jit
def read(buffer, start, at, inside, KIND: tl.constexpr):
    """Reads fp32 numbers of a buffer, as `Buffer.read` does."""
    stored, rest, _ = buffer
    if KIND == "fp32" or KIND == "half":
        return tl.load(rest + start + at, mask=inside, other=0.0)
    bits = tl.load(stored + start + at, mask=inside, other=0).to(tl.int32)
    if KIND == "e4m3":
        return _of_e4m3(bits)
    bits = bits << 16
    if KIND == "split":
        bits += tl.load(rest + start + at, mask=inside, other=0).to(tl.int32)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def write(buffer, start, at, inside, value, key, label, column, KIND: tl.constexpr):
    """Writes fp32 values of these labels int64 [M] and columns [N], as `Buffer.store` does."""
    stored, rest, base = buffer
    bits = value.to(tl.int32, bitcast=True)
    if KIND == "fp32":
        tl.store(stored + start + at, value, mask=inside)
    elif KIND == "half":
        tl.store(stored + start + at, value.to(tl.float16), mask=inside)
        tl.store(rest + start + at, value, mask=inside)
    elif KIND == "split":
        tl.store(rest + start + at, bits.to(tl.int16), mask=inside)
        tl.store(stored + start + at, ((bits + 0x8000) >> 16).to(tl.int16), mask=inside)
    elif KIND == "bf16":
        bits += _noise(base, key, label, column, inside, value, _BF16_DROPPED)
        tl.store(stored + start + at, (bits >> 16).to(tl.int16), mask=inside)
    else:
        # As rounding.round_to_e4m3; the leading bits of the mantissa are then the code's last.
        noise = _noise(base, key, label, column, inside, value, _E4M3_DROPPED)
        size = tl.minimum(tl.abs(value), _E4M3_MAX)
        exponent = tl.maximum(size.to(tl.int32, bitcast=True) >> 23, 121)
        shifted = size + 2 * (exponent << 23).to(tl.float32, bitcast=True)
        leading = (shifted.to(tl.int32, bitcast=True) + noise) >> _E4M3_DROPPED
        code = ((exponent - 120) << 3) + leading - ((exponent + 1) << 4) - 8
        code = tl.where(value == value, code, 127) | ((bits >> 24) & 128)
        tl.store(stored + start + at, code.to(tl.uint8), mask=inside)


@triton.jit
def _noise(base, key, label, column, inside, value, BITS: tl.constexpr):
    """Returns the noise of these labels and columns, flipped where their value is negative.

    It is that of `rounding.Noise.rows` and `rounding._flip_below_zero`.
    """
    hashed = label.to(tl.uint64)
    unsigned = key.to(tl.uint64)
    hashed = ((hashed ^ (hashed >> 32)) + unsigned) * _FACTOR_0
    hashed = ((hashed ^ (hashed >> 32)) + unsigned) * _FACTOR_1
    hashed = ((hashed ^ (hashed >> 32)) + unsigned) * _FACTOR_2
    offset = (hashed >> (64 - BITS)).to(tl.int32)
    at = (label % _PERIOD).to(tl.int32)[:, None] * _STRIDE + column[None, :]
    sign = value.to(tl.int32, bitcast=True) >> 31  # all bits, or none
    flipped = (sign.to(tl.uint32, bitcast=True) >> (32 - BITS)).to(tl.int32)
    return tl.load(base + at, mask=inside, other=0) ^ offset[:, None] ^ flipped
