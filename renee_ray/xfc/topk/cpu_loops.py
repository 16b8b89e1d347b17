"""The loops of the top-k on a CPU, compiled: they read scores and weights.

    collect      of each row of scores those above the row's threshold (`topk.best`)
    narrow       fp32 to bf16, with the length of each row and of what it loses (`topk.screen`)
    row_norms    the length of each row of bf16

Each passes over memory once, where plain torch takes a pass for every operation.
Import this module only to use it: numba takes a second.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import numba
import numpy as np
from torch import Tensor

from renee_ray.xfc.labels import NONE
from renee_ray.xfc.weights.cpu_rows import (
    DTYPES,
    bits_of,
    compiled,
    float_of,
    over_rows,
    read_bf16,
    read_fp32,
)

# Only where the user says so does numba keep these loops: it would not notice that a function of
# another file, which went into one, has changed since.
KEPT = bool(os.environ.get("NUMBA_CACHE_DIR"))
collecting = numba.njit(nogil=True, error_model="numpy", cache=KEPT)
# Lengths of rows may be summed in any order, which is what lets a sum be vectorised.
measuring = numba.njit(
    nogil=True, error_model="numpy", fastmath={"reassoc", "contract"}, cache=KEPT
)


def collect(
    logits: Tensor, threshold: Tensor, used: Tensor, scores: Tensor, labels: Tensor, k: int,
    first: int, offset: Tensor | None, block: int,
) -> None:  # fmt: skip
    """Puts what beats `threshold` [B, 1] into the places from `used` [B] on of scores and labels.

    A row without room is cut to its k best, in their order, and its threshold raised.

    Args:
        logits: float32 or bfloat16 [B, c], of labels from `first` on.
        offset: float32 [c], added to the logits, or None.
        block: labels that are compared with the threshold together, before each single one.
    """
    loop = _collection(DTYPES[logits.dtype], offset is not None, block)
    shift = np.empty(0, np.float32) if offset is None else offset.numpy()
    over_rows(loop, (logits, threshold, used, scores, labels), 0, k, first, shift)


def narrow(values: Tensor, out: Tensor, norms: Tensor) -> None:
    """Rounds float32 `values` [c, D] to the nearest bfloat16, into `out` [c, D].

    norms: float32 [c, 2], which gets |out| and |values - out| of each row.
    """
    over_rows(_narrow, (values, out, norms), 0)


def row_norms(values: Tensor, norms: Tensor) -> None:
    """Computes |values| of each row of bfloat16 `values` [c, D], into float32 `norms`[:, 0]."""
    over_rows(_row_norms, (values, norms), 0)


@functools.cache
def _collection(dtype: str, shifted: bool, block_size: int) -> Callable[..., None]:
    """Returns the loop that collects from scores of `dtype`, with an offset or without."""
    narrow = dtype == "bf16"  # a function would make another key of numba's in every process

    @collecting
    def collect(logits, threshold, used, scores, labels, _, k, first, offset):
        columns, block = logits.shape[1], np.empty(block_size, np.float32)
        for i in range(len(logits)):
            least, count = threshold[i, 0], used[i]
            for at in range(0, columns, block_size):
                size = min(block_size, columns - at)
                found = logits[i, at : at + size]
                if narrow:
                    read_bf16(found, found, block[:size])
                else:
                    read_fp32(found, found, block[:size])
                if shifted:
                    _shift(block[:size], offset[at : at + size])
                # Most blocks hold nothing; to count takes vectors of comparisons and no branch.
                better = np.int32(0)
                for j in range(size):
                    better += np.int32(block[j] > least)
                if not better:
                    continue
                if count + better > scores.shape[1]:
                    count, least = _cut(scores[i], labels[i], k, count)
                for j in range(size):
                    if block[j] > least:
                        scores[i, count], labels[i, count] = block[j], first + at + j
                        count += 1
            # Another thread may have raised it meanwhile.
            threshold[i, 0], used[i] = max(least, threshold[i, 0]), count

    return collect


@compiled
def _cut(scores, labels, k, count):
    """Leaves the k best of `count` in their order; of those equal to the k-th, the first ones.

    Returns:
        (how many are left, the score of the k-th)
    """
    least = _kth_largest(scores[:count], k)
    above = np.int64(0)
    for j in range(count):
        above += np.int64(scores[j] > least)
    equal, place = k - above, np.int64(0)
    for j in range(count):
        # Moved in any case, and overwritten if not taken: which it is no branch could predict.
        score, level = scores[j], np.int64(scores[j] == least)
        scores[place], labels[place] = score, labels[j]
        place += np.int64(score > least) | (level & np.int64(equal > 0))
        equal -= level
    for j in range(place, count):
        scores[j], labels[j] = -np.inf, NONE
    return place, least


@compiled
def _kth_largest(values, k):
    """Returns the k-th largest of fp32 values, none of which is NaN.

    The bits of fp32, read as an integer, order as the numbers do, once those of a negative number
    have all but their sign flipped: `keys`. The k-th largest key is the largest integer x such
    that k keys are >= x. A bisection of [low, high] finds it, with the invariant

        #(keys >= low) >= k > #(keys >= high + 1)

    Each of at most 32 rounds costs one vectorised count. A selection by exchanges would branch at
    every value, and no predictor knows which way.
    """
    keys = np.empty(len(values), np.int32)
    low, high = np.int64(2**31 - 1), np.int64(-(2**31))
    for j in range(len(values)):
        bits = np.int32(bits_of(values[j]))
        keys[j] = bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))
    for j in range(len(values)):
        low, high = min(low, np.int64(keys[j])), max(high, np.int64(keys[j]))
    while low < high:
        middle = np.int32((low + high + 1) >> 1)
        reached = np.int32(0)
        for j in range(len(keys)):
            reached += np.int32(keys[j] >= middle)
        if reached >= k:
            low = np.int64(middle)
        else:
            high = np.int64(middle) - 1
    key = np.int32(low)
    return float_of(np.uint32(key ^ ((key >> np.int32(31)) & np.int32(0x7FFFFFFF))))


@measuring
def _narrow(values, out, norms, first):
    dim = values.shape[1]
    for i in range(len(values)):
        size, error = np.float32(0), np.float32(0)
        for j in range(dim):
            bits = bits_of(values[i, j])
            high = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
            high = high >> np.uint32(16)
            out[i, j] = np.uint16(high)
            near = float_of(high << np.uint32(16))
            lost = values[i, j] - near
            size += near * near
            error += lost * lost
        norms[i, 0], norms[i, 1] = np.sqrt(size), np.sqrt(error)


@measuring
def _row_norms(values, norms, first):
    for i in range(len(values)):
        size = np.float32(0)
        for j in range(values.shape[1]):
            near = float_of(np.uint32(values[i, j]) << np.uint32(16))
            size += near * near
        norms[i, 0] = np.sqrt(size)


@compiled
def _shift(values, offset):
    for j in range(len(values)):
        values[j] += offset[j]
