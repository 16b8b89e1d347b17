"""Fusion: the weighted sum of several models' probabilities for the labels that they predict.

With p_m(l) the probability that model m gives label l of a point, and 0 where l is not among its
predictions of the point:

    score(l) = sum over m of w_m p_m(l)

Models that err differently, as one of words and one of meaning, gain by it; a sum of logits would
let the most confident model decide alone.

Ledger, for n points, M models, and q different pairs of a point and a predicted label:

    point, label    [q]       int64     sorted by point, then by label
    probabilities   [q, M]    float64
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from renee_ray.rank.batch import Ragged

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
STEPS = 20
"""Weights that are tried are multiples of one STEPS-th."""
ROUNDS = 4


@dataclass(frozen=True)
class Pairs:
    """The pairs of a point and a label that any of M models predicts."""

    num_points: int
    point: Ints
    label: Ints
    probabilities: Floats

    @classmethod
    def of(cls, models: Sequence[tuple[Ragged, Floats]]) -> Pairs:
        """Joins each model's labels of n points, and their probabilities float64 [m]."""
        point = np.concatenate([labels.pairs()[0] for labels, _ in models])
        label = np.concatenate([labels.values for labels, _ in models])
        model = np.repeat(np.arange(len(models)), [len(values) for _, values in models])
        width = int(label.max(initial=0)) + 1
        keys, place = np.unique(point * width + label, return_inverse=True)
        found = np.zeros((len(keys), len(models)))
        found[place, model] = np.concatenate([values for _, values in models])
        return cls(len(models[0][0]), keys // width, keys % width, found)

    def best(self, weights: Floats, k: int) -> tuple[Ragged, Floats]:
        """Returns each point's k best labels, best first, and their scores float64 [m].

        Of labels with equal scores the one with the smaller id comes first.
        """
        scores = self.probabilities @ weights
        order = np.lexsort((self.label, -scores, self.point))
        starts = np.searchsorted(self.point, np.arange(self.num_points + 1))
        kept = order[np.arange(len(order)) - starts[self.point] < k]
        counts = np.minimum(np.diff(starts), k)
        offsets = np.concatenate([[0], np.cumsum(counts)])
        return Ragged(self.label[kept], offsets), scores[kept]


def tuned(num_models: int, quality: Callable[[Floats], float]) -> Floats:
    """Finds weights, float64 [M] with sum 1, of the greatest quality, one model at a time.

    Begins with equal weights, and changes none for an equal quality.
    """
    weights = np.full(num_models, 1 / num_models)
    best = quality(weights)
    for _ in range(ROUNDS):
        before = best
        for model in range(num_models):
            for share in np.arange(STEPS + 1) / STEPS:
                others = np.delete(weights, model).sum()
                if not others:
                    continue
                tried = weights * (1 - share) / others
                tried[model] = share
                if (found := quality(tried)) > best:
                    weights, best = tried, found
        if best == before:
            break
    return weights
