"""Ranges of labels cover every id exactly once, for sizes that do not divide."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from renee_ray.xfc.labels import LabelRange, owners, split_range

SIZES = (0, 1, 2, 5, 7, 11, 64, 100)
NUM_RANKS = (1, 2, 3, 5, 8, 13)


@pytest.mark.parametrize("n", [*SIZES, 2**31 + 7, 2**53 + 1])
def test_ranges_follow_one_another_and_differ_by_one(n: int) -> None:
    for num_ranks in NUM_RANKS:
        follow_one_another(n, num_ranks)


def follow_one_another(n: int, num_ranks: int) -> None:
    ranges = [split_range(n, num_ranks, rank) for rank in range(num_ranks)]
    assert ranges[0][0] == 0
    assert ranges[-1][1] == n
    assert all(a[1] == b[0] for a, b in pairwise(ranges))
    sizes = [stop - start for start, stop in ranges]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("n", SIZES)
def test_owners_are_those_of_split_range(n: int) -> None:
    """More ranks than labels too: an empty shard owns nothing."""
    for ranks in NUM_RANKS:
        expected = [rank for rank in range(ranks) for _ in range(*split_range(n, ranks, rank))]
        found = owners(torch.arange(n), n, ranks)
        assert found.dtype == torch.int64
        assert found.tolist() == expected, ranks


@pytest.mark.parametrize(("n", "num_ranks"), [(2**24 + 3, 2), (2**31 + 9, 3), (2**40 + 1, 7)])
def test_ids_that_float32_cannot_hold(n: int, num_ranks: int) -> None:
    starts = [split_range(n, num_ranks, rank)[0] for rank in range(1, num_ranks)]
    edges = torch.tensor([id + d for id in starts for d in (-1, 0)], dtype=torch.int64)
    expected = [rank - 1 + d for rank in range(1, num_ranks) for d in (0, 1)]
    assert owners(edges, n, num_ranks).tolist() == expected
    last = torch.tensor([n - 1])
    assert owners(last, n, num_ranks).tolist() == [num_ranks - 1]
    # Such ids passed through float32 are other ids: what this test would catch.
    assert not torch.equal(edges.float().long(), edges) or n < 2**25


@pytest.mark.parametrize("rank", [-1, 3])
def test_a_rank_outside_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank} "):
        split_range(10, 3, rank)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 11)])
def test_a_range_outside_is_refused(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="is not within"):
        LabelRange(start, stop, 10)


def test_a_range_of_a_rank() -> None:
    owned = LabelRange.of_rank(10, 3, 1)
    assert (owned.start, owned.stop, owned.num_labels, len(owned)) == (3, 6, 10, 3)
    assert len(LabelRange.of_rank(2, 3, 0)) == 0
