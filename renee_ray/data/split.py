"""Rows held out for validation and test, and the order of the others: seeded hashes of their ids.

No process holds the whole order. A row's bucket follows from its hash and one bound a bucket; its
place in the bucket follows when the bucket's rows are sorted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Int64s = NDArray[np.int64]
UInt64s = NDArray[np.uint64]

_SHUFFLE, _HOLD_OUT = 0, 1
BIN_BITS = 18
"""Leading bits of a hash that choose its bin, in the histogram that gives the bounds of buckets."""
CHUNK_ROWS = 1 << 18


def splitmix64(values: UInt64s) -> UInt64s:
    """Applies the output of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), a bijection."""
    z = values + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@dataclass(frozen=True)
class Shuffle:
    """Splits the rows of the training files and orders them.

    shares: of the rows that are held out, for each split; their sum is below 1.
    bounds: uint64 [buckets - 1], ascending, the first key of each bucket but the first.
    """

    seed: int
    shares: tuple[float, ...]
    bounds: UInt64s

    def splits(self, rows: Int64s) -> Int64s:
        """Returns i for each row that is held out for shares[i], else their number: int64 [n].

        The split of a row depends on no other row.
        """
        ends = np.array([int(end * 2**64) for end in np.cumsum(self.shares)], np.uint64)
        return np.searchsorted(ends, self._hashes(rows, _HOLD_OUT), side="right")

    def held_out(self, rows: Int64s) -> NDArray[np.bool_]:
        """Returns which rows are held out, bool [n]."""
        return self.splits(rows) < len(self.shares)

    def keys(self, rows: Int64s) -> UInt64s:
        """Returns the sort keys of rows, uint64 [n], all different."""
        return self._hashes(rows, _SHUFFLE)

    def buckets(self, keys: UInt64s) -> Int64s:
        """Returns the buckets of keys, int64 [n], ascending with the keys."""
        return np.searchsorted(self.bounds, keys, side="right")

    def _hashes(self, rows: Int64s, stream: int) -> UInt64s:
        key = splitmix64(np.array([self.seed % 2**63 * 2 + stream], dtype=np.uint64))
        return splitmix64(rows.astype(np.uint64) ^ key)


def shuffle_of(
    num_rows: int, starts: Int64s, bucket_rows: int, shares: tuple[float, ...], seed: int
) -> tuple[Shuffle, Int64s]:
    """Shuffles rows [0, num_rows) into buckets of exactly `bucket_rows`, but the last one.

    Takes two passes over the numbers of the rows, in memory that does not grow with them.

    Args:
        starts: int64 [n], ascending.

    Returns:
        (the shuffle, int64 [n + 1, shares]: rows held out before each of `starts`, and in all)
    """
    made = Shuffle(seed, shares, np.zeros(0, np.uint64))
    marks = np.append(starts, num_rows)
    held = np.zeros((len(marks), len(shares)), dtype=np.int64)
    histogram = np.zeros(1 << BIN_BITS, dtype=np.int64)
    total = np.zeros(len(shares), dtype=np.int64)
    for rows in _chunks(num_rows):
        splits = made.splits(rows)
        each = splits[:, None] == np.arange(len(shares))
        before = total + np.concatenate([0 * each[:1], np.cumsum(each, 0)])
        here = slice(*np.searchsorted(marks, [rows[0], rows[-1] + 1], side="left"))
        held[here] = before[marks[here] - rows[0]]
        total = before[-1]
        histogram += np.bincount(
            _bins(made.keys(rows[splits == len(shares)])), minlength=len(histogram)
        )
    held[marks == num_rows] = total
    ranks = np.arange(bucket_rows, num_rows - total.sum(), bucket_rows)
    return replace(made, bounds=_keys_at(made, ranks, histogram, num_rows)), held


def _keys_at(made: Shuffle, ranks: Int64s, histogram: Int64s, num_rows: int) -> UInt64s:
    """Finds the key of each rank, keeping only keys of the histogram's bins where a rank lies."""
    if not len(ranks):
        return made.bounds
    ends = np.cumsum(histogram)
    bins = np.searchsorted(ends, ranks, side="right")
    wanted = np.zeros(len(histogram), dtype=bool)
    wanted[bins] = True
    found = []
    for rows in _chunks(num_rows):
        keys = made.keys(rows)
        keys, rows = keys[wanted[_bins(keys)]], rows[wanted[_bins(keys)]]
        found.append(keys[~made.held_out(rows)])
    kept = np.sort(np.concatenate(found))
    firsts = np.searchsorted(_bins(kept), bins, side="left")
    return kept[firsts + ranks - (ends - histogram)[bins]]


def _bins(keys: UInt64s) -> Int64s:
    return (keys >> np.uint64(64 - BIN_BITS)).astype(np.int64)


def _chunks(num_rows: int) -> Iterator[Int64s]:
    for start in range(0, num_rows, CHUNK_ROWS):
        yield np.arange(start, min(start + CHUNK_ROWS, num_rows))
