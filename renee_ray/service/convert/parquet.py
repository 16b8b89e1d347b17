"""Folders of Parquet, for a conversion: blocks of rows as the dataset has them, label texts."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from renee_ray.data import dataset as layout
from renee_ray.data import tokenizer
from renee_ray.data.sources.columns import texts_of
from renee_ray.data.sources.lines import Int64s, SourceError
from renee_ray.data.sources.parquet import Block, ParquetSource, label_columns, slices, where
from renee_ray.service.convert.label_ids import Ids, ids_of_block
from renee_ray.service.convert.plan import Plan, read_groups


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
    for rows, piece in slices(block, [first, *label_columns(table)], plan.source.width):
        yield _points(plan, block, ids, rows, piece)


def _points(
    plan: Plan, block: Block, ids: Ids, rows: Int64s, piece: dict[str, pa.Array]
) -> tuple[pa.Table, dict[str, int]]:
    """Rows as the dataset has them, and counts of what was odd in them."""
    columns: dict[str, pa.Array] = {"point_id": pa.array(rows)}
    odd = {"duplicate_pairs": 0}
    if "input_ids" in piece:
        columns["input_ids"] = _given_ids(plan, block, rows, piece["input_ids"])
    else:
        texts = texts_of(piece["text"])
        columns["input_ids"] = tokenizer.encode(plan.tokenizer, texts.texts, plan.max_length)
        odd |= texts.odd()
    for name in ("labels", "filter_labels"):
        if name in piece:
            lists = piece[name]
            columns[name], twice = _sorted_lists(_lengths(lists), ids.of(block, rows, name, lists))
            odd["duplicate_pairs"] += twice if name == "labels" else 0
        else:
            nothing = pa.array([], type=pa.int64())
            offsets = pa.array(np.zeros(len(rows) + 1, dtype=np.int32))
            columns[name] = pa.ListArray.from_arrays(offsets, nothing)
    return pa.table(columns, schema=layout.POINTS), odd


def _given_ids(plan: Plan, block: Block, rows: Int64s, lists: pa.Array) -> pa.Array:
    """Tokens that the source has already, cut to max_length as a text's would be."""
    values = lists.flatten().to_numpy()
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


def parquet_labels(plan: Plan, start: int, stop: int) -> tuple[pa.Array, dict[str, int]]:
    """Texts of labels [start, stop), and counts of what was odd in them.

    They are the table's, else the names in the metadata, else the labels themselves.
    """
    assert isinstance(plan.source, ParquetSource)
    table, found = plan.source.labels, list[tuple[int, pa.Array]]()
    if plan.source.class_names is not None:
        found.append((0, pa.array(plan.source.class_names, pa.string())))
    if table is not None:
        column = "text" if "text" in table.columns else "label"
        for block in table.blocks:
            if block.first < stop and block.first + block.rows > start:
                found += [(int(rows[0]), piece[column]) for rows, piece in slices(block, [column])]
    for bucket, (first, end) in enumerate(pairwise(plan.vocabulary)):
        if first < stop and end > start:
            groups = read_groups(plan, "vocabulary", bucket)
            found += [(first, labels["label"].combine_chunks()) for _, labels in groups]
    pieces = [
        pc.cast(texts.slice(max(start - first, 0), stop - max(start, first)), pa.large_binary())
        for first, texts in found
        if first < stop and first + len(texts) > start
    ]
    texts = texts_of(pa.concat_arrays([pa.array([], pa.large_binary()), *pieces]))
    return pa.array(texts.texts, pa.string()), texts.odd()
