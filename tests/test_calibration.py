"""Calibration against brute force, and on scores whose probabilities are known."""

from __future__ import annotations

import json

import numpy as np
import pytest

from renee_ray.errors import ReneeError
from renee_ray.scoring.calibration import BINS, Calibration, calibration_error


def planted(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores of a model that is too sure: labels are true with probability sigmoid(s / 3 - 1)."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(0, 4, n)
    return scores, (rng.random(n) < 1 / (1 + np.exp(1 - scores / 3))).astype(float)


def test_the_error_equals_a_brute_force() -> None:
    rng = np.random.default_rng(0)
    p = np.concatenate([rng.random(500) ** 3, [0.0, 1.0]])
    y = (rng.random(502) < 0.3).astype(float)
    expected = 0.0
    for low in range(BINS):
        inside = [i for i in range(502) if min(int(p[i] * BINS), BINS - 1) == low]
        if inside:
            gap = sum(y[i] for i in inside) / len(inside) - sum(p[i] for i in inside) / len(inside)
            expected += len(inside) / 502 * abs(gap)
    assert calibration_error(p, y) == pytest.approx(expected, abs=1e-12)
    assert calibration_error(np.zeros(0), np.zeros(0)) == 0


def test_a_fitted_map_finds_planted_probabilities() -> None:
    found = Calibration.fit(*planted(20000, 1))
    assert (found.slope, found.intercept) == pytest.approx((1 / 3, -1), abs=0.05)
    scores, true = planted(20000, 2)
    assert calibration_error(1 / (1 + np.exp(-scores)), true) > 0.15
    assert calibration_error(found(scores).astype(float), true) < 0.02
    again = Calibration.from_json(json.loads(json.dumps(found.to_json())), "calibration.json")
    assert np.array_equal(again(scores), found(scores))
    assert found(np.array([[-np.inf, 9e9]], np.float32)).tolist() == [[0, 1]]


@pytest.mark.parametrize("true", [0.0, 1.0])
def test_labels_that_are_all_alike_give_finite_numbers(true: float) -> None:
    found = Calibration.fit(np.arange(9.0), np.full(9, true))
    assert np.abs(found(np.arange(9.0)) - true).max() < 0.2


@pytest.mark.parametrize(
    "content",
    [{}, {"slope": 1}, {"slope": "1", "intercept": 0}, {"slope": 1, "intercept": float("nan")}],
)
def test_what_is_damaged_is_refused(content: dict[str, object]) -> None:
    with pytest.raises(ReneeError, match=r"run/calibration.json is damaged.*again"):
        Calibration.from_json(content, "run/calibration.json")


def test_without_a_point_nothing_is_fitted() -> None:
    with pytest.raises(ReneeError, match="no validation points"):
        Calibration.fit(np.zeros(0), np.zeros(0))
