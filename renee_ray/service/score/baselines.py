"""Predictors that take seconds, for judging a trained model on the same points.

All take the points' filter labels in CSR form (`filter_offsets` int64 [n + 1], `filter_values`
int64 [f]: point i must not be given filter_values[filter_offsets[i] : filter_offsets[i + 1]]) and
remove them before the cut, so that k labels remain wherever a point has k others. They return int64
[n, k], best first, -1 where none is left; equal scores come in ascending order of the id.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

BLOCK_ELEMENTS = 2**22
"""Elements of the largest temporary: scores or flags of a block of points."""


def most_frequent(
    train_count: Ints, filter_offsets: Ints, filter_values: Ints, n: int, k: int
) -> Ints:
    """Predicts the k labels with the most training points for all n points, but for filters.

    train_count: int64 [L], training points of each label. Raises ValueError if the offsets are not
    those of n points.
    """
    _check_offsets(filter_offsets, filter_values, n)
    filters = np.diff(filter_offsets)
    # A point's filter labels push out at most that many of the labels ahead of its k.
    num_candidates = min(len(train_count), k + int(filters.max(initial=0)))
    by_count = np.argsort(-train_count, kind="stable")
    place = np.empty_like(by_count)
    place[by_count] = np.arange(len(by_count))

    found = np.full((n, k), -1, dtype=np.int64)
    for start, stop in _blocks(n, num_candidates):
        point, label = _filters_of(filter_offsets, filter_values, start, stop)
        near = place[label] < num_candidates
        banned = np.zeros((stop - start, num_candidates), dtype=bool)
        banned[point[near], place[label[near]]] = True
        order = np.argsort(banned, axis=1, kind="stable")[:, :k]
        labels = np.where(np.take_along_axis(banned, order, axis=1), -1, by_count[order])
        found[start:stop, : labels.shape[1]] = labels
    return found


def nearest_label_text(
    point_embeddings: Floats,
    label_embeddings: Floats,
    filter_offsets: Ints,
    filter_values: Ints,
    k: int,
) -> Ints:
    """Predicts the k labels whose texts' embeddings have the largest cosine with the point's.

    point_embeddings: float32 [n, D]; label_embeddings: float32 [L, D]; neither need be normalised.
    Points go in blocks, so that scores of all points and labels never exist together. Raises
    ValueError if the offsets are not those of n points.
    """
    points, labels = _unit_rows(point_embeddings), _unit_rows(label_embeddings)
    return _largest_products(points, labels, filter_offsets, filter_values, k)


def tfidf_ridge(
    texts: Sequence[str],
    labels: sp.csr_matrix,
    points: Sequence[str],
    filter_offsets: Ints,
    filter_values: Ints,
    k: int,
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
    return _largest_products(kernel, weights, filter_offsets, filter_values, k)


def _largest_products(
    points: Floats, labels: Floats, filter_offsets: Ints, filter_values: Ints, k: int
) -> Ints:
    n, num_labels = len(points), len(labels)
    _check_offsets(filter_offsets, filter_values, n)
    found = np.full((n, k), -1, dtype=np.int64)
    for start, stop in _blocks(n, num_labels):
        scores = points[start:stop] @ labels.T
        scores[_filters_of(filter_offsets, filter_values, start, stop)] = -np.inf
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        kept = np.isfinite(np.take_along_axis(scores, order, axis=1))
        found[start:stop, : order.shape[1]] = np.where(kept, order, -1)
    return found


def _blocks(n: int, width: int) -> Iterator[tuple[int, int]]:
    """Yields [start, stop) of blocks of rows whose [rows, width] has about BLOCK_ELEMENTS."""
    rows = max(1, BLOCK_ELEMENTS // max(width, 1))
    for start in range(0, n, rows):
        yield start, min(start + rows, n)


def _filters_of(offsets: Ints, values: Ints, start: int, stop: int) -> tuple[Ints, Ints]:
    """Returns (row within the block, label) of each filter label of points [start, stop)."""
    point = np.repeat(np.arange(stop - start), np.diff(offsets[start : stop + 1]))
    return point, values[offsets[start] : offsets[stop]]


def _unit_rows(matrix: Floats) -> Floats:
    """Divides rows by their length; a zero row stays zero."""
    length = np.linalg.norm(matrix, axis=1, keepdims=True)
    return matrix / np.maximum(length, np.finfo(np.float32).tiny)


def _check_offsets(offsets: Ints, values: Ints, n: int) -> None:
    if len(offsets) != n + 1 or offsets[0] != 0 or offsets[-1] != len(values):
        raise ValueError(f"filter offsets do not divide {len(values)} labels among {n} points")
