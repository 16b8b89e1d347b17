"""Taking a classifier step back, when the encoder's half of it turns out not to be finite.

A chunk is updated as soon as its part of dE is known, so that its logits are computed once and
no copy of the weights is needed. Whether the encoder can use dE is known only at the end. Such
steps are rare; then the update is inverted from the equations of storage.py, with w', m' what
the step left and G(w) = sigmoid(E w) - y:

    momentum    w = w' + lr * m';    m = (m' - G(w)' E - weight_decay * w) / momentum
    without     w = (w' + lr * G(w)' E) / (1 - lr * weight_decay)    by iteration from w = w'

A storage that rounds stochastically left w' = floor(w - u + n), in units of its spacing, with u
the update and n the noise in [0, 1). Since w has the storage's digits, w = ceil(w' + u - n):
what is stored is w' + u, rounded with the opposite noise. That gives back the very number,
except where a power of two lies between, at which the spacing changes. Rounded to nearest, most
small updates would stay: there w' is as far from w as it can be, and not by u. With momentum,
what m' was before it was rounded is not known: m comes back to about a spacing of m' / momentum.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from renee_ray.xfc.shard import Inputs, Pairs, Shard
from renee_ray.xfc.weights.rounding import Noise
from renee_ray.xfc.weights.storages import SGD, add_product, step_noise

log = logging.getLogger(__name__)

COPIES = 12
"""Of a weight in fp32, at most, while it is worked on: plain torch on any device."""
ITERATIONS = 50
TOLERANCE = 1e-7
"""Largest change of a weight, relative to the largest weight, at which the iteration ends."""


def undo_step(shard: Shard, embeddings: Tensor, positives: Pairs, sgd: SGD) -> None:
    """Inverts `shard.step` on the same arguments; nothing may have changed the shard since.

    Without momentum that is certain while lr is below 4 / (largest eigenvalue of E E'). Beyond,
    several weights may lead to w', and the iteration may find another or none (which is logged);
    with momentum there is no such limit.
    """
    weights = shard.weights
    inputs = shard.inputs(embeddings)
    noise = step_noise(weights, sgd, shard.owned.start, opposite=True)
    # Labels are independent: chunks whose fp32 copies take no more than the step's buffers did.
    each = COPIES * 4 * weights.dim + 4 * len(embeddings)
    chunks = shard.chunks(len(embeddings), each)
    for bounds, pairs in zip(chunks, positives.by_chunk(chunks), strict=True):
        chunk = _Chunk(shard, bounds, inputs, pairs, noise)
        if weights.velocity is None:
            chunk.invert(sgd)
        else:
            chunk.invert_with_momentum(sgd)


class _Chunk:
    """Rows [start, stop) of a shard and the batch that they were trained on."""

    def __init__(
        self,
        shard: Shard,
        bounds: tuple[int, int],
        inputs: Inputs,
        pairs: tuple[Tensor, Tensor],
        noise: list[Noise | None],
    ) -> None:
        self._shard, self._weights, self._bounds = shard, shard.weights, bounds
        self._inputs, self._pairs, self._noise = inputs, pairs, noise

    def invert_with_momentum(self, sgd: SGD) -> None:
        velocity = self._weights.velocities(*self._bounds).clone()
        self._store(self._read().add_(velocity, alpha=sgd.lr))
        velocity -= self._gradient().add_(self._read(), alpha=sgd.weight_decay)
        assert self._weights.velocity is not None
        self._weights.velocity.store(*self._bounds, velocity.div_(sgd.momentum), self._noise[1])

    def invert(self, sgd: SGD) -> None:
        after = before = self._read()
        for _ in range(ITERATIONS):
            last, before = before, after + sgd.lr * self._gradient()
            before /= 1 - sgd.lr * sgd.weight_decay
            self._store(before.clone())
            if (before - last).abs().max() <= TOLERANCE * before.abs().max():
                return
        log.warning(
            "an update of labels from %d on could be taken back only in part",
            self._shard.owned.start + self._bounds[0],
        )

    def _read(self) -> Tensor:
        return self._weights.read(*self._bounds).clone()

    def _store(self, weight: Tensor) -> None:
        self._weights.weight.store(*self._bounds, weight, self._noise[0])

    def _gradient(self) -> Tensor:
        """G' E at the weights as they are stored, float32 [stop - start, D]."""
        operand, scratch = self._weights.operand(*self._bounds), self._weights.scratch
        residual = self._shard.residual(operand, self._inputs, self._bounds, self._pairs, None)
        gradient = torch.zeros(operand.shape, device=operand.device)
        add_product(gradient, residual, self._inputs.wide, 1, 1, scratch)
        return gradient
