"""Which rows are held out for validation and the order of the others: a seeded hash of the id."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_SHUFFLE, _HOLD_OUT = 0, 1


def splitmix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The output function of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): a bijection."""
    z = values + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def hashes(num_rows: int, seed: int, stream: int) -> NDArray[np.uint64]:
    """uint64 [num_rows]: the hash of each id in [0, num_rows), of one stream of `seed`."""
    key = splitmix64(np.array([seed % 2**63 * 2 + stream], dtype=np.uint64))
    return splitmix64(np.arange(num_rows, dtype=np.uint64) ^ key)


def split_rows(
    num_rows: int, validation: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(train, validation): int64 row numbers; train in the order of a hash, validation ascending.

    A row is held out if its hash is below validation * 2**64, whatever the other rows are.
    """
    held_out = hashes(num_rows, seed, _HOLD_OUT) < np.uint64(int(validation * 2**64))
    order = np.argsort(hashes(num_rows, seed, _SHUFFLE), kind="stable")
    return order[~held_out[order]], np.flatnonzero(held_out)
