"""Columns of a dataset's Parquet files, and the values that they may hold."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

SPLITS = ("train", "validation", "test", "labels")
MAX_LABELS = 1 << 31
MAX_ROWS = 1 << 48

POINTS = pa.schema(
    {
        "point_id": pa.int64(),
        "input_ids": pa.list_(pa.int32()),
        "labels": pa.list_(pa.int64()),
        "filter_labels": pa.list_(pa.int64()),
    }
)
"""A row of train, validation or test. point_id: row number in the source file of its split,
from 0 (validation, and a test split that was held out: in the training file). input_ids:
unpadded, special tokens included.
labels, filter_labels: ascending, unique."""

LABELS = pa.schema(
    {
        "label_id": pa.int64(),
        "text": pa.string(),
        "input_ids": pa.list_(pa.int32()),
        "train_count": pa.int64(),
        "is_point": pa.bool_(),
    }
)
"""A row of labels. train_count: points of the source's training file that carry the label
(train and validation together, no augmentation). is_point: the label is a filter label of a point
of train, so that its text, or one like it, is among the points."""


def schema_of(split: str) -> pa.Schema:
    return LABELS if split == "labels" else POINTS


def empty(split: str, columns: Sequence[str] | None) -> pa.Table:
    """A table of `split` without rows; `columns` None means every column."""
    table = schema_of(split).empty_table()
    return table if columns is None else table.select(list(columns))


def wrong_column(found: pa.Schema, split: str, columns: Sequence[str]) -> str | None:
    """Says which of `columns` a file has not once and with its type; None if there is none."""
    for name in columns:
        types = [field.type for field in found if field.name == name]
        expected = schema_of(split).field(name).type
        if types != [expected]:
            shown = " and ".join(map(str, types)) or "nothing"
            return f"has {shown:.80} as column {name!r} instead of {expected}"
    return None


def wrong_value(table: pa.Table, first: int, num_labels: int) -> str | None:
    """Says what must not be in a column, since indices go into arrays unchecked; or None.

    Args:
        first: position of the first row in its split.
    """
    limits = {"labels": num_labels, "filter_labels": num_labels, "input_ids": 1 << 31}
    limits["train_count"] = MAX_ROWS
    for name in table.column_names:
        column = table[name]
        nulls = column.null_count
        if pa.types.is_list(column.type):
            column = pc.list_flatten(column)
            nulls += column.null_count
        if nulls:
            return f"has nulls in {name}"
        if name == "label_id":
            if not np.array_equal(column.to_numpy(), np.arange(first, first + len(column))):
                return "has labels that are not in the order of their ids"
        elif name in limits and len(column):
            ends = pc.min_max(column)
            low, high = ends["min"].as_py(), ends["max"].as_py()
            if low < 0 or high >= limits[name]:
                shown = low if low < 0 else high
                return f"has {shown} in {name}, which is not in [0, {limits[name]})"
    return None
