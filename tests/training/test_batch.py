from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pyarrow as pa
import pytest
import torch

from renee_ray.rank.batch import (
    Batch,
    Position,
    Ragged,
    drop_tokens,
    length_groups,
    pad,
    ragged,
    truncate,
)

CPU = torch.device("cpu")
ROWS = [[1, 2, 3, 4, 5], [], [6], [7, 8], [9, 10, 11]]


def lists(rows: Ragged) -> list[list[int]]:
    assert rows.values.dtype == np.int64
    assert rows.offsets.dtype == np.int64
    assert rows.offsets[0] == 0
    return [rows.values[a:b].tolist() for a, b in zip(rows.offsets, rows.offsets[1:], strict=False)]


def batch_of(ids: list[list[int]], labels: list[list[int]], multiple: int = 1) -> Batch:
    return Batch(
        Position(), np.arange(len(ids)), Ragged.of_lists(ids), Ragged.of_lists(labels),
        Ragged.of_lists([[]] * len(ids)), 99, multiple,
    )  # fmt: skip


@pytest.mark.parametrize("rows", [ROWS, [], [[]], [[], []], [[2**40]]])
def test_ragged_and_back(rows: list[list[int]]) -> None:
    made = Ragged.of_lists(rows)
    assert lists(made) == rows
    assert len(made) == len(rows)
    assert made.lengths.tolist() == [len(row) for row in rows]
    pairs = [(i, value) for i, row in enumerate(rows) for value in row]
    assert list(zip(*(part.tolist() for part in made.pairs()), strict=True)) == pairs


@pytest.mark.parametrize("order", [[4, 0, 1], [], [2, 2, 2], [1], [4, 3, 2, 1, 0]])
def test_take(order: list[int]) -> None:
    taken = Ragged.of_lists(ROWS).take(np.array(order, dtype=np.int64))
    assert lists(taken) == [ROWS[i] for i in order]


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5, 6])
def test_truncate_keeps_the_last_token(limit: int) -> None:
    wanted = [row if len(row) <= limit else [*row[: limit - 1], row[-1]] for row in ROWS]
    assert lists(truncate(Ragged.of_lists(ROWS), limit)) == wanted


def test_truncate_nothing() -> None:
    assert lists(truncate(Ragged.of_lists([]), 3)) == []
    assert lists(truncate(Ragged.of_lists([[]]), 3)) == [[]]


@pytest.mark.parametrize("slice_of", [slice(0, 5), slice(1, 4), slice(2, 2), slice(4, 5)])
def test_columns_of_lists(slice_of: slice) -> None:
    """Slices too: their offsets do not start at 0."""
    array = pa.array(ROWS, pa.list_(pa.int32()))[slice_of]
    assert lists(ragged(array)) == ROWS[slice_of]
    chunked = pa.chunked_array([array, array])
    assert lists(ragged(chunked)) == ROWS[slice_of] * 2
    assert lists(ragged(pa.chunked_array([], pa.list_(pa.int32())))) == []


@pytest.mark.parametrize(("multiple", "width"), [(1, 5), (4, 8), (5, 5), (8, 8)])
def test_pad(multiple: int, width: int) -> None:
    ids, mask = pad(Ragged.of_lists(ROWS), 99, multiple)
    assert ids.shape == mask.shape == (5, width)
    for i, row in enumerate(ROWS):
        assert ids[i].tolist() == row + [99] * (width - len(row))
        length = max(1, len(row))  # attention over nothing would be NaN
        assert mask[i].tolist() == [1] * length + [0] * (width - length)


@pytest.mark.parametrize("rows", [[], [[]], [[], []]])
def test_pad_without_tokens(rows: list[list[int]]) -> None:
    ids, mask = pad(Ragged.of_lists(rows), 99)
    assert ids.tolist() == [[99]] * max(1, len(rows))
    assert mask.tolist() == [[1]] * max(1, len(rows))


def test_a_batch() -> None:
    made = batch_of(ROWS, [[3], [2, 2**40], [], [], [0]], multiple=4)
    rows, labels = made.pairs(first=10)
    assert rows.tolist() == [10, 11, 11, 14]
    assert labels.tolist() == [3, 2, 2**40, 0]
    assert made.padding() == (11, 40)
    ids, mask = made.tokens(CPU)
    assert ids.dtype == mask.dtype == torch.int64
    assert ids.shape == (5, 8)
    assert made.pairs(10, made.filtered)[0].shape == (0,)


