"""Taking a classifier step back, when the encoder's half of it turns out not to be finite.

A chunk is updated as soon as its part of dE is known, so that its logits are computed once and
no copy of the weights is needed. Whether the encoder can use dE is known only at the end. Such
steps are rare; then the update is inverted from the equations of storage.py, with w', m' what
the step left and G(w) = sigmoid(E w) - y:

    momentum    w = w' + lr * m';    m = (m' - G(w)' E - weight_decay * w) / momentum
    without     w = (w' + lr * G(w)' E) / (1 - lr * weight_decay)    by iteration from w = w'

What comes back differs from what was there by the storage's own rounding.
"""

from __future__ import annotations

import logging

from torch import Tensor

from renee_ray.xfc.shard import Pairs, Shard
from renee_ray.xfc.storage import SGD

log = logging.getLogger(__name__)

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
    inputs = embeddings.to(weights.compute_dtype)
    chunks = shard.chunks(len(embeddings))
    for (start, stop), pairs in zip(chunks, positives.by_chunk(chunks), strict=True):
        chunk = _Chunk(shard, start, stop, inputs, pairs)
        if weights.velocity is None:
            chunk.invert(sgd)
        else:
            chunk.invert_with_momentum(sgd)


class _Chunk:
    """Rows [start, stop) of a shard and the batch that they were trained on."""

    def __init__(
        self,
        shard: Shard,
        start: int,
        stop: int,
        inputs: Tensor,
        pairs: tuple[Tensor, Tensor],
    ) -> None:
        self.weights, self.start, self.stop = shard.weights, start, stop
        self._residual = shard.operations.residual
        self.inputs, self.pairs = inputs, pairs

    def invert_with_momentum(self, sgd: SGD) -> None:
        velocity = self.weights.velocities(self.start, self.stop).clone()
        weight = self._read() + sgd.lr * velocity
        self._write(weight)
        velocity -= self._gradient() + sgd.weight_decay * weight
        assert self.weights.velocity is not None
        self.weights.velocity.write(self.start, self.stop, velocity / sgd.momentum)

    def invert(self, sgd: SGD) -> None:
        after = before = self._read()
        for _ in range(ITERATIONS):
            last, before = before, after + sgd.lr * self._gradient()
            before /= 1 - sgd.lr * sgd.weight_decay
            self._write(before)
            if (before - last).abs().max() <= TOLERANCE * before.abs().max():
                return
        log.warning("an update of labels from %d on could be taken back only in part", self.start)

    def _read(self) -> Tensor:
        return self.weights.read(self.start, self.stop).clone()

    def _write(self, weight: Tensor) -> None:
        self.weights.weight.write(self.start, self.stop, weight)

    def _gradient(self) -> Tensor:
        """G' E at the weights as they are stored, float32 [stop - start, D]."""
        operand = self.weights.operand(self.start, self.stop)
        rows, columns = self.pairs
        out = operand.new_empty(self.stop - self.start, len(self.inputs))
        residual = self._residual(operand, self.inputs, columns, rows, out, None)
        return (residual @ self.inputs).float()
