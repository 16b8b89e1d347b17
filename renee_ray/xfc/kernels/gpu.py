"""The operations on a chunk of labels on a GPU: Triton kernels that write nothing but results.

For c labels with operand W [c, D] (the weights w in the dtype of the matmuls), embeddings
E [B, D] and velocities m; whatever is in between is fp32:

    _residual    Z = W E';  G = sigmoid(Z)                [c, B]; sums of softplus(Z) if asked
                 (of e4m3 numbers Z = W E' s, with a factor s of each row)
    _positives   z = W[l] . E[i];  G[l, i] = -sigmoid(-z)   for every pair (l, i)
    _update      m <- momentum * m + G E + decay * w;  w <- w - lr * m      rounded as stored

A row of G is followed by zeros up to its stride, a multiple of `PADDING`. Kernels are compiled for
that stride alone, so every B reads and writes G by 16 bytes, and a new B compiles nothing.

Neither Z nor the gradient G E is ever in memory: they live in the registers of the tile that
computes them. W, E and G are of one dtype: fp32, bf16 or fp16; for Z alone W and E may be e4m3,
which a GPU multiplies twice as fast. The sums then have the digits that its tensor cores keep: 14
binary ones on Hopper, more than numbers of four digits are worth. The other products would need
e4m3 copies of W and E that lie the other way, and a G of four digits, so they stay bf16.
The residual of a positive is computed anew from its logit, since sigmoid(z) - 1 would lose all
digits in bf16. A kernel of its own does so, with one program for each pair: tiles then search for
nothing, and a label may be positive in every row.

The update reads and writes weights as integers (see `buffers`), which needs no fp8 instructions.
Import this module only to use it: it needs triton, which comes with torch for CUDA.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from renee_ray.xfc.kernels.plain import Update
from renee_ray.xfc.weights.buffers import Buffer
from renee_ray.xfc.weights.rounding import (
    BF16_DROPPED,
    E4M3_DROPPED,
    E4M3_MAX,
    FACTORS,
    PERIOD,
    STRIDE,
    Noise,
)

TILE = 128
"""Rows and columns of what one program computes."""
TILE_BYTES = 128
"""Bytes of each row or column that a program multiplies at once."""
PADDING = 64
"""Numbers by which a row of G is padded: 128 bytes of bf16."""
SETTINGS: dict[str, Any] = {"num_warps": 8, "num_stages": 3}

INTEGERS = {torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.uint8}

_PERIOD, _STRIDE = tl.constexpr(PERIOD), tl.constexpr(STRIDE)
_BF16_DROPPED, _E4M3_DROPPED = tl.constexpr(BF16_DROPPED), tl.constexpr(E4M3_DROPPED)
_E4M3_MAX = tl.constexpr(E4M3_MAX)
_FACTOR_0, _FACTOR_1, _FACTOR_2 = (tl.constexpr(factor % 2**64) for factor in FACTORS)


def try_out(device: torch.device) -> None:
    """Compiles and runs the smallest of kernels, and raises whatever prevents it.

    Triton is more than its package: it starts a C compiler, which needs Python's headers.
    """
    number = torch.zeros(1, device=device)
    _increment[(1,)](number)
    if float(number) != 1:
        raise RuntimeError("a kernel that adds 1 to 0 did not give 1")


def residual(
    operand: Tensor,
    inputs: Tensor,
    labels: Tensor,
    rows: Tensor,
    out: Tensor,
    loss: Tensor | None,
    scales: Tensor | None = None,
) -> Tensor:
    """Computes `plain.residual` on a GPU, of e4m3 numbers if there are `scales`.

    Args:
        out: its rows are followed by zeros up to its stride, which are written too.
        scales: float32 [B]; row i of E is then scales[i] * inputs[i], operand and inputs are
            float8_e4m3fn, and out has another dtype.
    """
    (c, dim), batch, stride = operand.shape, len(inputs), out.stride(0)
    tiles = triton.cdiv(batch, TILE) * triton.cdiv(c, TILE)
    with_loss, scaled = loss is not None, scales is not None
    sums = out.new_empty(tiles if with_loss else 0, dtype=torch.float32)
    logits = out.new_empty(len(rows) if with_loss else 0, dtype=torch.float32)
    factors = sums if scales is None else scales
    depth = TILE_BYTES // inputs.element_size()
    _residual[(tiles,)](
        operand, inputs, factors, out, sums, c, batch, stride, dim, scaled, with_loss, TILE, depth,
        **SETTINGS,
    )  # fmt: skip
    if len(rows):
        _positives[(len(rows),)](
            operand, inputs, factors, out, logits, labels, rows, stride, dim, scaled, with_loss,
            TILE,
        )  # fmt: skip
    if loss is not None:
        loss += sums.sum(dtype=torch.float64) - logits.sum(dtype=torch.float64)
    return out


class FusedUpdate(Update):
    """`plain.Update` on a GPU: the product and the update in one pass over the weights."""

    def __call__(
        self, start: int, stop: int, operand: Tensor, residual: Tensor, inputs: Tensor
    ) -> None:
        weights, sgd = self._weights, self._sgd
        weight, velocity = weights.weight, weights.velocity
        weight_noise, velocity_noise = self._noise
        batch, dim = inputs.shape
        _update[(triton.cdiv(dim, TILE) * triton.cdiv(stop - start, TILE),)](
            residual, inputs,
            _stored(weight, start, stop, weight_noise, residual),
            _stored(velocity or weight, start, stop, velocity_noise, residual),
            weight_noise.key if weight_noise else 0, velocity_noise.key if velocity_noise else 0,
            self._first + start, stop - start, batch, residual.stride(0),
            (sgd.lr, sgd.momentum, sgd.weight_decay),
            (weight.kind, velocity.kind if velocity else "none"),
            dim, TILE, TILE_BYTES // inputs.element_size(), **SETTINGS,
        )  # fmt: skip


def _stored(
    buffer: Buffer, start: int, stop: int, noise: Noise | None, unused: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns a buffer as `_update` takes it: its one or two tensors and the base of its noise.

    unused: stands where there is no noise.
    """
    found = [t[start:stop].view(INTEGERS.get(t.dtype, t.dtype)) for t in buffer.tensors().values()]
    return found[0], found[-1], noise.base if noise else unused


