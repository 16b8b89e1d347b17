"""Calibration: how far scores are probabilities, and a map that makes them so.

For pairs of a score s and whether its label is true, y in {0, 1}, with p a probability of s, the
expected calibration error over the BINS equal bins b of [0, 1] (Guo et al., ICML 2017) is

    ECE = sum over b of n_b / n |mean of y in b - mean of p in b|

The map is Platt scaling, p = sigmoid(slope s + intercept), of the greatest likelihood. Isotonic
regression is no better with thousands of points, and worse with few (docs/log.md, 2026-11-28).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit

from renee_ray.errors import ReneeError

Floats = NDArray[np.float64]
BINS = 15
TOP = 5
"""Best labels of each point whose probabilities are looked at."""


@dataclass(frozen=True)
class Calibration:
    """The probability of a score s: sigmoid(slope s + intercept)."""

    slope: float
    intercept: float

    def __call__(self, scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """Returns the probabilities of scores, of the same shape."""
        return np.asarray(expit(self.slope * scores + self.intercept), np.float32)

    @classmethod
    def fit(cls, scores: Floats, true: Floats) -> Calibration:
        """Fits pairs [n], with Platt's targets, which are finite logits if all labels are true.

        Raises:
            ReneeError: there is no pair.
        """
        if not len(scores):
            raise ReneeError("there are no validation points to calibrate with; convert with more")
        hits = true.sum()
        wanted = np.where(true > 0, (hits + 1) / (hits + 2), 1 / (len(true) - hits + 2))

        def loss(at: Floats) -> tuple[float, Floats]:
            z = at[0] * scores + at[1]
            slope = expit(z) - wanted
            value = np.logaddexp(0, z).sum() - z @ wanted
            return value, np.array([slope @ scores, slope.sum()])

        found = minimize(loss, [1.0, 0.0], jac=True, bounds=[(0, None), (None, None)])
        return cls(*map(float, found.x))

    def to_json(self) -> dict[str, float]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any], where: str) -> Calibration:
        """Reverses `to_json`. Raises ReneeError where there are no such numbers."""
        values = [content.get(key) for key in ("slope", "intercept")]
        found = [float(v) for v in values if isinstance(v, int | float) and math.isfinite(v)]
        if len(found) == 2:
            return cls(*found)
        raise ReneeError(f"{where} is damaged: slope and intercept are no numbers; calibrate again")


def calibration_error(probabilities: Floats, true: Floats) -> float:
    """Returns the ECE of n pairs; 0 of none."""
    bins = np.minimum((probabilities * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, true - probabilities, minlength=BINS)
    return float(np.abs(gaps).sum() / max(1, len(true)))
