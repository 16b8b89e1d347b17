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
    scores, true = planted(20000, 2)
    before = calibration_error(1 / (1 + np.exp(-scores)), true)
    after = calibration_error(found(scores).astype(float), true)
    assert before > 0.15 and after < 0.02
    at = np.array([-3.0, 0.0, 5.0])
    np.testing.assert_allclose(found(at), 1 / (1 + np.exp(1 - at / 3)), atol=0.05)
    grid = np.linspace(-99, 99, 1001).astype(np.float32)
    assert (np.diff(found(grid)) >= 0).all() and (found(grid) >= 0).all()
    again = Calibration.from_json(json.loads(json.dumps(found.to_json())), "calibration.json")
    assert np.array_equal(again(grid), found(grid))
    assert found(np.array([[-np.inf]])).shape == (1, 1)


@pytest.mark.parametrize(
    "content",
    [
        {}, {"scores": [], "probabilities": []}, {"scores": [0, 1], "probabilities": [0.5]},
        {"scores": [1, 0], "probabilities": [0, 1]}, {"scores": [0, 1], "probabilities": [0, 2]},
        {"scores": [0, 1], "probabilities": [1, 0]}, {"scores": "a", "probabilities": [1]},
        {"scores": [float("nan"), 1], "probabilities": [0, 1]},
    ],
)  # fmt: skip
def test_damaged_knots_are_refused(content: dict[str, object]) -> None:
    with pytest.raises(ReneeError, match=r"run/calibration.json is damaged.*again"):
        Calibration.from_json(content, "run/calibration.json")


def test_without_a_point_nothing_is_fitted() -> None:
    with pytest.raises(ReneeError, match="no validation points"):
        Calibration.fit(np.zeros(0), np.zeros(0))