@triton.jit
def _increment(number):
    tl.store(number, tl.load(number) + 1)


@triton.jit
def _tile(across, TILE: tl.constexpr):
    """Returns rows and columns of this program's tile, of `across` tiles side by side.

    A grid's first axis alone may have more than 65,535 programs.
    """
    program, own = tl.program_id(0), tl.arange(0, TILE)
    return program // across * TILE + own, program % across * TILE + own


@triton.jit
def _product(
    a, b, a_step, b_step, a_inside, b_inside, width, depth, TILE: tl.constexpr, K: tl.constexpr
):
    """Computes a @ b in fp32 [TILE, TILE], from pointers to their first K columns and rows.

    width: columns of a; depth: rows of b, the others of which count as zeros.
    """
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    for k in range(0, depth, K):
        at = k + tl.arange(0, K)
        left = tl.load(a, mask=a_inside[:, None] & (at < width)[None, :], other=0.0)
        right = tl.load(b, mask=(at < depth)[:, None] & b_inside[None, :], other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
        a += K * a_step
        b += K * b_step
    return total


@triton.jit(do_not_specialize=["c", "batch"])
def _residual(
    weight, inputs, scales, out, sums, c, batch, stride,
    DIM: tl.constexpr, SCALED: tl.constexpr, LOSS: tl.constexpr,
    TILE: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    row, column = _tile(tl.cdiv(batch, TILE), TILE)
    k = tl.arange(0, K)
    left = weight + row.to(tl.int64)[:, None] * DIM + k[None, :]
    right = inputs + column.to(tl.int64)[None, :] * DIM + k[:, None]
    z = _product(left, right, 1, 1, row < c, column < batch, DIM, DIM, TILE, K)
    if SCALED:
        z *= tl.load(scales + column, mask=column < batch, other=0.0)[None, :]
    inside = (row < c)[:, None] & (column < batch)[None, :]
    padded = (row < c)[:, None] & (column < stride)[None, :]
    at = row.to(tl.int64)[:, None] * stride + column[None, :]
    sigmoid = tl.where(inside, 1 / (1 + tl.exp(-z)), 0.0)
    tl.store(out + at, sigmoid.to(out.dtype.element_ty), mask=padded)
    if LOSS:
        power = tl.exp(-tl.abs(z))
        # log(1 + power), without losing the digits of a small power.
        above = 1 + power
        log = tl.where(above == 1, power, tl.log(above) * (power / (above - 1)))
        softplus = tl.where(inside, tl.maximum(z, 0.0) + log, 0.0)
        tl.store(sums + tl.program_id(0), tl.sum(tl.sum(softplus, axis=1), axis=0))


@triton.jit(do_not_specialize_on_alignment=["labels", "rows"])
def _positives(
    weight, inputs, scales, out, logits, labels, rows, stride,
    DIM: tl.constexpr, SCALED: tl.constexpr, LOSS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    label, row = tl.load(labels + pair), tl.load(rows + pair)
    total = tl.zeros((K,), dtype=tl.float32)
    for k in range(0, DIM, K):
        at = k + tl.arange(0, K)
        left = tl.load(weight + label * DIM + at, mask=at < DIM, other=0.0)
        right = tl.load(inputs + row * DIM + at, mask=at < DIM, other=0.0)
        total += left.to(tl.float32) * right.to(tl.float32)
    z = tl.sum(total, axis=0)
    if SCALED:
        z *= tl.load(scales + row)
    tl.store(out + label * stride + row, (-1 / (1 + tl.exp(z))).to(out.dtype.element_ty))
    if LOSS:
        tl.store(logits + pair, z)


@triton.jit(do_not_specialize=["weight_key", "velocity_key", "first", "c", "batch"])
def _update(
    residual, inputs, weight, velocity, weight_key, velocity_key, first, c, batch, stride, rates,
    KINDS: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    # `weight` and `velocity` are as `_stored` gives them. Their keys are arguments of their own:
    # inside a tuple Triton cannot be told not to compile anew for multiples of 16.
    lr, momentum, decay = rates
    row, column = _tile(tl.cdiv(DIM, TILE), TILE)
    k = tl.arange(0, K)
    left = residual + row.to(tl.int64)[:, None] * stride + k[None, :]
    right = inputs + k[:, None] * DIM + column[None, :]
    step = _product(left, right, 1, DIM, row < c, column < DIM, stride, batch, TILE, K)
    inside = (row < c)[:, None] & (column < DIM)[None, :]
    at = row.to(tl.int64)[:, None] * DIM + column[None, :]
    label = first + row.to(tl.int64)
    w = _read(weight, at, inside, KINDS[0])
    step += decay * w
    if KINDS[1] != "none":
        step += momentum * _read(velocity, at, inside, KINDS[1])
        _write(velocity, at, inside, step, velocity_key, label, column, KINDS[1])
    w -= lr * step
    _write(weight, at, inside, w, weight_key, label, column, KINDS[0])


@triton.jit
def _read(buffer, at, inside, KIND: tl.constexpr):
    """Reads fp32 numbers of a buffer, as `Buffer.read` does."""
    stored, rest, _ = buffer
    if KIND == "fp32" or KIND == "half":
        return tl.load(rest + at, mask=inside, other=0.0)
    bits = tl.load(stored + at, mask=inside, other=0).to(tl.int32)
    if KIND == "e4m3":
        exponent, mantissa = (bits >> 3) & 15, bits & 7
        normal = (((exponent + 120) << 23) | (mantissa << 20)).to(tl.float32, bitcast=True)
        size = tl.where(exponent == 0, mantissa.to(tl.float32) * 0.001953125, normal)
        size = tl.where(bits & 127 == 127, float("nan"), size)
        return tl.where(bits >= 128, -size, size)
    bits = bits << 16
    if KIND == "split":
        bits += tl.load(rest + at, mask=inside, other=0).to(tl.int32)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _write(buffer, at, inside, value, key, label, column, KIND: tl.constexpr):
    """Writes fp32 values of these labels [TILE] and columns [TILE], as `Buffer.store` does."""
    stored, rest, base = buffer
    bits = value.to(tl.int32, bitcast=True)
    if KIND == "fp32":
        tl.store(stored + at, value, mask=inside)
    elif KIND == "half":
        tl.store(stored + at, value.to(tl.float16), mask=inside)
        tl.store(rest + at, value, mask=inside)
    elif KIND == "split":
        tl.store(rest + at, bits.to(tl.int16), mask=inside)
        tl.store(stored + at, ((bits + 0x8000) >> 16).to(tl.int16), mask=inside)
    elif KIND == "bf16":
        bits += _noise(base, key, label, column, inside, value, _BF16_DROPPED)
        tl.store(stored + at, (bits >> 16).to(tl.int16), mask=inside)
    else:
        # As rounding.round_to_e4m3; the leading bits of the mantissa are then the code's last.
        noise = _noise(base, key, label, column, inside, value, _E4M3_DROPPED)
        size = tl.minimum(tl.abs(value), _E4M3_MAX)
        exponent = tl.maximum(size.to(tl.int32, bitcast=True) >> 23, 121)
        shifted = size + 2 * (exponent << 23).to(tl.float32, bitcast=True)
        leading = (shifted.to(tl.int32, bitcast=True) + noise) >> _E4M3_DROPPED
        code = ((exponent - 120) << 3) + leading - ((exponent + 1) << 4) - 8
        code = tl.where(value == value, code, 127) | ((bits >> 24) & 128)
        tl.store(stored + at, code.to(tl.uint8), mask=inside)


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
