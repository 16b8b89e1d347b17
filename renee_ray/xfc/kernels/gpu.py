"""The operations on a chunk of labels on a GPU: Triton kernels that write nothing but results.

For c labels with operand W [c, D] (the weights w in the dtype of the matmuls), embeddings
E [B, D] and velocities m; whatever is in between is fp32:

    _residual    Z = W E';  G = sigmoid(Z)                [c, B]; sums of softplus(Z) if asked
                 (of e4m3 numbers Z = W E' s, with a factor s of each row)
    _positives   z = W[l] . E[i];  G[l, i] = (1 - y) sigmoid(z) - y sigmoid(-z)
                 for every pair (l, i) of value y, which is 1 but for soft targets
    _update      m <- momentum * m + G E + decay * w;  w <- w - lr * m      rounded as stored

A row of G is followed by zeros up to its stride, a multiple of `PADDING`. Kernels are compiled for
that stride alone, so every B reads and writes G by 16 bytes, and a new B compiles nothing.

Neither Z nor the gradient G E is ever in memory: they live in the registers of the tile that
computes them, and slice by slice become what is stored. From Hopper on, operands come by tensor
descriptors (TMA), and programs stay for tile after tile. Other GPUs, and rows that are no multiple
of 16 bytes, take pointers. `Tiles` has the choice, which is made by measured speed.

W, E and G are of one dtype, bf16 or fp16 (fp32 works, but cuBLAS is faster); for Z alone W and E
may be e4m3, which a GPU multiplies twice as fast (docs/performance.md). The sums then have the
digits that its tensor cores keep: 14 binary ones on Hopper, more than four digits are worth.
The residual of a positive is computed anew from its logit, since sigmoid(z) - 1 would lose all
digits in bf16. A kernel of its own does so, with one program for each pair: tiles then search for
nothing, and a label may be positive in every row.

Import this module only to use it: it needs triton, which comes with torch for CUDA.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from renee_ray.xfc.kernels import tiles
from renee_ray.xfc.kernels.plain import Update
from renee_ray.xfc.kernels.tiles import Tiles
from renee_ray.xfc.weights.gpu_rows import read, stored, write

PADDING = 64
"""Numbers by which a row of G is padded: 128 bytes of bf16."""
PAIR = 128
"""Numbers that a program of `_positives` multiplies at once."""
TRIAL = 8_192
"""Labels whose copies are updated while updates are measured."""


def residual(
    operand: Tensor,
    inputs: Tensor,
    labels: Tensor,
    rows: Tensor,
    out: Tensor,
    loss: Tensor | None,
    scales: Tensor | None = None,
    *,
    values: Tensor | None = None,
) -> Tensor:
    """Computes `plain.residual` on a GPU, of e4m3 numbers if there are `scales`.

    Args:
        out: its rows are followed by zeros up to its stride, which are written too.
        scales: float32 [B]; row i of E is then scales[i] * inputs[i], operand and inputs are
            float8_e4m3fn, and out has another dtype.
    """
    (c, dim), batch, stride = operand.shape, len(inputs), out.stride(0)
    with_loss, scaled = loss is not None, scales is not None
    logits = out.new_empty(len(rows) if with_loss else 0, dtype=torch.float32)
    factors = out if scales is None else scales
    k = tiles.BYTES // inputs.element_size()

    def launch(chosen: Tiles) -> Tensor:
        """Returns the sums of softplus(Z), one for each tile."""
        count = triton.cdiv(c, chosen.m) * triton.cdiv(batch, chosen.n)
        sums = out.new_empty(count if with_loss else 0, dtype=torch.float32)
        _residual[(chosen.programs(count, out.device),)](
            _matrix(operand, chosen.m, k, chosen), _matrix(inputs, chosen.n, k, chosen),
            factors, out, sums, c, batch, stride, dim, scaled, with_loss, k, **_options(chosen),
        )  # fmt: skip
        return sums

    key = "residual", scaled, with_loss, dim, stride.bit_length(), inputs.dtype
    sums = launch(tiles.fastest(key, operand, inputs, lambda: launch))
    if len(rows):
        values = factors.new_ones(len(rows), dtype=torch.float32) if values is None else values
        _positives[(len(rows),)](
            operand, inputs, factors, out, logits, labels, rows, values, stride, dim, scaled,
            with_loss, PAIR,
        )  # fmt: skip
    if loss is not None:
        loss += sums.sum(dtype=torch.float64) - logits.sum(dtype=torch.float64)
    return out


class FusedUpdate(Update):
    """`plain.Update` on a GPU: the product and the update in one pass over the weights."""

    def __call__(
        self, start: int, stop: int, operand: Tensor, residual: Tensor, inputs: Tensor
    ) -> None:
        sgd, weight, velocity = self._sgd, self._weights.weight, self._weights.velocity
        (batch, dim), stride = inputs.shape, residual.stride(0)
        kinds = weight.kind, velocity.kind if velocity else "none"
        k = tiles.BYTES // inputs.element_size()
        weights, velocities = (
            [buffer.data[start:stop], buffer.rest[start:stop]]
            for buffer in (weight, velocity or weight)
        )

        def trial() -> Callable[[Tiles], None]:
            copies = [t[:TRIAL].clone() for t in weights]
            others = [t[:TRIAL].clone() for t in velocities] if velocity else copies
            return functools.partial(launch, [copies, others])

        def launch(buffers: list[list[Tensor]], chosen: Tiles) -> None:
            c = len(buffers[0][0])
            count = triton.cdiv(c, chosen.m) * triton.cdiv(dim, chosen.n)
            _update[(chosen.programs(count, inputs.device),)](
                _matrix(residual[:c], chosen.m, k, chosen), _matrix(inputs, k, chosen.n, chosen),
                *(stored(*of, residual) for of in zip(buffers, self._noise, strict=True)),
                *(noise.key if noise else 0 for noise in self._noise),
                self._first + start, c, batch, stride,
                (sgd.lr, sgd.momentum, sgd.weight_decay), kinds, dim, k, **_options(chosen),
            )  # fmt: skip

        key = "update", kinds, dim, stride.bit_length(), inputs.dtype
        launch([weights, velocities], tiles.fastest(key, residual, inputs, trial))


def _matrix(matrix: Tensor, rows: int, columns: int, chosen: Tiles) -> Tensor | TensorDescriptor:
    """Returns a matrix as kernels take it, which read rows x columns of it at once."""
    if not chosen.resident:
        return matrix
    return TensorDescriptor(matrix, [*matrix.shape], [*matrix.stride()], [rows, columns])


def _options(chosen: Tiles) -> dict[str, Any]:
    return {
        "DESCRIBED": chosen.resident > 0, "M": chosen.m, "N": chosen.n, "SLICES": chosen.slices,
        "GROUP": tiles.GROUP, "num_warps": chosen.warps, "num_stages": chosen.stages,
    }  # fmt: skip


@triton.jit
def _corner(tile, rows, columns, M: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr):
    """Returns the first row and column of a tile, of rows x columns tiles in all.

    A grid's first axis alone may have more than 65,535 programs.
    """
    first = tile // (GROUP * columns) * GROUP
    high = min(rows - first, GROUP)
    inside = tile % (GROUP * columns)
    return (first + inside % high) * M, inside // high * N


@triton.jit
def _block(
    matrix, row, column, rows, columns, stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Returns matrix[row : row + ROWS, column : column + COLUMNS], with zeros outside of it."""
    if DESCRIBED:
        return matrix.load([row, column])
    else:
        r, c = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
        inside = (r < rows - row) & (c < columns - column)
        start = matrix + tl.cast(row, tl.int64) * stride + column
        return tl.load(start + (r * stride + c), mask=inside, other=0.0)


