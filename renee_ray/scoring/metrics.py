"""Ranking metrics of extreme classification, as sums that add up across batches and ranks.

Ledger, n points, K predictions a point, m true labels altogether, in CSR form:

    name                          shape    dtype    meaning
    predicted                     [n, K]   int64    label ids, best first, -1 = none (short row)
    labels_values                 [m]      int64    true labels of all points, point after point
    labels_offsets                [n + 1]  int64    point i has values[offsets[i] : offsets[i + 1]]
    predicted_inverse_propensity  [n, K]   float64  1/p of each prediction, read only at hits
    label_inverse_propensity      [m]      float64  1/p of each true label

With y the true labels of a point, hit(r) = 1 if the prediction at rank r = 1, 2, ... is in y and
0 otherwise, w the inverse propensity and d(r) = 1 / log2(r + 1):

    P@k       mean over points of  sum_{r<=k} hit(r) / k
    nDCG@k    mean over points of  sum_{r<=k} hit(r) d(r)  /  sum_{r<=min(k,|y|)} d(r)
    recall@k  mean over points of  sum_{r<=k} hit(r) / |y|
    PSP@k     sum over points of   sum_{r<=k} hit(r) w(r)       /  the same sum, best attainable
    PSnDCG@k  sum over points of   sum_{r<=k} hit(r) w(r) d(r)  /  the same sum, best attainable

The best attainable ranks a point's true labels by w, largest first. PSP and PSnDCG are thus ratios
of two sums over all points, never means of ratios. A point without a true label counts as a point
and adds zero everywhere (0/0 := 0). Comparison with other evaluators: docs/metrics.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from renee_ray.errors import ReneeError

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

KS = (1, 3, 5)
RECALL_KS = (10, 100)
BY_TAIL = ("P@1", "PSP@5", "recall@100")
"""Their sum chooses the logit adjustment: the first place, rare labels, and the whole list."""

# Rows of MetricSums.at_k.
_HITS, _NDCG, _PS_HITS, _PS_BEST, _PSDCG_HITS, _PSDCG_BEST = range(6)


def best_tail(table: Iterable[Mapping[str, float]]) -> float:
    """Returns the "tail" of the row with the largest sum of BY_TAIL; of equal ones the least."""
    return max(table, key=lambda row: (sum(row[name] for name in BY_TAIL), -row["tail"]))["tail"]


def inverse_propensity(train_count: npt.ArrayLike, num_points: int, a: float, b: float) -> Floats:
    """1/p_l = 1 + C (N_l + b)^-a with C = (ln N - 1)(b + 1)^a (Jain et al., KDD 2016).

    train_count: ints, any shape: N_l, training points of each label, unaugmented (a range of all
    labels is enough); num_points: N, training points. Returns float64 of the same shape, >= 1:
    below three points, where C would be negative, C is 0.

    Raises:
        ReneeError: b is 0 and a label has no training point, so that 1/p is infinite.
    """
    count = np.asarray(train_count, dtype=np.float64)
    if b == 0 and bool((count == 0).any()):
        raise ReneeError(
            "propensity_b is 0 and a label has no training point, which makes its inverse "
            "propensity infinite; convert with propensity_b > 0"
        )
    c = max(np.log(max(num_points, 1)) - 1.0, 0.0) * (b + 1.0) ** a
    return np.asarray(1.0 + c * (count + b) ** -a)


@dataclass
class MetricSums:
    """Sums of one or more batches; adding those of all ranks gives the metrics of the whole."""

    ks: tuple[int, ...]
    """Cut-offs of P, nDCG, PSP and PSnDCG."""
    recall_ks: tuple[int, ...]
    """Cut-offs of recall."""
    points: float
    """Points counted, those without a true label included."""
    at_k: Floats
    """[6, len(ks)]: hits/k, nDCG, then hits and best attainable of PSP and of PSnDCG."""
    recall: Floats
    """[len(recall_ks)]"""

    @classmethod
    def zeros(cls, ks: tuple[int, ...] = KS, recall_ks: tuple[int, ...] = RECALL_KS) -> MetricSums:
        """The sums of no point. Raises ValueError if a cut-off is below 1."""
        if min((*ks, *recall_ks), default=1) < 1:
            raise ValueError(f"cut-offs must be at least 1: {ks}, {recall_ks}")
        return cls(
            tuple(ks), tuple(recall_ks), 0.0, np.zeros((6, len(ks))), np.zeros(len(recall_ks))
        )

    @classmethod
    def from_vector(
        cls,
        vector: npt.ArrayLike,
        ks: tuple[int, ...] = KS,
        recall_ks: tuple[int, ...] = RECALL_KS,
    ) -> MetricSums:
        """Reverses `vector`, also of a sum over ranks."""
        flat = np.array(vector, dtype=np.float64)
        split = 1 + 6 * len(ks)
        if flat.shape != (split + len(recall_ks),):
            raise ValueError(f"a vector of shape {flat.shape} does not fit {ks} and {recall_ks}")
        at_k = flat[1:split].reshape(6, len(ks))
        return cls(tuple(ks), tuple(recall_ks), float(flat[0]), at_k, flat[split:])

    def vector(self) -> Floats:
        """Flattens the sums for an all-reduce: float64 [1 + 6 len(ks) + len(recall_ks)]."""
        return np.concatenate([[self.points], self.at_k.ravel(), self.recall])

    def __add__(self, other: MetricSums) -> MetricSums:
        if (self.ks, self.recall_ks) != (other.ks, other.recall_ks):
            raise ValueError("sums of different cut-offs cannot be added")
        return self.from_vector(self.vector() + other.vector(), self.ks, self.recall_ks)

    def add(
        self,
        predicted: Ints,
        labels_values: Ints,
        labels_offsets: Ints,
        predicted_inverse_propensity: Floats | None,
        label_inverse_propensity: Floats,
    ) -> None:
        """Adds a batch (shapes in the module's ledger). K may be below a cut-off.

        The predictions of a row are distinct, and so are its true labels; filter labels are gone
        from both. `predicted_inverse_propensity` may be None: a prediction counts only if it is a
        true label, whose inverse propensity is known.

        Raises:
            ValueError: the arrays' shapes do not fit together.
        """
        terms = point_terms(
            predicted, labels_values, labels_offsets, predicted_inverse_propensity,
            label_inverse_propensity, self.ks, self.recall_ks,
        )  # fmt: skip
        self.at_k += terms.at_k.sum(axis=2)
        self.recall += terms.recall.sum(axis=1)
        self.points += len(predicted)

    @property
    def any_label(self) -> bool:
        """Whether any point has a true label; without one every metric is a meaningless 0."""
        return bool((self.at_k[_PS_BEST] > 0).any())  # an inverse propensity is at least 1

    def metrics(self) -> dict[str, float]:
        """Returns percent by name and cut-off: "P@1", "nDCG@3", "PSP@5", "recall@10", ..."""
        families = {
            "P": _ratio(self.at_k[_HITS], self.points),
            "nDCG": _ratio(self.at_k[_NDCG], self.points),
            "PSP": _ratio(self.at_k[_PS_HITS], self.at_k[_PS_BEST]),
            "PSnDCG": _ratio(self.at_k[_PSDCG_HITS], self.at_k[_PSDCG_BEST]),
        }
        found = {
            f"{name}@{k}": 100.0 * float(value)
            for name, values in families.items()
            for k, value in zip(self.ks, values, strict=True)
        }
        recall = _ratio(self.recall, self.points)
        found |= {
            f"recall@{k}": 100.0 * float(value)
            for k, value in zip(self.recall_ks, recall, strict=True)
        }
        return found


@dataclass(frozen=True)
class PointTerms:
    """What each of n points adds to the sums.

    at_k [6, len(ks), n] and recall [len(recall_ks), n], float64; hit bool [n, K]: predictions that
    are true labels; place int64 [n, K]: where in `labels_values`, at hits alone.
    """

    at_k: Floats
    recall: Floats
    hit: npt.NDArray[np.bool_]
    place: Ints


def point_terms(
    predicted: Ints,
    labels_values: Ints,
    labels_offsets: Ints,
    predicted_inverse_propensity: Floats | None,
    label_inverse_propensity: Floats,
    ks: tuple[int, ...],
    recall_ks: tuple[int, ...],
) -> PointTerms:
    """Computes what `MetricSums.add` sums, point by point; arguments and errors as there."""
    _check_shapes(
        predicted, labels_values, labels_offsets, predicted_inverse_propensity,
        label_inverse_propensity,
    )  # fmt: skip
    n = len(predicted)
    per_point = np.diff(labels_offsets)
    hit, place = _hits(predicted, labels_values, per_point)
    # A weight beside a miss is never read: it may be NaN or missing.
    weight = np.zeros(predicted.shape)
    if predicted_inverse_propensity is None:
        weight[hit] = label_inverse_propensity[place[hit]]
    else:
        weight[hit] = predicted_inverse_propensity[hit]
    best, rank = _best_first(label_inverse_propensity, labels_offsets, per_point)
    point = np.repeat(np.arange(n), per_point)

    discount = 1.0 / np.log2(np.arange(max(ks, default=1)) + 2.0)
    ideal = np.concatenate([[0.0], np.cumsum(discount)])
    at_k = np.empty((6, len(ks), n))
    for column, k in enumerate(ks):
        top, top_weight, fall = hit[:, :k], weight[:, :k], discount[: min(k, hit.shape[1])]
        among_best = rank < k
        of, best_k = point[among_best], best[among_best]
        at_k[:, column] = (
            top.sum(axis=1) / k,
            _ratio(top @ fall, ideal[np.minimum(per_point, k)]),
            top_weight.sum(axis=1),
            np.bincount(of, best_k, n),
            top_weight @ fall,
            np.bincount(of, best_k * discount[rank[among_best]], n),
        )
    found = [_ratio(hit[:, :k].sum(axis=1), per_point) for k in recall_ks]
    return PointTerms(at_k, np.reshape(found, (len(recall_ks), n)), hit, place)


def _hits(
    predicted: Ints, labels_values: Ints, per_point: Ints
) -> tuple[npt.NDArray[np.bool_], Ints]:
    """Finds the predictions that are true labels: (bool [n, K], places in `labels_values` [n, K]).

    Ids are first numbered densely, so that (point, number) fits one int64 key whatever the ids are.
    """
    n, width = predicted.shape
    if not len(labels_values) or not predicted.size:
        return np.zeros((n, width), dtype=bool), np.zeros((n, width), dtype=np.int64)
    ids, number = np.unique(labels_values, return_inverse=True)
    true_key = np.repeat(np.arange(n), per_point) * len(ids) + number
    order = np.argsort(true_key)
    sorted_key = true_key[order]

    candidate = np.minimum(np.searchsorted(ids, predicted), len(ids) - 1)
    key = np.arange(n)[:, None] * len(ids) + candidate
    place = np.minimum(np.searchsorted(sorted_key, key), len(sorted_key) - 1)
    hit = (predicted >= 0) & (ids[candidate] == predicted) & (sorted_key[place] == key)
    return hit, order[place]


def _best_first(weights: Floats, offsets: Ints, per_point: Ints) -> tuple[Floats, Ints]:
    """Sorts each point's weights, largest first: (float64 [m], ranks from 0 int64 [m])."""
    point = np.repeat(np.arange(len(per_point)), per_point)
    order = np.lexsort((-weights, point))
    return weights[order], np.arange(len(weights)) - offsets[point]


def _ratio(numerator: npt.ArrayLike, denominator: npt.ArrayLike) -> Floats:
    """Divides, in float64, with 0 where the denominator is 0."""
    top, bottom = np.broadcast_arrays(np.asarray(numerator, dtype=np.float64), denominator)
    return np.divide(top, bottom, out=np.zeros(top.shape), where=bottom != 0)


def _check_shapes(
    predicted: Ints,
    labels_values: Ints,
    labels_offsets: Ints,
    predicted_weight: Floats | None,
    label_weight: Floats,
) -> None:
    if predicted.ndim != 2:
        raise ValueError(f"predicted has shape {predicted.shape}, not [n, K]")
    ends = (len(labels_offsets), *labels_offsets[[0, -1]]) if len(labels_offsets) else (0,)
    if ends != (len(predicted) + 1, 0, len(labels_values)):
        raise ValueError(
            f"offsets (number, first, last) {tuple(map(int, ends))} do not divide "
            f"{len(labels_values)} labels among {len(predicted)} points"
        )
    if label_weight.shape != labels_values.shape:
        raise ValueError(f"{label_weight.shape} label weights for {labels_values.shape} labels")
    if predicted_weight is not None and predicted_weight.shape != predicted.shape:
        raise ValueError(f"{predicted_weight.shape} weights for {predicted.shape} predictions")
