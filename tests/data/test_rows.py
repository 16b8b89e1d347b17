"""Reading windows of a dataset on disk, and cutting them into batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from renee_ray.data.dataset import Dataset
from renee_ray.data.order import OTHER_TEXTS, Order, scoring_order, training_order
from renee_ray.data.rows import BATCH, ROW, read_window
from renee_ray.rank.batch import Batch, Position, cut_batches
from tests.data.tiny import PAD, write_tiny

LONGEST = 9
START = Position()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_tiny(tmp_path_factory.mktemp("tiny"), longest=LONGEST)


def order_of(dataset: Dataset, epoch: int = 0, augment: float = 1.0) -> Order:
    rows = {name: [part.rows for part in dataset.manifest.splits[name]] for name in
            ("train", "labels")}  # fmt: skip
    return training_order(
        rows["train"], rows["labels"], augment=augment, seed=0, epoch=epoch, batch_size=6,
        streams=3, window=2,
    )  # fmt: skip


def expected(dataset: Dataset) -> dict[int, tuple[list[int], list[int], list[int]]]:
    """point_id -> (tokens, labels, filter labels) of what an epoch with all texts holds."""
    points = dataset.read_rows("train", 0, dataset.manifest.num_points("train")).to_pylist()
    found = {
        row["point_id"]: (row["input_ids"], row["labels"], row["filter_labels"]) for row in points
    }
    texts = dataset.read_rows("labels", 0, dataset.manifest.num_labels).to_pylist()
    for row in texts:
        found[-1 - row["label_id"]] = (row["input_ids"], [row["label_id"]], [])
    return found


def tables(
    dataset: Dataset, orders: list[Order], rank: int, num_ranks: int, first: Position = START
) -> list[pa.Table]:
    """Windows as the feed hands them out, from a position on."""
    out = []
    for epoch in range(first.epoch, len(orders)):
        order = orders[epoch]
        for window in range(order.num_windows):
            table = read_window(dataset, order, order.slots_of(rank, num_ranks), window)
            if epoch == first.epoch:
                table = table.slice(int(np.searchsorted(table[BATCH].to_numpy(), first.batch)))
            out.append(table.append_column("epoch", pa.array(np.full(len(table), epoch))))
    return out


def positions(orders: list[Order], first: Position = START) -> list[Position]:
    return [
        Position(epoch, batch)
        for epoch in range(first.epoch, len(orders))
        for batch in range(first.batch if epoch == first.epoch else 0, orders[epoch].num_batches)
    ]


def batches_of(
    dataset: Dataset, orders: list[Order], rank: int, num_ranks: int, first: Position = START
) -> list[Batch]:
    listed = tables(dataset, orders, rank, num_ranks, first)
    return list(cut_batches(listed, positions(orders, first), PAD, LONGEST))


def test_other_texts_are_those_of_labels_that_are_no_points(dataset: Dataset) -> None:
    """`tiny` makes every third label a point."""
    manifest = dataset.manifest
    wanted = [label for label in range(manifest.num_labels) if label % 3]
    assert sum(manifest.other_texts) == len(wanted)
    texts = {i: ids for i, (ids, _, _) in expected(dataset).items()}
    found: list[int] = []
    for part, count in zip(manifest.splits["labels"], manifest.other_texts, strict=True):
        table = dataset.read_other_texts(part, count, 0, count)
        found += table["label_id"].to_pylist()
        assert table["input_ids"].to_pylist() == [texts[-1 - i] for i in found[-count:]]
    assert found == wanted


def test_an_epoch_with_other_texts(dataset: Dataset) -> None:
    parts = [part.rows for part in dataset.manifest.splits["train"]]
    order = training_order(
        parts, list(dataset.manifest.other_texts), augment=1.0, texts=OTHER_TEXTS, seed=0,
        epoch=0, batch_size=6, streams=3, window=2,
    )  # fmt: skip
    rows = [row for batch in batches_of(dataset, [order], 0, 1) for row in rows_of(batch)]
    wanted = {i: row for i, row in expected(dataset).items() if i >= 0 or (-1 - i) % 3}
    assert {row[0]: row[1:] for row in rows} == wanted
    assert len(rows) == len(wanted)


def rows_of(batch: Batch) -> list[tuple[int, list[int], list[int], list[int]]]:
    def row(ragged: object, i: int) -> list[int]:
        return ragged.values[ragged.offsets[i] : ragged.offsets[i + 1]].tolist()  # type: ignore[attr-defined]

    return [
        (int(id), row(batch.input_ids, i), row(batch.labels, i), row(batch.filtered, i))
        for i, id in enumerate(batch.points)
    ]


def test_a_window_holds_whole_rows_and_texts_with_their_own_label(dataset: Dataset) -> None:
    wanted = expected(dataset)
    order = order_of(dataset)
    seen = {}
    for window in range(order.num_windows):
        table = read_window(dataset, order, order.slots_of(0, 1), window)
        assert table.column_names == [
            "point_id",
            "input_ids",
            "labels",
            "filter_labels",
            ROW,
            BATCH,
        ]
        assert table.schema.field("point_id").type == pa.int64()
        assert table.schema.field("input_ids").type.value_type == pa.int32()
        assert table.schema.field("labels").type.value_type == pa.int64()
        numbers = table[BATCH].to_numpy()
        assert (np.diff(numbers) >= 0).all()
        assert set((numbers // order.window).tolist()) == {window}
        for row in table.to_pylist():
            seen[row["point_id"]] = (row["input_ids"], row["labels"], row["filter_labels"])
    assert seen == wanted


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5, 6])
def test_batches_hold_every_row_once_and_are_the_same_for_any_number_of_ranks(
    dataset: Dataset, num_ranks: int
) -> None:
    orders = [order_of(dataset, 0), order_of(dataset, 1)]
    alone = [rows_of(batch) for batch in batches_of(dataset, orders, 0, 1)]
    assert [b.position for b in batches_of(dataset, orders, 0, 1)] == positions(orders)
    ranks = [batches_of(dataset, orders, rank, num_ranks) for rank in range(num_ranks)]
    together = [
        [row for batch in of_ranks for row in rows_of(batch)]
        for of_ranks in zip(*ranks, strict=True)
    ]
    assert together == alone
    wanted = expected(dataset)
    for epoch in (0, 1):
        rows = [row for batch, position in zip(alone, positions(orders), strict=True)
                if position.epoch == epoch for row in batch]  # fmt: skip
        assert len(rows) == len(wanted)
        assert {id: tuple(rest) for id, *rest in rows} == wanted


def test_any_position_can_be_resumed_from_by_another_number_of_ranks(dataset: Dataset) -> None:
    orders = [order_of(dataset, 0), order_of(dataset, 1)]
    alone = [rows_of(batch) for batch in batches_of(dataset, orders, 0, 1)]
    for number, first in enumerate(positions(orders)):
        ranks = [batches_of(dataset, orders, rank, 2, first) for rank in range(2)]
        together = [rows_of(a) + rows_of(b) for a, b in zip(*ranks, strict=True)]
        assert together == alone[number:], first


def numbered(rows: list[tuple[int, int]]) -> pa.Table:
    """A table of (epoch, batch); point_id counts within the table."""
    columns = {
        "point_id": np.arange(len(rows)),
        "input_ids": pa.array([[7]] * len(rows), pa.list_(pa.int32())),
        "labels": pa.array([[1]] * len(rows), pa.list_(pa.int64())),
        "filter_labels": pa.array([[]] * len(rows), pa.list_(pa.int64())),
        ROW: np.arange(len(rows)),
        BATCH: np.array([batch for _, batch in rows], dtype=np.int64),
        "epoch": np.array([epoch for epoch, _ in rows], dtype=np.int64),
    }
    return pa.table(columns)


def test_batches_across_tables_and_batches_without_rows() -> None:
    sequence = [
        numbered([(0, 0), (0, 0), (0, 1)]),
        numbered([]),
        numbered([(0, 1)]),
        numbered([(0, 1), (0, 3)]),
        numbered([(1, 3)]),
        numbered([]),
    ]
    asked = [Position(0, b) for b in range(5)] + [Position(1, b) for b in range(5)]
    found = list(cut_batches(sequence, asked, PAD, LONGEST))
    assert [len(batch) for batch in found] == [2, 3, 0, 1, 0, 0, 0, 0, 1, 0]
    assert [batch.position for batch in found] == asked
    empty = found[2]
    assert empty.pairs(0)[0].shape == (0,)
    assert empty.input_ids.offsets.tolist() == [0]


def test_only_empty_tables() -> None:
    found = list(cut_batches([numbered([])], [Position(0, 0), Position(0, 1)], PAD, LONGEST))
    assert [len(batch) for batch in found] == [0, 0]
    assert next(cut_batches([], [START], PAD, LONGEST)).points.shape == (0,)


def test_a_rank_whose_streams_are_empty(tmp_path: Path) -> None:
    small = write_tiny(tmp_path / "small", train=(2,), validation=(), test=(1,), labels=(3,))
    order = scoring_order("test", [1], batch_size=4, num_ranks=3)
    read = [batches_of(small, [order], rank, 3) for rank in range(3)]
    assert sorted(len(b) for batches in read for b in batches) == [0, 0, 1]


def test_filter_labels_are_read(dataset: Dataset) -> None:
    parts = [part.rows for part in dataset.manifest.splits["test"]]
    order = scoring_order("test", parts, batch_size=3, num_ranks=1)
    stored = {
        row["point_id"]: (row["input_ids"], row["labels"], row["filter_labels"])
        for row in dataset.read_rows("test", 0, sum(parts)).to_pylist()
    }
    assert any(filtered for *_, filtered in stored.values())
    found = [row for batch in batches_of(dataset, [order], 0, 1) for row in rows_of(batch)]
    assert {id: tuple(rest) for id, *rest in found} == stored
