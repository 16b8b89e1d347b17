"""The order of batches, proved by arithmetic alone: nothing is read here."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from renee_ray.data.order import Order, Span, scoring_order, training_order

Row = tuple[str, int]
WORLD_SIZES = (1, 2, 3, 5, 16)


def length_of(row: Row) -> int:
    """Some length, a function of the row."""
    return (row[1] * 2654435761 + len(row[0])) % 37 + 1


def window_of(
    order: Order, stream: int, window: int, slots: range | None = None
) -> list[tuple[int, Row]]:
    """(batch, row) of a stream's window, in order; those in `slots`, or all."""
    slots = order.slots_of(0, 1) if slots is None else slots
    rows = [
        (span.split, i)
        for span in order.spans(stream, window)
        for i in range(span.start, span.stop)
    ]
    lengths = np.array([length_of(row) for row in rows], int)
    places, batches = order.arrange(lengths, stream, window, slots)
    assert slots != order.slots_of(0, 1) or sorted(places.tolist()) == list(range(len(rows)))
    assert (np.diff(batches) >= 0).all()
    return [(int(b), rows[i]) for b, i in zip(batches, places, strict=True)]


def of_rank(order: Order, rank: int, num_ranks: int, first: int = 0) -> dict[int, list[Row]]:
    """The rank's rows of every batch from `first` on, reading only the windows concerned."""
    batches: dict[int, list[Row]] = {b: [] for b in range(first, order.num_batches)}
    slots = order.slots_of(rank, num_ranks)
    for window in range(first // order.window, order.num_windows):
        for stream in order.streams_of(slots):
            for batch, row in window_of(order, stream, window, slots):
                if batch >= first:
                    batches[batch].append(row)
    return batches


def whole(order: Order, num_ranks: int, first: int = 0) -> list[list[Row]]:
    """Rows of every global batch from `first` on, of all ranks in rank order."""
    ranks = [of_rank(order, rank, num_ranks, first) for rank in range(num_ranks)]
    return [[row for rank in ranks for row in rank[b]] for b in range(first, order.num_batches)]


def random_case(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    streams = int(rng.integers(5, 9))
    return {
        "points": [*rng.integers(0, 60, rng.integers(1, 9)).tolist(), int(rng.integers(1, 40))],
        "labels": rng.integers(0, 25, rng.integers(0, 6)).tolist(),
        "augment": float(rng.choice([0.0, 0.3, 1.0])),
        "seed": int(rng.integers(0, 5)),
        "epoch": int(rng.integers(0, 4)),
        "streams": streams,
        "batch_size": streams * int(rng.integers(4, 9)),
        "window": int(rng.integers(1, 7)),
    }


CASES = [
    *map(random_case, range(25)),
    # Fewer rows than streams; one row; a window larger than the epoch; an empty part.
    {"points": [3], "labels": [], "augment": 0.0, "seed": 0, "epoch": 0, "streams": 8,
     "batch_size": 16, "window": 2},
    {"points": [1], "labels": [], "augment": 0.0, "seed": 0, "epoch": 0, "streams": 5,
     "batch_size": 5, "window": 1},
    {"points": [40, 0, 40], "labels": [9], "augment": 1.0, "seed": 0, "epoch": 1, "streams": 5,
     "batch_size": 10, "window": 500},
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_row_exactly_once_whatever_the_number_of_ranks(case: dict[str, Any]) -> None:
    order = training_order(**case)
    batches = whole(order, 1)
    rows = Counter(row for batch in batches for row in batch)
    assert set(rows.values()) == {1}
    points = {row for row in rows if row[0] == "train"}
    assert points == {("train", i) for i in range(sum(case["points"]))}
    if not case["augment"]:
        assert len(points) == len(rows)
    if case["augment"] == 1:
        assert rows.keys() - points == {("labels", i) for i in range(sum(case["labels"]))}
    assert sum(rows.values()) == order.total
    assert all(batches), "no batch is empty on all ranks together"
    assert max(map(len, batches)) <= case["batch_size"]
    for num_ranks in WORLD_SIZES:
        if num_ranks <= order.batch_size:
            assert whole(order, num_ranks) == batches, num_ranks


@pytest.mark.parametrize("case", CASES[::4])
def test_a_resumed_run_gets_exactly_the_remainder(case: dict[str, Any]) -> None:
    order = training_order(**case)
    batches = whole(order, 1)
    for first in range(order.num_batches + 1):
        for num_ranks in (1, 3):
            assert whole(order, num_ranks, first) == batches[first:]


@pytest.mark.parametrize("case", CASES)
def test_streams_differ_by_at_most_one_row(case: dict[str, Any]) -> None:
    order = training_order(**case)
    rows = [order.stream_rows(stream) for stream in range(order.streams)]
    assert sum(rows) == order.total
    assert max(rows) - min(rows) <= 1
    for num_ranks in WORLD_SIZES:
        if num_ranks <= order.batch_size:
            ranks = [order.slots_of(rank, num_ranks) for rank in range(num_ranks)]
            assert [slot for slots in ranks for slot in slots] == list(range(order.batch_size))
            assert max(map(len, ranks)) - min(map(len, ranks)) <= 1


def test_the_same_epoch_is_the_same_and_epochs_and_seeds_differ() -> None:
    case = {"points": [10] * 16, "labels": [], "augment": 0.0, "streams": 4, "batch_size": 8,
            "window": 3}  # fmt: skip
    batches = {
        (seed, epoch): whole(training_order(**case, seed=seed, epoch=epoch), 1)
        for seed in (0, 1)
        for epoch in (0, 1, 2)
    }
    assert whole(training_order(**case, seed=0, epoch=1), 2) == batches[0, 1]
    listed = list(batches.values())
    for i, one in enumerate(listed):
        for other in listed[:i]:
            assert {frozenset(b) for b in one} != {frozenset(b) for b in other}


@pytest.mark.parametrize(("share", "parts"), [(0.25, 8), (0.5, 4), (0.2, 5), (1.0, 3), (0.3, 10)])
def test_successive_epochs_take_successive_shares_of_the_label_texts(
    share: float, parts: int
) -> None:
    taken: list[set[int]] = []
    for epoch in range(2 * round(1 / share)):
        order = training_order(
            [10] * 3, list(range(3, 3 + parts)), augment=share, seed=1, epoch=epoch,
            batch_size=4, streams=2, window=2,
        )  # fmt: skip
        firsts = [s.start for s in order.sources if s.split == "labels"]
        assert len(set(firsts)) == len(firsts) == max(1, round(share * parts))
        taken.append(set(firsts))
    epochs = -(-parts // len(taken[0]))
    assert len(set.union(*taken[:epochs])) == parts
    if parts % len(taken[0]) == 0:
        assert sum(map(len, taken[:epochs])) == parts, "none twice before all were once"


def test_sources_are_the_parts_of_the_split() -> None:
    order = training_order(
        [5, 0, 7], [2, 3], augment=1.0, seed=0, epoch=0, batch_size=4, streams=2, window=2
    )
    listed = sorted((s.split, s.start, s.stop - s.start) for s in order.sources)
    assert listed == [("labels", 0, 2), ("labels", 2, 3), ("train", 0, 5), ("train", 5, 7)]


def test_spans_are_few_and_cut_at_parts() -> None:
    order = Order(scoring_order("test", [4, 3, 5], batch_size=1, num_ranks=1).sources, 6, 1, 1)
    assert order.spans(0, 0) == [Span("test", 0, 4), Span("test", 4, 6)]
    assert order.spans(0, 1) == [Span("test", 6, 7), Span("test", 7, 12)]
    assert order.spans(0, 2) == []


@pytest.mark.parametrize(
    ("parts", "num_ranks", "batch_size"),
    [  # every pair of parts and ranks, of parts and batch sizes, of ranks and batch sizes
        (parts, num_ranks, (1, 7, 64)[(i + j) % 3])
        for i, parts in enumerate([[7, 0, 12, 1], [3], [1000, 1]])
        for j, num_ranks in enumerate(WORLD_SIZES)
    ],
)
def test_scoring_gives_every_row_once_and_each_rank_a_range(
    parts: list[int], num_ranks: int, batch_size: int
) -> None:
    order = scoring_order("test", parts, batch_size=batch_size, num_ranks=num_ranks)
    read: list[int] = []
    numbers = set()
    for rank in range(num_ranks):
        assert order.streams_of(order.slots_of(rank, num_ranks)) == range(rank, rank + 1)
        batches = of_rank(order, rank, num_ranks)
        numbers.add(len(batches))
        rows = sorted(row[1] for batch in batches.values() for row in batch)
        assert rows == list(range(rows[0], rows[-1] + 1)) if rows else True
        read += rows
        assert max(map(len, batches.values())) <= -(-batch_size // num_ranks)
    assert read == list(range(sum(parts)))
    assert numbers == {order.num_batches}, "every rank draws equally many batches"


def test_scoring_never_shuffles() -> None:
    order = scoring_order("test", [50, 30], batch_size=8, num_ranks=2)
    for window in range(order.num_windows):
        rows = window_of(order, 1, window)
        lengths = [length_of(row) for _, row in rows]
        assert lengths == sorted(lengths)
    assert whole(order, 2) == whole(replace(order, seed=5, epoch=7), 2)


def padding(order: Order, lengths: np.ndarray) -> float:
    """Share of padding when a whole global batch is padded to its longest row."""
    cells = tokens = 0
    batches: dict[int, list[int]] = {}
    for window in range(order.num_windows):
        for stream in range(order.streams):
            spans = order.spans(stream, window)
            own = np.concatenate([lengths[s.start : s.stop] for s in spans])
            rows, numbers = order.arrange(own, stream, window, order.slots_of(0, 1))
            for batch, length in zip(numbers, own[rows], strict=True):
                batches.setdefault(int(batch), []).append(int(length))
    for each in batches.values():
        cells, tokens = cells + len(each) * max(each), tokens + sum(each)
    return 1 - tokens / cells


def test_little_is_padded() -> None:
    """Log-normal lengths of mean 20, cut at 64, as titles have."""
    rng = np.random.default_rng(0)
    sigma = 0.45
    drawn = rng.lognormal(np.log(20) - sigma**2 / 2, sigma, 40_000)
    lengths = np.clip(drawn.round().astype(int), 3, 64)
    assert 19 < lengths.mean() < 21
    order = training_order(
        [2000] * 20, [], augment=0.0, seed=0, epoch=0, batch_size=256, streams=8, window=64
    )
    assert padding(order, lengths) < 0.10
    assert padding(replace(order, window=1), lengths) > 0.4, "without a window it would be much"


def test_batches_of_a_window_are_not_in_order_of_length() -> None:
    order = training_order(
        [512], [], augment=0.0, seed=0, epoch=0, batch_size=16, streams=2, window=16
    )
    longest = [max(map(length_of, batch)) for batch in whole(order, 1)]
    assert longest != sorted(longest)
