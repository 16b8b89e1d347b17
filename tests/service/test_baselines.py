"""Baselines against pure Python."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import scipy.sparse as sp

from renee_ray.rank.batch import Ragged
from renee_ray.service.quickstart import most_frequent, nearest_label_text, tfidf_ridge

NUM_LABELS, POINTS = 23, 40


def random_filters(seed: int) -> tuple[list[set[int]], Ragged]:
    """Filters of each point: none, some, and all labels but three."""
    rng = np.random.default_rng(seed)
    filters = [set(map(int, rng.permutation(NUM_LABELS)[: i % 5])) for i in range(POINTS - 1)]
    filters.append(set(range(NUM_LABELS)) - {2, 7, 20})
    return filters, Ragged.of_lists([sorted(labels) for labels in filters])


def best_first(scores: list[float], banned: set[int], k: int) -> list[int]:
    allowed = [label for label in range(len(scores)) if label not in banned]
    best = sorted(allowed, key=lambda label: (-scores[label], label))[:k]
    return best + [-1] * (k - len(best))


@pytest.mark.parametrize("k", [1, 5, NUM_LABELS + 2])
def test_most_frequent_equals_brute_force(k: int) -> None:
    count = np.random.default_rng(1).integers(0, 6, NUM_LABELS)
    filters, ragged = random_filters(0)
    expected = [best_first(count.tolist(), banned, k) for banned in filters]
    found = most_frequent(count, ragged, k)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, expected)
    # Filtering after the cut is the mistake that this must not make.
    late = [[i for i in best_first(count.tolist(), set(), k) if i not in f] for f in filters]
    assert any(len(row) < k for row in late) and (found[:-1, : min(k, 18)] >= 0).all()


@pytest.mark.parametrize("k", [1, 5, NUM_LABELS + 2])
def test_nearest_label_text_equals_brute_force(k: int) -> None:
    rng = np.random.default_rng(2)
    points = rng.normal(size=(POINTS, 6)).astype(np.float32)
    labels = (rng.normal(size=(NUM_LABELS, 6)) * rng.uniform(0.1, 9, (NUM_LABELS, 1))).astype(
        np.float32
    )
    filters, ragged = random_filters(3)
    expected = []
    for point, banned in zip(points.tolist(), filters, strict=True):
        cosine = [
            sum(a * b for a, b in zip(point, label, strict=True)) / math.hypot(*label)
            for label in labels.tolist()
        ]
        expected.append(best_first(cosine, banned, k))
    found = nearest_label_text(points, labels, ragged, k)
    np.testing.assert_array_equal(found, expected)
    product = points @ labels.T
    cosine_best = (product / np.linalg.norm(labels, axis=1)).argmax(axis=1)
    assert (product.argmax(axis=1) != cosine_best).any()  # normalising matters on this data


def test_zero_embedding_and_no_points() -> None:
    zero, units = np.zeros((1, 3), np.float32), np.eye(3, dtype=np.float32)
    found = nearest_label_text(zero, units, Ragged.of_lists([[]]), 2)
    np.testing.assert_array_equal(found, [[0, 1]])
    assert most_frequent(np.ones(3, np.int64), Ragged.of_lists([]), 2).shape == (0, 2)


def test_tfidf_ridge_equals_its_primal_solution() -> None:
    """TF-IDF by hand, and the normal equations of all features where the code has a kernel."""
    texts = ["red car", "red bus", "blue car", "old blue bus bus", "car"]
    true = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 1], [0, 1, 1], [0, 0, 0]], dtype=np.float64)
    points = ["blue bus", "red red car", "unknown"]

    def terms(text: str) -> list[str]:
        words = text.split()
        return words + [" ".join(pair) for pair in pairwise(words)]

    known = sorted({term for text in texts for term in terms(text)})
    idf = [math.log(6 / (1 + sum(t in terms(x) for x in texts))) + 1 for t in known]

    def row(text: str) -> np.ndarray:
        counts = [terms(text).count(term) for term in known]
        tf = [(1 + math.log(n)) * w if n else 0.0 for n, w in zip(counts, idf, strict=True)]
        return np.array(tf) / max(1e-12, math.hypot(*tf))

    x = np.array([row(text) for text in texts])
    weights = np.linalg.solve(x.T @ x + np.eye(len(known)), x.T @ true)
    scores = np.array([row(text) for text in points]) @ weights
    filters = [{2}, set(), {0}]
    ragged = Ragged.of_lists([[2], [], [0]])
    expected = [best_first(s, f, 2) for s, f in zip(scores.tolist(), filters, strict=True)]
    found = tfidf_ridge(texts, sp.csr_matrix(true), points, ragged, 2)
    np.testing.assert_array_equal(found, expected)
