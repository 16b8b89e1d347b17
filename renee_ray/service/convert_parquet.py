"""Folders of Parquet, for a conversion: blocks of rows as the dataset has them, label texts."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from renee_ray.data import dataset as layout
from renee_ray.data import tokenizer
from renee_ray.data.lines import Int64s, SourceError
from renee_ray.data.parquet_source import (
    Block,
    ParquetSource,
    label_columns,
    read_block,
    slices,
    where,
)
from renee_ray.service.convert_plan import Plan, read_groups
from renee_ray.service.label_ids import Ids, ids_of_block


def parquet_points(plan: Plan, i: int) -> Iterator[tuple[pa.Table, dict[str, int]]]:
    """(rows of block i as the dataset has them, counts of what was odd in them), in slices.

    Raises:
        SourceError: a bad row.
    """
    assert isinstance(plan.source, ParquetSource)
    name, block, _ = plan.blocks[i]
    table = plan.source.split(name)
    ids = ids_of_block(plan, i)
    first = "input_ids" if "input_ids" in table.columns else "text"
    for rows, piece in slices(block, [first, *label_columns(table)]):
        points, duplicates = _points(plan, block, ids, rows, piece)
        yield points, {"duplicate_pairs": duplicates}


def _points(
    plan: Plan, block: Block, ids: Ids, rows: Int64s, piece: pa.Table
) -> tuple[pa.Table, int]:
    """Rows as the dataset has them, and how many labels came twice in a row."""
    columns: dict[str, pa.Array] = {"point_id": pa.array(rows)}
    if "input_ids" in piece.column_names:
        columns["input_ids"] = _given_ids(plan, block, rows, piece["input_ids"].combine_chunks())
    else:
        texts = piece["text"].to_pylist()
        columns["input_ids"] = tokenizer.encode(plan.tokenizer, texts, plan.max_length)
    duplicates = 0
    for name in ("labels", "filter_labels"):
        if name in piece.column_names:
            lists = piece[name].combine_chunks()
            columns[name], twice = _sorted_lists(_lengths(lists), ids.of(block, rows, name, lists))
            duplicates += twice if name == "labels" else 0
        else:
            nothing = pa.array([], type=pa.int64())
            offsets = pa.array(np.zeros(len(rows) + 1, dtype=np.int32))
            columns[name] = pa.ListArray.from_arrays(offsets, nothing)
    return pa.table(columns, schema=layout.POINTS), duplicates


def _given_ids(plan: Plan, block: Block, rows: Int64s, lists: pa.Array) -> pa.Array:
    """Tokens that the source has already, cut to max_length as a text's would be."""
    values = pc.cast(lists.flatten(), pa.int64()).to_numpy(zero_copy_only=False)
    bad = ~((values >= 0) & (values < plan.vocabulary_size))
    if bad.any():
        at = int(np.argmax(bad))
        row = int(np.searchsorted(np.cumsum(_lengths(lists)), at, side="right"))
        raise SourceError(
            f"{where(block, int(rows[row]) - block.first)} has the token {values[at]} and the "
            f"tokenizer has {plan.vocabulary_size}; give the tokenizer that made the tokens"
        )
    lengths = _lengths(lists)
    kept = np.minimum(lengths, plan.max_length)
    starts = np.cumsum(lengths) - lengths
    offsets = np.concatenate([[0], np.cumsum(kept)])
    places = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], kept)
    cut = (kept > 0) & (kept < lengths)
    places[offsets[1:][cut] - 1] = (starts + lengths)[cut] - 1  # the end-of-text token stays
    return pa.ListArray.from_arrays(
        pa.array(offsets.astype(np.int32)), pa.array(values[places].astype(np.int32))
    )


def _lengths(lists: pa.Array) -> Int64s:
    return pc.list_value_length(lists).to_numpy(zero_copy_only=False).astype(np.int64)


def _sorted_lists(lengths: Int64s, values: Int64s) -> tuple[pa.ListArray, int]:
    """Each row's values ascending and once, and how many were left out for that."""
    rows = np.repeat(np.arange(len(lengths)), lengths)
    order = np.lexsort((values, rows))
    rows, values = rows[order], values[order]
    kept = np.ones(len(values), dtype=bool)
    kept[1:] = (rows[1:] != rows[:-1]) | (values[1:] != values[:-1])
    offsets = np.concatenate([[0], np.cumsum(np.bincount(rows[kept], minlength=len(lengths)))])
    lists = pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values[kept]))
    return lists, int((~kept).sum())


def parquet_labels(plan: Plan, start: int, stop: int) -> pa.Array:
    """Texts of labels [start, stop): the table's, else the labels themselves."""
    assert isinstance(plan.source, ParquetSource)
    table, found = plan.source.labels, list[tuple[int, pa.ChunkedArray]]()
    if table is not None:
        column = "text" if "text" in table.columns else "label"
        for block in table.blocks:
            if block.first < stop and block.first + block.rows > start:
                found.append((block.first, read_block(block, [column])[column]))
    for bucket, (first, end) in enumerate(pairwise(plan.vocabulary)):
        if first < stop and end > start:
            groups = read_groups(plan, "vocabulary", bucket)
            found += [(first, labels["label"]) for _, labels in groups]
    pieces = [
        texts.slice(max(start - first, 0), stop - max(start, first)).cast(pa.string())
        for first, texts in found
    ]
    chunks = [chunk for piece in pieces for chunk in piece.chunks]
    return pc.fill_null(pa.concat_arrays([pa.array([], pa.string()), *chunks]), "")
