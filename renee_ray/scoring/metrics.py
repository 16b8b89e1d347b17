"""Ranking metrics of extreme classification, as sums that add up across batches and ranks.

Ledger, n points, K predictions a point:

    name                shape    dtype    meaning
    predicted           [n, K]   int64    label ids, best first, -1 = none (short row)
    true                [n]      Ragged   true labels of each point, m altogether
    inverse_propensity  [m]      float64  1/p of each true label

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
from typing import Any

import numpy as np
import numpy.typing as npt

from renee_ray.rank.batch import Ragged

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

KS = (1, 3, 5)
RECALL_KS = (10, 100)
MOST = 100
"""Predictions that the metrics need."""
BY_TAIL = ("P@1", "PSP@5", "recall@100")
"""Their sum chooses the logit adjustment: the first place, rare labels, and the whole list."""
KEPT, LOSS = ("P@1", "P@5", "PSP@1", "PSP@5", "recall@100"), 0.5
"""Figures, each of which it may lower by so many points at most."""

CLASSES = {"1": (1, 1), "2-5": (2, 5), "6-20": (6, 20), "21-100": (21, 100), ">100": (101, 2**62)}
"""Labels by their number of training points."""
CLASS_K = 5
"""Cut-off of the recall by class."""

METRICS = (
    *(f"{name}@{k}" for name in ("P", "nDCG", "PSP", "PSnDCG") for k in KS),
    *(f"recall@{k}" for k in RECALL_KS),
)


def best_tail(table: Iterable[Mapping[str, float]], own: float) -> float:
    """Returns the "tail" of the row with the largest sum of BY_TAIL; of equal ones the least.

    Of the rows in which each figure of KEPT is at most LOSS below that of the row of `own`.
    """
    rows = list(table)
    given = next(row for row in rows if row["tail"] == own)
    rows = [row for row in rows if all(row[name] >= given[name] - LOSS for name in KEPT)]
    return max(rows, key=lambda row: (sum(row[name] for name in BY_TAIL), -row["tail"]))["tail"]


def inverse_propensity(train_count: npt.ArrayLike, num_points: int, a: float, b: float) -> Floats:
    """1/p_l = 1 + C (N_l + b)^-a with C = (ln N - 1)(b + 1)^a (Jain et al., KDD 2016).

    train_count: ints, any shape: N_l, training points of each label, unaugmented (a range of all
    labels is enough); num_points: N, training points. Returns float64 of the same shape, >= 1:
    below three points, where C would be negative, C is 0.
    """
    count = np.asarray(train_count, dtype=np.float64)
    c = max(np.log(max(num_points, 1)) - 1.0, 0.0) * (b + 1.0) ** a
    return np.asarray(1.0 + c * (count + b) ** -a)


class MetricSums:
    """Sums of one or more batches; the vectors of all ranks add up to that of the whole.

    vector: float64 [2, len(METRICS) + len(CLASSES)]: `point_terms`, summed over the points.
    bounds: inverse propensities at which each class begins, falling; None: no class is counted.
    """

    def __init__(self, vector: Floats | None = None, bounds: Floats | None = None) -> None:
        self.vector = np.zeros((2, len(METRICS) + len(CLASSES))) if vector is None else vector
        self._bounds = bounds

    def add(self, predicted: Ints, true: Ragged, inverse_propensity: Floats) -> None:
        """Adds a batch (shapes in the module's ledger). K may be below a cut-off.

        The predictions of a row are distinct, and so are its true labels; filter labels are gone
        from both.
        """
        self.vector += point_terms(predicted, true, inverse_propensity, self._bounds).sum(axis=2)

    def by_frequency(self) -> dict[str, dict[str, float]]:
        """Returns "labels", the true ones, and "recall@5" in percent for each class that has any.

        This recall is over labels and not a mean over points: a point counts by its labels.
        """
        classes = zip(CLASSES, *self.vector[:, len(METRICS) :].tolist(), strict=True)
        return {
            name: {"labels": number, f"recall@{CLASS_K}": 100 * found / number}
            for name, found, number in classes
            if number
        }

    @property
    def points(self) -> float:
        return float(self.vector[1, 0])

    @property
    def any_label(self) -> bool:
        """Whether any point has a true label; without one every metric is a meaningless 0."""
        return bool(self.vector[1, METRICS.index("PSP@1")] > 0)  # 1/p is at least 1

    def metrics(self) -> dict[str, float]:
        """Returns percent by name and cut-off: "P@1", "nDCG@3", "PSP@5", "recall@10", ..."""
        values = 100.0 * _ratio(*self.vector[:, : len(METRICS)])
        return dict(zip(METRICS, values.tolist(), strict=True))


def point_terms(
    predicted: Ints, true: Ragged, inverse_propensity: Floats, bounds: Floats | None
) -> Floats:
    """Computes what each of n points adds above and below the line of METRICS, then of CLASSES.

    A class has its labels among the CLASS_K best that are true above the line, and all true ones
    below. Without `bounds`, as of `MetricSums`, it has none.

    Returns:
        float64 [2, len(METRICS) + len(CLASSES), n]
    """
    n, per_point, (point, _) = len(predicted), true.lengths, true.pairs()
    hit, place = find_hits(predicted, true)
    weight = np.zeros(predicted.shape)
    weight[hit] = inverse_propensity[place[hit]]
    order = np.lexsort((-inverse_propensity, point))
    best, rank = inverse_propensity[order], np.arange(len(order)) - true.offsets[point]

    discount = 1.0 / np.log2(np.arange(max(KS)) + 2.0)
    ideal = np.concatenate([[0.0], np.cumsum(discount)])
    rows: dict[str, tuple[Any, Any]] = {}
    for k in KS:
        top, top_weight, fall = hit[:, :k], weight[:, :k], discount[: min(k, hit.shape[1])]
        among_best = rank < k
        of, best_k = point[among_best], best[among_best]
        best_dcg = np.bincount(of, best_k * discount[rank[among_best]], n)
        rows[f"P@{k}"] = top.sum(axis=1) / k, np.ones(n)
        rows[f"nDCG@{k}"] = _ratio(top @ fall, ideal[np.minimum(per_point, k)]), np.ones(n)
        rows[f"PSP@{k}"] = top_weight.sum(axis=1), np.bincount(of, best_k, n)
        rows[f"PSnDCG@{k}"] = top_weight @ fall, best_dcg
    for k in RECALL_KS:
        rows[f"recall@{k}"] = _ratio(hit[:, :k].sum(axis=1), per_point), np.ones(n)
    found = np.zeros(len(point))
    found[place[:, :CLASS_K][hit[:, :CLASS_K]]] = 1.0
    number = np.zeros(len(point), dtype=np.int64)  # of its class, from 1
    if bounds is not None:  # the more training points, the lower is the label's 1/p
        number = np.searchsorted(-bounds, -inverse_propensity)
    for i, name in enumerate(CLASSES, 1):
        of = point[number == i]
        rows[name] = np.bincount(of, found[number == i], n), np.bincount(of, minlength=n)
    return np.array([rows[name] for name in (*METRICS, *CLASSES)], dtype=float).swapaxes(0, 1)


def find_hits(predicted: Ints, true: Ragged) -> tuple[npt.NDArray[np.bool_], Ints]:
    """Finds the predictions that are true labels: (bool [n, K], places in `true.values` [n, K]).

    Ids are first numbered densely, so that (point, number) fits one int64 key whatever the ids are.
    """
    point, values = true.pairs()
    if not len(values) or not predicted.size:
        return np.zeros(predicted.shape, dtype=bool), np.zeros(predicted.shape, dtype=np.int64)
    ids, number = np.unique(values, return_inverse=True)
    true_key = point * len(ids) + number
    order = np.argsort(true_key)
    sorted_key = true_key[order]

    candidate = np.minimum(np.searchsorted(ids, predicted), len(ids) - 1)
    key = np.arange(len(predicted))[:, None] * len(ids) + candidate
    place = np.minimum(np.searchsorted(sorted_key, key), len(sorted_key) - 1)
    hit = (predicted >= 0) & (ids[candidate] == predicted) & (sorted_key[place] == key)
    return hit, order[place]


def _ratio(numerator: npt.ArrayLike, denominator: npt.ArrayLike) -> Floats:
    """Divides, in float64, with 0 where the denominator is 0."""
    top, bottom = np.broadcast_arrays(np.asarray(numerator, dtype=np.float64), denominator)
    return np.divide(top, bottom, out=np.zeros(top.shape), where=bottom != 0)