def test_an_empty_batch_gives_one_blank_row_of_tokens() -> None:
    made = batch_of([], [])
    assert len(made) == 0
    assert made.tokens(CPU)[0].shape == (1, 1)
    assert [part.dtype for part in made.pairs(3)] == [torch.int64] * 2
    assert made.padding() == (0, 0)


def costs(lengths: list[int], cost: int) -> list[int]:
    """The cells and costs of every way to cut the ordered rows."""
    ordered, inner = sorted(lengths), range(1, len(lengths))
    every = [cut for n in range(len(lengths)) for cut in combinations(inner, n)]
    bounds = [(0, *cut, len(lengths)) for cut in every]
    return [sum((b - a) * ordered[b - 1] + cost for a, b in pairwise(cut)) for cut in bounds]


@pytest.mark.parametrize("cost", [0, 1, 5, 1000])
@pytest.mark.parametrize("seed", range(5))
def test_groups_of_similar_length_cost_the_least(seed: int, cost: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 12, 9)
    groups = length_groups(lengths, cost)
    assert sorted(np.concatenate(groups)) == list(range(9))
    assert sum(len(g) * lengths[g].max() + cost for g in groups) == min(costs([*lengths], cost))
    assert np.all(np.diff(lengths[np.concatenate(groups)]) >= 0)
    assert len(groups) == {0: len(set(lengths)), 1000: 1}.get(cost, len(groups))


def test_padding_in_groups() -> None:
    """A long row alone, the others in one group; none of no rows."""
    made = batch_of([[1] * n for n in [200, *range(1, 9)]], [[]] * 9)
    assert made.padding() == (236, 9 * 200)
    assert made.padding(grouped=True) == (236, 200 + 8 * 8)
    assert made.padding(8, grouped=True) == (236, 200 + 8 * 8)
    assert batch_of([], []).padding(grouped=True) == (0, 0)
    assert length_groups(np.zeros(0, dtype=np.int64)) == []


LONG = Ragged.of_lists([list(range(100 * i, 100 * i + 40)) for i in range(1, 200)])
IDS = np.arange(-50, 149)


def dropped(share: float, seed: int = 3, epoch: int = 0, rows: Ragged = LONG) -> list[list[int]]:
    return lists(drop_tokens(rows, IDS[: len(rows)], share, seed, Position(epoch, 7)))


def test_token_dropout_leaves_out_its_share_and_keeps_the_ends() -> None:
    found = dropped(0.25)
    for kept, row in zip(found, lists(LONG), strict=True):
        assert kept == [token for token in row if token in set(kept)]
        assert (kept[0], kept[-1]) == (row[0], row[-1])
    # 9.5 of the 38 inner tokens, rounded to even.
    assert {len(row) for row in found} == {40 - 10}
    places = np.concatenate([np.array(row) % 100 for row in found])
    each, share = np.bincount(places, minlength=40)[1:-1], 28 / 38
    assert abs(each - share * len(LONG)).max() < 4.5 * (len(LONG) * share * (1 - share)) ** 0.5


def test_token_dropout_depends_on_seed_epoch_and_point_alone() -> None:
    assert dropped(0.3) == dropped(0.3) != dropped(0.3, seed=4)
    assert dropped(0.3) != dropped(0.3, epoch=1)
    order = np.random.default_rng(0).permutation(len(LONG))
    alone = drop_tokens(LONG.take(order), IDS[order], 0.3, 3, Position(0, 99))
    assert lists(alone) == [dropped(0.3)[i] for i in order]


@pytest.mark.parametrize("rows", [[], [[]], [[1]], [[1, 2], []], [[1, 2], [], [3, 4]]])
def test_token_dropout_of_short_rows(rows: list[list[int]]) -> None:
    made = Ragged.of_lists(rows)
    assert dropped(0.9, rows=made) == rows


@pytest.mark.parametrize(
    ("choice", "expected"),
    [("positive", [[5, 7, 5], [8, 9], [4]]), ("negative", [[5, 7], [], [4]])],
)
def test_filter_labels_in_training(choice: str, expected: list[list[int]]) -> None:
    batch = Batch(
        Position(), np.arange(3), Ragged.of_lists([[1], [2], [3]]),
        Ragged.of_lists([[5, 7], [], [4]]), Ragged.of_lists([[5], [8, 9], []]), 99,
    )  # fmt: skip
    made = batch.for_training(0, token_dropout=0, filter_labels_positive=choice == "positive")
    assert lists(made.labels) == expected
    assert lists(made.filtered) == lists(batch.filtered)
    assert lists(made.input_ids) == lists(batch.input_ids)
