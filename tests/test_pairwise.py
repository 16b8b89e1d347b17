"""The helper that chooses cases."""

from __future__ import annotations

from itertools import combinations, product

from tests.pairwise import pairwise


def test_any_two_values_of_two_axes_meet_in_fewer_cases_than_all() -> None:
    axes = ("abcde", (1, 2, 3, 4), [None, True], (0.5, 0.9))
    rows = pairwise(*axes)
    assert len(rows) <= 24 < len(list(product(*axes)))
    assert set(rows) <= set(product(*axes))
    for i, j in combinations(range(4), 2):
        assert {(row[i], row[j]) for row in rows} == set(product(axes[i], axes[j]))
    assert rows == pairwise(*axes)
