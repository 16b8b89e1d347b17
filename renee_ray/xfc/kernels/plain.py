"""The operations on a chunk of labels in plain torch, for any device.

For c labels with weights w and velocities m [c, D], embeddings E [B, D] and the positives Y
[c, B] of the chunk:

    residual    G = sigmoid(w E') - Y             Y in [0, 1]: 1, or a soft target's value
    Update      m <- momentum * m + G E + weight_decay * w;    w <- w - lr * m

The update is SGD with coupled weight decay (Renée, section 3), as `torch.optim.SGD` makes it.
Without momentum it is one product, which BLAS accumulates into weights that are fp32:

    w <- (1 - lr * weight_decay) * w - lr * G E

`cpu_update` and `gpu` do the same in fewer passes over memory.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from renee_ray.xfc.weights.rounding import Noise
from renee_ray.xfc.weights.scratch import Scratch
from renee_ray.xfc.weights.storages import SGD, Weights


def residual(
    operand: Tensor,
    inputs: Tensor,
    labels: Tensor,
    rows: Tensor,
    out: Tensor,
    loss: Tensor | None,
    *,
    values: Tensor | None = None,
) -> Tensor:
    """Computes sigmoid(operand @ inputs.T) - y, where y is not 0 at the pairs (labels, rows).

    Args:
        operand: [c, D]; inputs: [B, D]; out: [c, B], all of one dtype.
        labels: int64 [m], rows of `operand`; rows: int64 [m], of `inputs`; no pair twice.
        loss: float64 scalar, to which the sum of BCE-with-logits is added; None: not computed.
        values: float32 [m], y of each pair, in [0, 1]; None: all are 1.

    Returns:
        `out`
    """
    torch.mm(operand, inputs.T, out=out)
    if loss is not None:
        loss += bce_sum(out, labels, rows, values)
    return subtract_positives(out, labels, rows, values)


def subtract_positives(
    logits: Tensor, labels: Tensor, rows: Tensor, values: Tensor | None = None
) -> Tensor:
    """Computes sigmoid(logits) - y in place, for logits [c, B] and y as in `residual`.

    At a positive z it is (1 - y) sigmoid(z) - y sigmoid(-z): a difference from 1 would lose all
    digits in bf16.
    """
    z = logits[labels, rows].float()
    y = torch.ones_like(z) if values is None else values
    logits.sigmoid_()
    logits[labels, rows] = ((1 - y) * z.sigmoid() - y * z.neg().sigmoid_()).to(logits.dtype)
    return logits


def bce_sum(logits: Tensor, labels: Tensor, rows: Tensor, values: Tensor | None = None) -> Tensor:
    """Returns the sum of BCE-with-logits over a chunk [c, B]; the pairs as in `residual`."""
    everywhere = torch.nn.functional.softplus(logits.float()).sum(dtype=torch.float64)
    positive = logits[labels, rows] if values is None else values * logits[labels, rows]
    return everywhere - positive.sum(dtype=torch.float64)


class Update:
    """One SGD step on a shard, chunk by chunk.

    Args:
        first: the global id of the shard's first label.
    """

    def __init__(self, weights: Weights, sgd: SGD, first: int) -> None:
        self._weights, self._sgd, self._first = weights, sgd, first
        self._noise = [
            Noise(sgd.seed, sgd.step, stream, buffer.dropped, weights.dim, first, weights.scratch)
            if buffer is not None and buffer.dropped
            else None
            for stream, buffer in enumerate((weights.weight, weights.velocity))
        ]

    def __call__(
        self, start: int, stop: int, operand: Tensor, residual: Tensor, inputs: Tensor
    ) -> None:
        """Updates the rows [start, stop) by the gradient `residual @ inputs`.

        Args:
            operand: what `Weights.operand(start, stop)` gave; is overwritten.
            residual: [stop - start, B]; inputs: [B, D], both in the compute dtype.
        """
        weights, sgd = self._weights, self._sgd
        exact = operand.dtype == torch.float32
        weight = operand if exact else weights.read(start, stop)
        if weights.velocity is None:
            decay = 1 - sgd.lr * sgd.weight_decay
            add_product(weight, residual, inputs, decay, -sgd.lr, weights.scratch)
        else:
            velocity = weights.velocities(start, stop)
            add_product(velocity, residual, inputs, sgd.momentum, 1, weights.scratch)
            if sgd.weight_decay:
                velocity.add_(weight, alpha=sgd.weight_decay)
            weight.sub_(velocity, alpha=sgd.lr)
            weights.velocity.store(start, stop, velocity, self._noise[1])
        weights.weight.store(start, stop, weight, self._noise[0])


def add_product(
    total: Tensor, left: Tensor, right: Tensor, beta: float, alpha: float, scratch: Scratch
) -> None:
    """Computes total <- beta * total + alpha * left @ right, accumulated in fp32.

    Args:
        total: float32 [m, n]; left: [m, k]; right: [k, n], of one dtype.
    """
    if right.dtype == torch.float32:
        total.addmm_(left, right, beta=beta, alpha=alpha)
        return
    if _accumulates(right.device, right.dtype):
        torch.addmm(total, left, right, torch.float32, beta=beta, alpha=alpha, out=total)
        return
    product = multiply(left, right, scratch("product fp32", *total.shape), scratch)
    if beta != 1:
        total.mul_(beta)
    total.add_(product, alpha=alpha)


def multiply(left: Tensor, right: Tensor, out: Tensor, scratch: Scratch) -> Tensor:
    """Computes left @ right into `out` float32 [m, n]; a CPU rounds narrow products first."""
    if right.dtype == torch.float32:
        return torch.mm(left, right, out=out)
    if right.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32, out=out)
    narrow = scratch("product", *out.shape, dtype=right.dtype)
    return out.copy_(torch.mm(left, right, out=narrow))


@functools.cache
def _accumulates(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch adds a narrow product to an fp32 matrix in one call: releases differ."""
    if device.type != "cuda":
        return False
    one = torch.ones(16, 16, dtype=dtype, device=device)
    total = one.float()
    try:
        torch.addmm(total, one, one, torch.float32, beta=2, alpha=0.5, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 10).all())
