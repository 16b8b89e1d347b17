"""The update of a chunk on a CPU: from gradient to stored weights in one compiled pass.

For c labels with weights w and velocities m [c, D] as stored, and the product P = G E [c, D] as
BLAS gave it, bf16 or fp32; whatever is in between is fp32, and what is stored is rounded as the
storage does:

    m <- momentum * m + P + decay * w;    w <- w - lr * m

Plain torch takes a pass over memory for every operation and for every change of dtype. Here a row
is read, computed and written while it is in the nearest cache (`cpu_rows`). The Triton kernels of
`gpu` have the same structure.

Weights that lie in memory as fp32 (fp32, fp16) need none of this: BLAS accumulates the product
into them. Import this module only to use it: numba takes a second.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from renee_ray.xfc.kernels.plain import Update
from renee_ray.xfc.weights.buffers import Buffer
from renee_ray.xfc.weights.cpu_rows import (
    DROPPED,
    DTYPES,
    READ,
    WRITE,
    compiled,
    noise_of,
    over_rows,
)
from renee_ray.xfc.weights.rounding import Noise
from renee_ray.xfc.weights.storages import SGD, Weights


class FusedUpdate(Update):
    """`plain.Update` on a CPU: everything after the product in one pass over the weights."""

    def __call__(
        self, start: int, stop: int, operand: Tensor, residual: Tensor, inputs: Tensor
    ) -> None:
        weights, sgd = self._weights, self._sgd
        weight, velocity = weights.weight, weights.velocity
        product = weights.scratch("product", stop - start, weights.dim, dtype=inputs.dtype)
        torch.mm(residual, inputs, out=product)
        over_rows(
            update_loop(DTYPES[inputs.dtype], weight.kind, velocity.kind if velocity else None),
            (product, *_stored(weight, start, stop), *_stored(velocity or weight, start, stop)),
            self._first + start,
            *(_drawn(noise) for noise in self._noise),
            (np.float32(sgd.lr), np.float32(sgd.momentum), np.float32(sgd.weight_decay)),
        )


def compile_for(weights: Weights) -> None:
    """Compiles what steps on these weights will call, so that the first takes no longer."""
    operand = weights.operand(0, 0)
    update = FusedUpdate(weights, SGD(0.0), 0)
    update(0, 0, operand, operand.new_empty(0, 1), operand.new_empty(1, weights.dim))


def _stored(buffer: Buffer, start: int, stop: int) -> tuple[Tensor, Tensor]:
    return buffer.data[start:stop], buffer.rest[start:stop]


def _drawn(noise: Noise | None) -> tuple[Any, Any]:
    """Returns what the loop makes noise of: `Noise.base` and `Noise.key`."""
    if noise is None:
        return np.zeros(0, dtype=np.int32), np.uint64(0)
    return noise.base.numpy(), np.uint64(noise.key % 2**64)


@functools.cache
def update_loop(product: str, weight: str, velocity: str | None) -> Callable[..., None]:
    """Returns the loop for these kinds of numbers; velocity None: no momentum."""
    moving, velocity = velocity is not None, velocity or weight
    read_product, read_weight, read_velocity = READ[product], READ[weight], READ[velocity]
    write_weight, write_velocity = WRITE[weight], WRITE[velocity]
    weight_bits, velocity_bits = DROPPED[weight], DROPPED[velocity]

    @compiled
    def update(
        product, weight, weight_rest, velocity, velocity_rest, first,
        weight_drawn, velocity_drawn, rates,
    ):  # fmt: skip
        (c, dim), (lr, momentum, decay) = weight.shape, rates
        step, w, m = np.empty(dim, np.float32), np.empty(dim, np.float32), np.empty(dim, np.float32)
        for i in range(c):
            read_product(product[i], product[i], step)
            read_weight(weight[i], weight_rest[i], w)
            _add(step, decay, w)
            if moving:
                read_velocity(velocity[i], velocity_rest[i], m)
                _add(step, momentum, m)
                noise, offset = noise_of(velocity_drawn, first + i, dim, velocity_bits)
                write_velocity(velocity[i], velocity_rest[i], step, noise, offset)
            _add(w, -lr, step)
            noise, offset = noise_of(weight_drawn, first + i, dim, weight_bits)
            write_weight(weight[i], weight_rest[i], w, noise, offset)

    return update


@compiled
def _add(total, factor, values):
    for j in range(len(total)):
        total[j] += factor * values[j]
