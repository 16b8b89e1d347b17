"""How a CPU reads and writes one row of each storage: compiled loops that pass over memory once.

    READ[kind](stored, rest, out)                       `Buffer.read`: stored bits to fp32
    WRITE[kind](stored, rest, values, noise, offset)    `Buffer.store`: fp32 to stored bits

`kind` is `Buffer.kind`. A row is read or written while it is in the nearest cache, by loops short
enough to be vectorised: many arrays in one loop would be too many pairs that might overlap.
Import this module only to use it: numba takes a second.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from renee_ray.xfc.weights.rounding import (
    BF16_DROPPED,
    E4M3_DROPPED,
    E4M3_MAX,
    FACTORS,
    PERIOD,
    STRIDE,
)

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
INTEGERS = {torch.bfloat16: torch.uint16, torch.float8_e4m3fn: torch.uint8}
"""The dtypes that numpy, which knows neither, sees in their place."""

_FACTORS = tuple(np.uint64(factor % 2**64) for factor in FACTORS)
_E4M3_LARGEST, _E4M3_SMALLEST = np.float32(E4M3_MAX), np.float32(2**-9)
_E4M3_NAN = np.uint32(0x7FF00000)
"""The fp32 bits that torch reads the code of NaN as."""

# No fast-math: NaN and the order of roundings are as written.
compiled = numba.njit(nogil=True, error_model="numpy")


def over_rows(loop: Callable[..., None], tensors: tuple[Tensor, ...], *rest: Any) -> None:
    """Runs loop(*arrays, *rest) on the memory of tensors; lanes, not loops, divide the rows."""
    loop(*(t.view(INTEGERS.get(t.dtype, t.dtype)).numpy() for t in tensors), *rest)


def expand_e4m3(codes: Tensor, out: Tensor) -> None:
    """Writes the numbers of float8_e4m3fn `codes` [c, D] to `out`, bf16 or fp32, exactly."""
    over_rows(_expansion(DTYPES[out.dtype]), (codes, out))


@functools.cache
def _expansion(dtype: str) -> Callable[..., None]:
    """Returns the loop that reads e4m3 and writes `dtype`."""
    write = WRITE[dtype]

    @compiled
    def expand(codes, out):
        c, dim = codes.shape
        row, noise = np.empty(dim, np.float32), np.zeros(dim, np.int32)
        for i in range(c):
            _read_e4m3(codes[i], codes[i], row)
            write(out[i], out[i], row, noise, np.int32(0))

    return expand


@compiled
def noise_of(drawn, label, dim, bits):
    """Returns an array and a number; their exclusive or is the label's row of `Noise.rows`.

    drawn: `Noise.base` and `Noise.key`.
    """
    (base, key), hashed = drawn, np.uint64(label)
    for factor in _FACTORS:
        hashed = ((hashed ^ (hashed >> np.uint64(32))) + key) * factor
    at = label % PERIOD * STRIDE
    return base[at : at + dim], np.int32(hashed >> np.uint64(64 - bits))


@compiled
def _flipped(value, noise, bits):
    """Returns the noise of a value of these fp32 bits, as `rounding._flip_below_zero`."""
    negative = np.uint32(0) - (value >> np.uint32(31))
    return np.uint32(np.uint32(noise) ^ (negative & np.uint32((1 << bits) - 1)))


@compiled
def float_of(bits):
    return np.uint32(bits).view(np.float32)


@compiled
def bits_of(value):
    return np.float32(value).view(np.uint32)


@compiled
def _read_fp32(stored, rest, out):
    for j in range(len(out)):
        out[j] = stored[j]


@compiled
def _read_bf16(stored, rest, out):
    for j in range(len(out)):
        out[j] = float_of(np.uint32(stored[j]) << np.uint32(16))


@compiled
def _read_split(stored, rest, out):
    for j in range(len(out)):
        out[j] = float_of((np.int32(stored[j]) << np.int32(16)) + np.int32(rest[j]))


@compiled
def _read_e4m3(stored, rest, out):
    for j in range(len(out)):
        size = np.int32(stored[j] & 127)
        bits = np.uint32((size << 20) + (120 << 23))
        bits = bits if size >= 8 else bits_of(np.float32(size) * _E4M3_SMALLEST)
        bits = _E4M3_NAN if size == 127 else bits
        out[j] = float_of(bits | (np.uint32(stored[j] & 128) << 24))


@compiled
def _write_fp32(stored, rest, values, noise, offset):
    for j in range(len(values)):
        stored[j] = values[j]


@compiled
def _write_bf16(stored, rest, values, noise, offset):
    for j in range(len(values)):
        bits = bits_of(values[j])
        bits = np.uint32(bits + _flipped(bits, noise[j] ^ offset, BF16_DROPPED))
        stored[j] = np.uint16(bits >> np.uint32(16))


@compiled
def _write_split(stored, rest, values, noise, offset):
    for j in range(len(values)):
        bits = bits_of(values[j])
        rest[j] = np.int16(bits)
        stored[j] = np.uint16(np.uint32(bits + np.uint32(0x8000)) >> np.uint32(16))


@compiled
def _write_e4m3(stored, rest, values, noise, offset):
    """Rounds as `rounding.round_to_e4m3`; the leading bits of the mantissa are the code's last."""
    for j in range(len(values)):
        value = values[j]
        size = np.float32(abs(value))
        size = _E4M3_LARGEST if size > _E4M3_LARGEST else size
        exponent = np.int32(max(np.int32(bits_of(size) >> np.uint32(23)), np.int32(121)))
        shifted = np.float32(size + np.float32(2) * float_of(exponent << 23))
        added = _flipped(bits_of(value), noise[j] ^ offset, E4M3_DROPPED)
        leading = np.int32(np.uint32(bits_of(shifted) + added) >> np.uint32(E4M3_DROPPED))
        code = ((exponent - 120) << 3) + leading - ((exponent + 1) << 4) - 8
        code = code if value == value else np.int32(127)
        stored[j] = np.uint8(code | ((bits_of(value) >> np.uint32(24)) & np.uint32(128)))


READ = {"fp32": _read_fp32, "bf16": _read_bf16, "split": _read_split, "e4m3": _read_e4m3}
"""(stored, rest, out): a row of a buffer whose tensors are `stored` and `rest`, as fp32."""
WRITE = {"fp32": _write_fp32, "bf16": _write_bf16, "split": _write_split, "e4m3": _write_e4m3}
"""(stored, rest, values, noise, offset): `Buffer.store` of a row, by `noise_of`."""
DROPPED = {"bf16": BF16_DROPPED, "split": 1, "e4m3": E4M3_DROPPED}
