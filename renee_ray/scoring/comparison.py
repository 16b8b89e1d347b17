"""Whether models differ: metrics with confidence intervals, by a bootstrap over points.

Every metric of scoring/metrics.py is 100 times a ratio of sums over n points. Ledger, M metrics:

    numerator, denominator   [M, n]   float64   what each point adds above and below the line

A sample draws n points with replacement: point i counts w_i times, and a metric of the sample is

    100 (sum over i of w_i numerator_i) / (sum over i of w_i denominator_i)

All models are sampled with the same w, so that the difference of two is a paired one: what makes a
point hard for both does not count. (Koehn, EMNLP 2004, has the test for translation.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from renee_ray.rank.batch import Ragged
from renee_ray.scoring.metrics import CLASS_K, CLASSES, METRICS, point_terms

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

SAMPLES = 2000
BLOCK = 1 << 22
"""Most weights of samples in memory at once."""
LEVEL = 0.05
SHOWN = ("P@1", "P@5", "nDCG@5", "PSP@1", "PSP@5", "recall@10", "recall@100")


@dataclass(frozen=True)
class Terms:
    """What each point adds to each metric, for one model."""

    names: tuple[str, ...]
    numerator: Floats
    denominator: Floats

    @classmethod
    def of(
        cls, predicted: Ints, true: Ragged, inverse_propensity: Floats, bounds: Floats | None
    ) -> Terms:
        """Computes SHOWN, and recall@5 by frequency.

        Args:
            predicted: [n, K] label ids, best first, -1 for none.
            inverse_propensity: [m], of each true label; bounds: as of `MetricSums`.
        """
        terms = point_terms(predicted, true, inverse_propensity, bounds)
        names = (*METRICS, *(f"recall@{CLASS_K}, labels of {name}" for name in CLASSES))
        shown = [name in SHOWN or i >= len(METRICS) for i, name in enumerate(names)]
        kept = np.flatnonzero(shown & terms[1].any(axis=1))
        return cls(tuple(names[i] for i in kept), *terms[:, kept])

    def values(self) -> Floats:
        """Returns the metrics in percent, float64 [M]."""
        return np.asarray(100 * self.numerator.sum(1) / self.denominator.sum(1))


@dataclass(frozen=True)
class Comparison:
    """Metrics of several models on the same points; the first one is what others are compared with.

    values [models, M]; low, high [models, M]: bounds of the 95% confidence interval of a value;
    difference_low, difference_high [models, M]: those of the difference to the first model;
    p [models, M]: of the paired bootstrap test that there is no difference, at least 2 / (S + 1).
    """

    names: tuple[str, ...]
    values: Floats
    low: Floats
    high: Floats
    difference_low: Floats
    difference_high: Floats
    p: Floats

    def differ(self, model: int) -> list[str]:
        """Names the metrics in which a model differs from the first, by Holm's correction at 5%."""
        order = np.argsort(self.p[model], kind="stable")
        found = []
        for place, metric in enumerate(order):
            if self.p[model, metric] > LEVEL / (len(order) - place):
                break
            found.append(metric)
        return [self.names[metric] for metric in sorted(found)]


def compare(models: Sequence[Terms], seed: int = 0, samples: int = SAMPLES) -> Comparison:
    """Compares models by `samples` bootstrap samples, the same for all of them."""
    n = models[0].numerator.shape[1]
    generator = np.random.default_rng(seed)
    drawn = []
    for first in range(0, samples, step := max(1, BLOCK // n)):
        size = min(step, samples - first)
        places = generator.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
        weights = np.bincount(places.ravel(), minlength=size * n).reshape(size, n).astype(float)
        below = [weights @ model.denominator.T for model in models]
        above = [weights @ model.numerator.T for model in models]
        with np.errstate(invalid="ignore"):  # a sample may have no label of a class
            drawn.append([100 * a / b for a, b in zip(above, below, strict=True)])
    found = np.concatenate(drawn, axis=1)  # [models, samples, M]
    difference = found - found[:1]
    bounds = 100 * LEVEL / 2, 100 * (1 - LEVEL / 2)
    low, high = np.nanpercentile(found, bounds, axis=1)
    difference_low, difference_high = np.nanpercentile(difference, bounds, axis=1)
    # A sample without a label of a class, NaN, speaks for neither side.
    side = np.minimum((~(difference > 0)).sum(1), (~(difference < 0)).sum(1))
    p = np.minimum(1.0, 2 * (side + 1) / (samples + 1))
    values = np.stack([model.values() for model in models])
    return Comparison(models[0].names, values, low, high, difference_low, difference_high, p)