@triton.jit
def _sliced(block, SLICES: tl.constexpr):
    """Returns the columns of a block in SLICES equal parts, without moving them."""
    if SLICES == 1:
        return (block,)
    else:
        M: tl.constexpr = block.shape[0]
        HALF: tl.constexpr = block.shape[1] // 2
        left, right = tl.split(tl.permute(tl.reshape(block, (M, 2, HALF)), (0, 2, 1)))
        return _sliced(left, SLICES // 2) + _sliced(right, SLICES // 2)


@triton.jit(do_not_specialize=["c", "batch"])
def _residual(
    weight, inputs, scales, out, sums, c, batch, stride,
    DIM: tl.constexpr, SCALED: tl.constexpr, LOSS: tl.constexpr, K: tl.constexpr,
    DESCRIBED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, SLICES: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = N // SLICES
    high, wide = tl.cdiv(c, M), tl.cdiv(batch, N)
    for tile in tl.range(tl.program_id(0), high * wide, tl.num_programs(0), flatten=DESCRIBED):
        row, column = _corner(tile, high, wide, M, N, GROUP)
        total = tl.zeros((M, N), dtype=tl.float32)
        for k in range(0, DIM, K):
            left = _block(weight, row, k, c, DIM, DIM, M, K, DESCRIBED)
            right = _block(inputs, column, k, batch, DIM, DIM, N, K, DESCRIBED)
            total = tl.dot(left, tl.trans(right), total, input_precision="ieee")
        parts, r = _sliced(total, SLICES), tl.arange(0, M)
        loss = tl.zeros((M,), dtype=tl.float32)
        for i in tl.static_range(SLICES):
            z, n, begin = parts[i], tl.arange(0, WIDTH), column + i * WIDTH
            if SCALED:
                z *= tl.load(scales + begin + n, mask=n < batch - begin, other=0.0)[None, :]
            inside = (r < c - row)[:, None] & (n < batch - begin)[None, :]
            padded = (r < c - row)[:, None] & (n < stride - begin)[None, :]
            sigmoid = tl.where(inside, 1 / (1 + tl.exp(-z)), 0.0)
            start = out + row.to(tl.int64) * stride + begin
            at = start + (r[:, None] * stride + n[None, :])
            tl.store(at, sigmoid.to(out.dtype.element_ty), mask=padded)
            if LOSS:
                power = tl.exp(-tl.abs(z))
                # log(1 + power), without losing the digits of a small power.
                above = 1 + power
                log = tl.where(above == 1, power, tl.log(above) * (power / (above - 1)))
                loss += tl.sum(tl.where(inside, tl.maximum(z, 0.0) + log, 0.0), axis=1)
        if LOSS:
            tl.store(sums + tile, tl.sum(loss, axis=0))


@triton.jit(do_not_specialize_on_alignment=["labels", "rows", "values"])
def _positives(
    weight, inputs, scales, out, logits, labels, rows, values, stride,
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
    y = tl.load(values + pair)
    residual = (1 - y) / (1 + tl.exp(-z)) - y / (1 + tl.exp(z))
    tl.store(out + label * stride + row, residual.to(out.dtype.element_ty))
    if LOSS:
        tl.store(logits + pair, y * z)


@triton.jit(do_not_specialize=["weight_key", "velocity_key", "first", "c", "batch"])
def _update(
    residual, inputs, weight, velocity, weight_key, velocity_key, first, c, batch, stride, rates,
    KINDS: tl.constexpr, DIM: tl.constexpr, K: tl.constexpr,
    DESCRIBED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, SLICES: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    # `weight` and `velocity` are as `stored` gives them. Their keys are arguments of their own:
    # inside a tuple Triton cannot be told not to compile anew for multiples of 16.
    lr, momentum, decay = rates
    WIDTH: tl.constexpr = N // SLICES
    high, wide = tl.cdiv(c, M), tl.cdiv(DIM, N)
    for tile in tl.range(tl.program_id(0), high * wide, tl.num_programs(0), flatten=DESCRIBED):
        row, column = _corner(tile, high, wide, M, N, GROUP)
        total = tl.zeros((M, N), dtype=tl.float32)
        for k in range(0, batch, K):
            left = _block(residual, row, k, c, stride, stride, M, K, DESCRIBED)
            right = _block(inputs, k, column, batch, DIM, DIM, K, N, DESCRIBED)
            total = tl.dot(left, right, total, input_precision="ieee")
        parts, r = _sliced(total, SLICES), tl.arange(0, M)
        label = first + (row + r).to(tl.int64)
        for i in tl.static_range(SLICES):
            begin = column + i * WIDTH
            n = tl.arange(0, WIDTH)
            inside = (r < c - row)[:, None] & (n < DIM - begin)[None, :]
            start, at = row.to(tl.int64) * DIM + begin, r[:, None] * DIM + n[None, :]
            w = read(weight, start, at, inside, KINDS[0])
            step = parts[i] + decay * w
            if KINDS[1] != "none":
                step += momentum * read(velocity, start, at, inside, KINDS[1])
                write(velocity, start, at, inside, step, velocity_key, label, begin + n, KINDS[1])
            write(weight, start, at, inside, w - lr * step, weight_key, label, begin + n, KINDS[0])
