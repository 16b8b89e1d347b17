"""MetricSums against a brute force in pure Python, float64, to 1e-9."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from renee_ray.rank.batch import Ragged
from renee_ray.rank.collectives import Ranks
from renee_ray.scoring.metrics import CLASSES, KS, RECALL_KS, MetricSums, inverse_propensity
from renee_ray.scoring.scorer import Propensities
from renee_ray.xfc.labels import LabelRange

from .data.tiny import write_tiny

TOLERANCE = 1e-9


def brute_force(
    predicted: list[list[int]], true: list[set[int]], weight: dict[int, float]
) -> dict[str, float]:
    found: dict[str, float] = {}
    n = len(true)
    for k in KS:
        precision = ndcg = hits = best = dcg_hits = dcg_best = 0.0
        for row, labels in zip(predicted, true, strict=True):
            dcg = 0.0
            for rank, label in enumerate(row[:k], start=1):
                if label in labels:
                    precision += 1 / k
                    dcg += 1 / math.log2(rank + 1)
                    hits += weight[label]
                    dcg_hits += weight[label] / math.log2(rank + 1)
            if labels:
                ideal = (1 / math.log2(r + 1) for r in range(1, min(k, len(labels)) + 1))
                ndcg += dcg / sum(ideal)
            largest = sorted((weight[label] for label in labels), reverse=True)[:k]
            best += sum(largest)
            dcg_best += sum(w / math.log2(r + 1) for r, w in enumerate(largest, start=1))
        found[f"P@{k}"] = 100 * precision / n
        found[f"nDCG@{k}"] = 100 * ndcg / n
        found[f"PSP@{k}"] = 100 * hits / best
        found[f"PSnDCG@{k}"] = 100 * dcg_hits / dcg_best
    for k in RECALL_KS:
        shares = (
            len(labels & (set(row[:k]) - {-1})) / len(labels) if labels else 0.0
            for row, labels in zip(predicted, true, strict=True)
        )
        found[f"recall@{k}"] = 100 * sum(shares) / n
    return found


def random_case(
    seed: int, width: int = 12, first_id: int = 0, points: int = 60
) -> tuple[list[list[int]], list[set[int]], dict[int, float]]:
    """Short rows, points without labels, points with more labels than any of KS, tied weights."""
    rng = np.random.default_rng(seed)
    ids = [first_id + int(i) for i in range(25)]
    weight = {label: float(rng.choice([1.0, 1.5, 2.25, 7.0])) for label in ids}
    predicted, true = [], []
    for _ in range(points):
        row = [int(i) for i in rng.permutation(ids)[: rng.integers(0, width + 1)]]
        predicted.append(row + [-1] * (width - len(row)))
        true.append({int(i) for i in rng.permutation(ids)[: rng.integers(0, 9)]})
    true[0] = set()
    predicted[1] = [-1] * width
    return predicted, true, weight


def arrays(
    predicted: list[list[int]], true: list[set[int]], weight: dict[int, float]
) -> tuple[Any, ...]:
    shape = (len(predicted), len(predicted[0]) if predicted else 0)
    values = [label for labels in true for label in sorted(labels)]
    return (
        np.array(predicted, dtype=np.int64).reshape(shape),
        Ragged.of_lists([sorted(labels) for labels in true]),
        np.array([weight[label] for label in values], dtype=np.float64),
    )


def sums_of(*batch: Any) -> MetricSums:
    sums = MetricSums()
    sums.add(*batch)
    return sums


def assert_equal(found: dict[str, float], expected: dict[str, float]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=0, abs=TOLERANCE), name


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("width", [1, 2, 4, 12])
def test_equals_brute_force(seed: int, width: int) -> None:
    case = random_case(seed, width)
    assert_equal(sums_of(*arrays(*case)).metrics(), brute_force(*case))


@pytest.mark.parametrize("first_id", [2**24 - 5, 2**53 - 5, 2**63 - 26])
def test_neighbouring_large_ids_are_told_apart(first_id: int) -> None:
    case = random_case(3, first_id=first_id)
    assert_equal(sums_of(*arrays(*case)).metrics(), brute_force(*case))


def test_the_labels_of_a_point_need_not_be_sorted() -> None:
    predicted, true, weights = arrays(*random_case(5))
    offsets, unshuffled = true.offsets, sums_of(predicted, true, weights)
    reverse = np.concatenate(
        [np.arange(offsets[i + 1] - 1, offsets[i] - 1, -1) for i in range(len(predicted))]
    ).astype(np.int64)
    shuffled = sums_of(predicted, Ragged(true.values[reverse], offsets), weights[reverse])
    np.testing.assert_allclose(shuffled.vector, unshuffled.vector, rtol=1e-13)


def test_shards_sum_to_the_whole() -> None:
    predicted, true, weight = random_case(11)
    whole = sums_of(*arrays(predicted, true, weight))
    parts = [
        sums_of(*arrays(predicted[s], true[s], weight))
        for s in (slice(0, 7), slice(7, 7), slice(7, 41), slice(41, 60))
    ]
    reduced = MetricSums(np.sum([p.vector for p in parts], axis=0))
    assert_equal(reduced.metrics(), brute_force(predicted, true, weight))
    batches = MetricSums()
    for s in (slice(0, 30), slice(30, 60)):
        batches.add(*arrays(predicted[s], true[s], weight))
    np.testing.assert_allclose(batches.vector, whole.vector, rtol=1e-12)


def test_recall_by_class_of_labels() -> None:
    predicted, true, weight = random_case(7)
    batch = arrays(predicted, true, weight)
    place_of = {7.0: None, 2.25: 0, 1.5: 2, 1.0: 4}
    class_of = {label: place_of[value] for label, value in weight.items()}
    bounds = np.array([3.0, 2.0, 1.75, 1.25, 1.2])
    sums, parts = MetricSums(bounds=bounds), []
    sums.add(*batch)
    for cut in (slice(0, 23), slice(23, 60)):
        part = MetricSums(bounds=bounds)
        part.add(*arrays(predicted[cut], true[cut], weight))
        parts.append(part.vector)
    expected = {}
    for place, name in enumerate(CLASSES):
        pairs = [
            (label, i) for i, labels in enumerate(true) for label in labels
            if class_of[label] == place
        ]  # fmt: skip
        hits = sum(label in predicted[i][:5] for label, i in pairs)
        if pairs:
            expected[name] = {"labels": len(pairs), "recall@5": 100 * hits / len(pairs)}
    assert len(expected) == 3
    assert sums.by_frequency() == expected
    assert MetricSums(np.sum(parts, axis=0)).by_frequency() == expected
    assert MetricSums().by_frequency() == {}


@pytest.mark.parametrize("augmented", [False, True])
def test_an_inverse_propensity_tells_the_class_of_a_label(tmp_path: Path, augmented: bool) -> None:
    dataset = write_tiny(tmp_path)
    whole, points = LabelRange(0, 11, 11), 24 + 11 * augmented
    bounds = Propensities.read(dataset, whole, Ranks(), augmented=augmented).bounds
    manifest, counts = dataset.manifest, np.arange(300)
    a, b = manifest.propensity_a, manifest.propensity_b
    inverse = inverse_propensity(counts + augmented, points, a, b)
    expected = [
        next((i for i, (low, high) in enumerate(CLASSES.values()) if low <= n <= high), -1)
        for n in counts
    ]
    assert bounds is not None and {*expected} == {*range(-1, 5)}
    assert [int((each < bounds).sum()) - 1 for each in inverse] == expected


def test_hand_computed() -> None:
    """Point 0 finds label 2 second and never 1, point 1 its only label first, point 2 has none."""
    predicted = [[9, 2, -1], [3, 8, 7], [1, 2, 3]]
    found = sums_of(*arrays(predicted, [{1, 2}, {3}, set()], {1: 4.0, 2: 1.0, 3: 2.0})).metrics()
    second = 1 / math.log2(3)
    expected = {
        "P@1": 1 / 3,
        "P@3": (1 / 3 + 1 / 3) / 3,
        "P@5": (1 / 5 + 1 / 5) / 3,
        "nDCG@1": 1 / 3,
        "nDCG@3": (second / (1 + second) + 1) / 3,
        "PSP@1": 2 / (4 + 2),
        "PSP@3": (1 + 2) / (5 + 2),
        "PSnDCG@3": (second + 2) / (4 + second + 2),
        "recall@10": (1 / 2 + 1) / 3,
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(100 * value, rel=0, abs=TOLERANCE), name


def test_wrong_variants_are_outside_the_tolerance() -> None:
    predicted, true, weight = random_case(2)
    found = sums_of(*arrays(predicted, true, weight)).metrics()
    n = len(true)
    hits = [len(set(row[:5]) & labels) for row, labels in zip(predicted, true, strict=True)]
    by_label_count = sum(h / max(len(y), 1) for h, y in zip(hits, true, strict=True))
    skipping_empty = sum(h / 5 for h in hits) / sum(bool(y) for y in true)
    mean_of_ratios = 0.0
    for row, labels in zip(predicted, true, strict=True):
        best = sum(sorted((weight[label] for label in labels), reverse=True)[:5])
        mean_of_ratios += sum(weight[i] for i in row[:5] if i in labels) / best if best else 0.0
    for name, wrong in (
        ("P@5", by_label_count / n),
        ("P@5", skipping_empty),
        ("PSP@5", mean_of_ratios / n),
    ):
        assert abs(found[name] - 100 * wrong) > 1e3 * TOLERANCE, name


@pytest.mark.parametrize(
    ("predicted", "true"), [([], []), ([[1, -1]], [set()]), ([[], []], [{1}, set()])]
)
def test_nothing_to_count_is_zero(predicted: list[list[int]], true: list[set[int]]) -> None:
    sums = sums_of(*arrays(predicted, true, {1: 2.0}))
    assert set(sums.metrics().values()) == {0.0}
    assert sums.points == len(true)


def test_inverse_propensity() -> None:
    counts = [0, 1, 7, 2000]
    n, a, b = 42_886, 0.55, 1.5
    c = (math.log(n) - 1) * (b + 1) ** a
    expected = [1 + c * math.exp(-a * math.log(count + b)) for count in counts]
    np.testing.assert_allclose(inverse_propensity(np.array(counts), n, a, b), expected, rtol=1e-13)
    assert inverse_propensity([0, 1], 1, a, b).min() == 1.0
