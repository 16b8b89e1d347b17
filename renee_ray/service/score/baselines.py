"""Predictors that take seconds, for judging a trained model on the same points.

All remove the filter labels of the n points before the cut, so that k labels remain wherever a
point has k others. They return int64 [n, k], best first, -1 where none is left; equal scores come
in ascending order of the id.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from renee_ray.parallel.batch import Ragged

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.floating[Any]]

BLOCK_ELEMENTS = 2**22
"""Elements of the largest temporary: scores of a block of points."""


def most_frequent(train_count: Ints, filters: Ragged, k: int) -> Ints:
    """Predicts the k labels with the most training points for all n points, but for filters.

    train_count: int64 [L], training points of each label.
    """
    counts = train_count.astype(np.float64)[:, None]
    return _largest_products(np.ones((len(filters), 1)), counts, filters, k)


def nearest_label_text(points: Floats, labels: Floats, filters: Ragged, k: int) -> Ints:
    """Predicts the k labels whose texts' embeddings have the largest cosine with the point's.

    points: float32 [n, D]; labels: float32 [L, D]; neither need be normalised.
    Points go in blocks, so that scores of all points and labels never exist together.
    """
    return _largest_products(_unit_rows(points), _unit_rows(labels), filters, k)


def tfidf_ridge(
    texts: Sequence[str], labels: sp.csr_matrix, points: Sequence[str], filters: Ragged, k: int
) -> Ints:
    """Predicts by a linear model: ridge regression, one-vs-rest, on TF-IDF of words and pairs.

    It is solved in the kernel form, as there are fewer texts than features: 8 m (m + L) bytes.

    Args:
        texts: m texts to train on; labels: [m, L], 1 where a label is true; points: n texts.

    scikit-learn must be installed.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.kernel_ridge import KernelRidge

    features = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2))
    trained = features.fit_transform(texts)
    weights = KernelRidge(alpha=1.0).fit(trained, labels.toarray()).dual_coef_.T
    kernel = (features.transform(points) @ trained.T).toarray()
    return _largest_products(kernel, weights, filters, k)


def _largest_products(points: Floats, labels: Floats, filters: Ragged, k: int) -> Ints:
    found = np.full((len(points), k), -1, dtype=np.int64)
    rows = max(1, BLOCK_ELEMENTS // max(len(labels), 1))
    for start in range(0, len(points), rows):
        scores = points[start : start + rows] @ labels.T
        scores[filters.take(np.arange(start, start + len(scores))).pairs()] = -np.inf
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        kept = np.isfinite(np.take_along_axis(scores, order, axis=1))
        found[start : start + rows, : order.shape[1]] = np.where(kept, order, -1)
    return found


def _unit_rows(matrix: Floats) -> Floats:
    """Divides rows by their length; a zero row stays zero."""
    length = np.linalg.norm(matrix, axis=1, keepdims=True)
    return matrix / np.maximum(length, np.finfo(np.float32).tiny)
