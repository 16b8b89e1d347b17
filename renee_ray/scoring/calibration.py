"""Calibration: how far scores are probabilities, and a monotone map that makes them so.

For pairs of a score s and whether its label is true, y in {0, 1}, with p a probability of s, the
expected calibration error over the BINS equal bins b of [0, 1] (Guo et al., ICML 2017) is

    ECE = sum over b of n_b / n |mean of y in b - mean of p in b|

The map is isotonic regression: of all functions that never fall, that of least squares. It is a
list of knots, between which it is linear and beyond which it is constant. Platt scaling, a sigmoid
of a s + b, is left out, since its errors are no smaller (docs/log.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from renee_ray.errors import ReneeError

Floats = NDArray[np.float64]
BINS = 15
TOP = 5
"""Best labels of each point whose probabilities are looked at."""


@dataclass(frozen=True)
class Calibration:
    """Knots of a map of scores to probabilities: `scores` float64 [m] ascend, so do the others."""

    scores: Floats
    probabilities: Floats

    def __call__(self, scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """Returns the probabilities of scores, of the same shape; -inf becomes the least."""
        return np.interp(scores, self.scores, self.probabilities).astype(np.float32)

    @classmethod
    def fit(cls, scores: Floats, true: Floats) -> Calibration:
        """Fits pairs [n].

        Raises:
            ReneeError: scikit-learn is not installed, or there is no pair.
        """
        if not len(scores):
            raise ReneeError("there are no validation points to calibrate with; convert with more")
        try:
            from sklearn.isotonic import IsotonicRegression
        except ImportError:
            raise ReneeError(
                "calibrate=true needs scikit-learn; install renee_ray[quickstart], which has it"
            ) from None
        fitted = IsotonicRegression(y_min=0, y_max=1).fit(scores, true)
        return cls(fitted.X_thresholds_.astype(float), fitted.y_thresholds_.astype(float))

    def to_json(self) -> dict[str, Any]:
        return {"scores": self.scores.tolist(), "probabilities": self.probabilities.tolist()}

    @classmethod
    def from_json(cls, content: dict[str, Any], where: str) -> Calibration:
        """Reverses `to_json`. Raises ReneeError where the knots are none."""
        try:
            found = cls(*(np.array(content[key], float) for key in ("scores", "probabilities")))
            within = (found.probabilities >= 0).all() and (found.probabilities <= 1).all()
            rising = all((np.diff(each) >= 0).all() for each in (found.scores, found.probabilities))
            if within and rising and found.scores.shape == found.probabilities.shape != (0,):
                return found
        except (KeyError, TypeError, ValueError):
            pass
        raise ReneeError(f"{where} is damaged: it has no knots; calibrate the run again")


def calibration_error(probabilities: Floats, true: Floats) -> float:
    """Returns the ECE of n pairs; 0 of none."""
    bins = np.minimum((probabilities * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, true - probabilities, minlength=BINS)
    return float(np.abs(gaps).sum() / max(1, len(true)))
