"""Comparison of models: metrics as sums over points, intervals and tests by the bootstrap."""

from __future__ import annotations

import numpy as np
import pytest

from renee_ray.rank.batch import Ragged
from renee_ray.scoring.comparison import Terms, compare
from renee_ray.scoring.metrics import MetricSums

POINTS, LABELS, K = 600, 300, 120


def planted(seed: int, skill: float, truth: int = 0) -> tuple[Terms, MetricSums]:
    """Terms and metrics of predictions that begin with each true label by the chance `skill`."""
    of_truth, random = np.random.default_rng(truth), np.random.default_rng(seed)
    true = [of_truth.choice(LABELS, of_truth.integers(1, 6), replace=False) for _ in range(POINTS)]
    counts = of_truth.geometric(0.1, LABELS)
    predicted = np.empty((POINTS, K), dtype=np.int64)
    for row, labels in zip(predicted, true, strict=True):
        first = labels[random.random(len(labels)) < skill]
        others = np.setdiff1d(random.permutation(LABELS), labels, assume_unique=True)
        row[:] = [*first, *random.permutation(others)][:K]
    values = np.concatenate(true)
    ragged = Ragged(values, np.concatenate([[0], np.cumsum([len(labels) for labels in true])]))
    inverse = 1 + 5 * (counts[values] + 1.5) ** -0.55
    sums = MetricSums()
    sums.add(predicted, ragged, inverse)
    bounds = 1 + 5 * (np.array([1, 2, 6, 21, 101]) - 0.5 + 1.5) ** -0.55
    return Terms.of(predicted, ragged, inverse, bounds), sums


def test_the_values_are_the_metrics() -> None:
    terms, sums = planted(1, 0.5)
    found, metrics = dict(zip(terms.names, terms.values(), strict=True)), sums.metrics()
    shared = {"P@1", "P@5", "nDCG@5", "PSP@1", "PSP@5", "recall@10", "recall@100"}
    assert shared <= found.keys()
    for name in shared:
        assert found[name] == pytest.approx(metrics[name], rel=1e-12), name


def test_frequency_classes_divide_the_true_pairs_that_are_found() -> None:
    terms = planted(2, 0.5)[0]
    rows = [i for i, name in enumerate(terms.names) if name.startswith("recall@5,")]
    assert len(rows) >= 3
    hits = terms.numerator[terms.names.index("P@5")] * 5
    assert terms.numerator[rows].sum(axis=0) == pytest.approx(hits)
    found = terms.numerator[terms.names.index("recall@10")] > 0
    assert (terms.denominator[rows].sum(axis=0)[found] >= 1).all()


def test_equal_models_do_not_differ_and_better_ones_do() -> None:
    same, other, better = (
        planted(seed, skill)[0] for seed, skill in ((1, 0.5), (2, 0.5), (3, 0.7))
    )
    found = compare([same, other, better, same])
    assert found.differ(1) == []
    assert {"P@1", "P@5", "nDCG@5", "PSP@5"} <= set(found.differ(2))
    assert found.differ(3) == [] and (found.p[3] == 1).all()
    assert (found.low <= found.values).all() and (found.values <= found.high).all()
    assert (found.difference_low[2, 0] > 0) and found.p[2, 0] < 0.01


def test_an_interval_is_that_of_the_normal_approximation() -> None:
    terms = planted(1, 0.5)[0]
    found, row = compare([terms, terms]), terms.names.index("P@5")
    error = 100 * terms.numerator[row].std() / np.sqrt(POINTS)
    assert found.high[0, row] - found.low[0, row] == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_differences_are_paired() -> None:
    """Two models that err on the same points differ surely, though their intervals overlap."""
    terms = planted(1, 0.5)[0]
    worse = Terms(terms.names, terms.numerator.copy(), terms.denominator)
    row = terms.names.index("P@1")
    right = np.flatnonzero(worse.numerator[row])[:12]
    worse.numerator[row, right] = 0
    found = compare([terms, worse])
    assert found.low[0, row] < found.high[1, row]
    assert found.differ(1) == ["P@1"]


def test_the_level_holds_where_nothing_differs() -> None:
    """Of pairs of models of the same skill, few are said to differ: 5%, not each metric's 5%."""
    pairs = [(planted(2 * i, 0.5)[0], planted(2 * i + 1, 0.5)[0]) for i in range(1, 11)]
    assert sum(bool(compare(pair).differ(1)) for pair in pairs) <= 2
