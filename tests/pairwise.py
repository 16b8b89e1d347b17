"""Cases that cover every pair of values, in place of all combinations."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations, product
from typing import Any


def pairwise(*axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Returns rows with a value of each axis, such that any two values of two axes meet in one.

    An error that takes one value, or two values together, is thus found. Of the rows that are
    left, the one with the most new pairs comes next; the result depends on nothing but the axes.
    """
    values = [list(axis) for axis in axes]
    rows = list(product(*(range(len(axis)) for axis in values)))
    wanted = {pair for row in rows for pair in _pairs(row)}
    chosen = []
    while wanted:
        best = max(rows, key=lambda row: len(wanted & _pairs(row)))
        wanted -= _pairs(best)
        chosen.append(tuple(axis[i] for axis, i in zip(values, best, strict=True)))
    return chosen


def _pairs(row: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
    return set(combinations(enumerate(row), 2))
