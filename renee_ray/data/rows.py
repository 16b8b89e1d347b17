"""Reading the rows of a window in the order that `order` gives them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from renee_ray.data.dataset import POINTS, Dataset
from renee_ray.data.order import OTHER_TEXTS, Order, Span

BATCH = "batch"
"""Column added to a window's rows: the number of the row's batch in the epoch."""
ROW = "row"
"""Column added to a window's rows: the number of the row in its split."""


def read_window(dataset: Dataset, order: Order, streams: range, window: int) -> pa.Table:
    """The rows of some streams in one window, in the order of their batches.

    Returns:
        point_id int64, input_ids list<int32>, labels and filter_labels list<int64>, `ROW` int64,
        and `BATCH` int64 ascending. A label text read as a point has point_id -1 - label_id.
    """
    tables, batches = [], []
    for stream in streams:
        table = pa.concat_tables(
            [_numbered(_read(dataset, span), span.start) for span in order.spans(stream, window)]
            or [_numbered(POINTS.empty_table(), 0)]
        )
        rows, numbers = order.arrange(list_lengths(table["input_ids"]), stream, window)
        tables.append(table.take(pa.array(rows)))
        batches.append(numbers)
    merged = np.concatenate(batches)
    by_batch = np.argsort(merged, kind="stable")
    table = pa.concat_tables(tables).take(pa.array(by_batch))
    return table.append_column(BATCH, pa.array(merged[by_batch])).combine_chunks()


def list_lengths(column: pa.ChunkedArray) -> np.ndarray:
    """Lengths of the lists of a column, int64."""
    return pc.list_value_length(column).to_numpy().astype(np.int64)


def _numbered(table: pa.Table, first: int) -> pa.Table:
    return table.append_column(ROW, pa.array(np.arange(first, first + len(table))))


def _read(dataset: Dataset, span: Span) -> pa.Table:
    if span.split == OTHER_TEXTS:
        table = dataset.read_other_texts(span.start, span.stop)
    elif span.split == "labels":
        table = dataset.read_rows("labels", span.start, span.stop, ["label_id", "input_ids"])
    else:
        return dataset.read_rows(span.split, span.start, span.stop)
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
