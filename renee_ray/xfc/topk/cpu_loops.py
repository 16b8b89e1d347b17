"""The loop of the top-k on a CPU, compiled: of each row of scores those above its threshold.

It passes over memory once, where plain torch takes a pass for every operation.
Import this module only to use it: numba takes a second.
"""

from __future__ import annotations

import os

import numba
import numpy as np

from renee_ray.xfc.labels import NONE
from renee_ray.xfc.weights.cpu_rows import bits_of, float_of

# Only where the user says so does numba keep these loops: it would not notice that a function of
# another file, which went into one, has changed since.
compiled = numba.njit(
    nogil=True, error_model="numpy", cache=bool(os.environ.get("NUMBA_CACHE_DIR"))
)


@compiled
def collect(logits, threshold, used, scores, labels, k, first, offset, block):
    """Puts what beats `threshold` [B, 1] into the places from `used` [B] on of scores and labels.

    A row without room is cut to its k best, in their order, and its threshold raised.

    Args:
        logits: float32 [B, c], of labels from `first` on.
        offset: float32 [c], added to the logits, or of no length.
        block: labels that are compared with the threshold together, before each single one.
    """
    columns = logits.shape[1]
    for i in range(len(logits)):
        least, count = threshold[i, 0], used[i]
        for at in range(0, columns, block):
            found = logits[i, at : at + block]
            if len(offset):
                found = found + offset[at : at + block]
            # Most blocks hold nothing; to count takes vectors of comparisons and no branch.
            better = np.int32(0)
            for j in range(len(found)):
                better += np.int32(found[j] > least)
            if not better:
                continue
            if count + better > scores.shape[1]:
                count, least = _cut(scores[i], labels[i], k, count)
            for j in range(len(found)):
                if found[j] > least:
                    scores[i, count], labels[i, count] = found[j], first + at + j
                    count += 1
        threshold[i, 0], used[i] = least, count


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
