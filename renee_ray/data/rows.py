"""Reads the rows of a window in the order that data/order.py gives them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from renee_ray.data.dataset import POINTS, Dataset, Manifest, Part
from renee_ray.data.order import OTHER_TEXTS, Order, Span, overlapping
from renee_ray.data.targets import Targets

BATCH = "batch"
"""Column added to a window's rows: the number of the row's batch in the epoch."""
ROW = "row"
"""Column added to a window's rows: the number of the row in its split."""


@dataclass(frozen=True)
class Piece:
    """Rows [start, stop) of a part; with `OTHER_TEXTS`, of its `count` labels of that kind.

    targets: what a teacher predicts for these rows, or None.
    """

    split: str
    part: Part
    count: int
    start: int
    stop: int
    targets: Targets | None = None

    @property
    def first(self) -> int:
        """Position of its first row in the split."""
        return self.part.first + self.start


@dataclass(frozen=True)
class Window:
    """All that a task needs to read a window, and nothing that grows with the dataset.

    dataset: without its parts; order: without its sources; slots: those to read, of every batch;
    number: of the window; pieces: rows to read from each stream.
    """

    dataset: Dataset
    order: Order
    slots: range
    number: int
    pieces: dict[int, list[Piece]]

    @classmethod
    def of(
        cls,
        dataset: Dataset,
        order: Order,
        slots: range,
        number: int,
        targets: Targets | None = None,
    ) -> Window:
        manifest = dataset.manifest
        spans = {stream: order.spans(stream, number) for stream in order.streams_of(slots)}
        splits = {span.split for each in spans.values() for span in each}
        starts = {split: _starts(manifest, split) for split in splits}
        bare = replace(manifest, splits={}, other_texts=(), statistics={})
        return cls(
            Dataset(dataset.path, bare),
            replace(order, sources=()),
            slots,
            number,
            {
                stream: [p for span in each for p in _pieces(manifest, starts, span, targets)]
                for stream, each in spans.items()
            },
        )

    def read(self) -> pa.Table:
        """Reads the rows that are in the slots, in the order of their batches.

        Returns:
            point_id int64, input_ids list<int32>, labels and filter_labels list<int64>, `ROW` int64
            and `BATCH` int64 ascending. A label text read as a point has point_id -1 - label_id.
            With `targets` also what `Targets.read` returns, null for label texts.
        """
        tables, batches = [], []
        for stream, pieces in self.pieces.items():
            table = pa.concat_tables(
                [_numbered(_read(self.dataset, piece), piece.first) for piece in pieces]
                or [_numbered(POINTS.empty_table(), 0)],
                promote_options="default",
            )
            lengths = list_lengths(table["input_ids"])
            rows, numbers = self.order.arrange(lengths, stream, self.number, self.slots)
            tables.append(table.take(pa.array(rows)))
            batches.append(numbers)
        merged = np.concatenate(batches)
        by_batch = np.argsort(merged, kind="stable")
        table = pa.concat_tables(tables, promote_options="default").take(pa.array(by_batch))
        return table.append_column(BATCH, pa.array(merged[by_batch])).combine_chunks()


def read_window(dataset: Dataset, order: Order, slots: range, window: int) -> pa.Table:
    """Reads the rows of some slots of a window, as `Window.read`."""
    return Window.of(dataset, order, slots, window).read()


def list_lengths(column: pa.ChunkedArray) -> np.ndarray:
    """Returns the lengths of the lists of a column, int64."""
    return pc.list_value_length(column).to_numpy().astype(np.int64)


def _starts(manifest: Manifest, split: str) -> np.ndarray:
    """Returns the rows before each part of a split, then all; `OTHER_TEXTS` counts those alone."""
    others = split == OTHER_TEXTS
    return np.cumsum(
        [0, *(manifest.other_texts if others else (part.rows for part in manifest.splits[split]))]
    )


def _pieces(
    manifest: Manifest, starts: dict[str, np.ndarray], span: Span, targets: Targets | None
) -> Iterator[Piece]:
    targets = targets if span.split == "train" else None
    begins = starts[span.split]
    parts = manifest.splits["labels" if span.split == OTHER_TEXTS else span.split]
    for i, start, stop in overlapping(begins, span.start, span.stop):
        first, count = int(begins[i]), int(begins[i + 1] - begins[i])
        taught = targets and targets.within(first + start, first + stop)
        yield Piece(span.split, parts[i], count, start, stop, taught)


def _numbered(table: pa.Table, first: int) -> pa.Table:
    return table.append_column(ROW, pa.array(np.arange(first, first + len(table))))


def _read(dataset: Dataset, piece: Piece) -> pa.Table:
    if piece.split == OTHER_TEXTS:
        table = dataset.read_other_texts(piece.part, piece.count, piece.start, piece.stop)
    elif piece.split == "labels":
        columns = ["label_id", "input_ids"]
        table = dataset.read_rows_of(piece.part, piece.start, piece.stop, columns)
    else:
        table = dataset.read_rows_of(piece.part, piece.start, piece.stop)
        if piece.targets is None:
            return table
        found = piece.targets.read(piece.first, table["point_id"].to_numpy())
        for name, column in found.items():
            table = table.append_column(name, column)
        return table
    ids = table["label_id"].to_numpy()
    ones = np.arange(len(ids) + 1, dtype=np.int32)
    return pa.table(
        {
            "point_id": pa.array(-1 - ids),
            "input_ids": table["input_ids"],
            "labels": pa.ListArray.from_arrays(pa.array(ones), pa.array(ids)),
            "filter_labels": pa.ListArray.from_arrays(
                pa.array(np.zeros_like(ones)), pa.array([], type=pa.int64())
            ),
        }
    )
