"""Labels of a Parquet source -> ids, where they are strings without any task that knows all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from renee_ray.data.parquet_source import Block, Int64s, slices, where
from renee_ray.data.xmlrepo import MAX_INFERRED_LABELS, SourceError
from renee_ray.service import parquet_plan
from renee_ray.service.parquet_plan import (
    Groups,
    Plan,
    label_columns,
    read_group,
    read_parquet,
    run,
    write_groups,
    write_table,
)


def with_vocabulary(plan: Plan, on_progress: Callable[[str], None]) -> Plan:
    """Gives every label an id: its row in the labels' table, or where its string is sorted to."""
    table = plan.source.labels
    read = plan
    if table is not None:
        read = replace(plan, blocks=tuple(("labels", block) for block in table.blocks))
    groups: Groups = defaultdict(list)
    for result in run(_distinct, read, len(read.blocks), "labels read, blocks", on_progress):
        for group, bucket in enumerate(result["buckets"]):
            groups[bucket].append((result["file"], group))
    buckets = replace(
        read, points=tuple(("", bucket, tuple(groups[bucket])) for bucket in sorted(groups))
    )
    sizes = {}
    work = _check_distinct if table is not None else _vocabulary
    for result in run(work, buckets, len(buckets.points), "labels sorted, buckets", on_progress):
        sizes[result["bucket"]] = result["labels"]
    if table is not None:
        shards = tuple((block.path, block.group, block.first) for block in table.blocks)
        return replace(plan, vocabulary=shards, num_labels=table.rows)
    firsts = np.concatenate([[0], np.cumsum([sizes[bucket] for bucket in sorted(sizes)])])
    files = [f"{plan.scratch}/vocabulary-{bucket}.parquet" for bucket in sorted(sizes)]
    shards = tuple((file, 0, int(first)) for file, first in zip(files, firsts[:-1], strict=True))
    return replace(plan, vocabulary=shards, num_labels=int(firsts[-1]))


def _distinct(plan: Plan, i: int) -> dict[str, Any]:
    """The distinct label strings of a block, into a scratch file, a row group a bucket."""
    name, block = plan.blocks[i]
    columns = ["label"] if name == "labels" else label_columns(plan.source.split(name))
    found: list[pa.Array] = []
    for _, rows in slices(block, columns):
        for column in columns:
            values = rows[column].combine_chunks()
            found.append(values if name == "labels" else values.flatten())
    strings = pa.concat_arrays([pc.cast(each, pa.string()) for each in found])
    if strings.null_count:
        raise SourceError(f"{block.path} has a label that is null in row group {block.group}")
    # Of a table of labels all are kept: one that comes twice must be found.
    labels = strings if name == "labels" else pc.unique(strings)
    bucket = pd.util.hash_array(labels.to_numpy(zero_copy_only=False)) % np.uint64(_buckets(plan))
    order = np.argsort(bucket, kind="stable")
    table = pa.table({"label": labels.take(pa.array(order))})
    file = f"strings-{i}.parquet"
    buckets = write_groups(plan, file, table, bucket[order].astype(np.int64))
    return {"file": file, "buckets": buckets}


def _buckets(plan: Plan) -> int:
    """Enough that a bucket's distinct labels fit in a task, even if each row had its own three."""
    rows = sum(block.rows for _, block in plan.blocks)
    return max(1, -(-rows // parquet_plan.BUCKET_ROWS))


def _vocabulary(plan: Plan, i: int) -> dict[str, Any]:
    """A bucket's distinct labels in order, into a file of their own."""
    _, bucket, pieces = plan.points[i]
    strings = pa.concat_tables(read_group(plan, *piece) for piece in pieces)["label"]
    labels = pc.unique(strings)
    labels = labels.take(pc.array_sort_indices(labels))
    write_table(plan, f"vocabulary-{bucket}.parquet", pa.table({"label": labels}))
    return {"bucket": bucket, "labels": len(labels)}


def _check_distinct(plan: Plan, i: int) -> dict[str, Any]:
    _, bucket, pieces = plan.points[i]
    strings = pa.concat_tables(read_group(plan, *piece) for piece in pieces)["label"]
    counted = pc.value_counts(strings.combine_chunks())
    twice = counted.filter(pc.greater(counted.field("counts"), 1))
    if len(twice):
        raise SourceError(
            f"the labels' table has the label {twice[0]['values'].as_py()!r} "
            f"{twice[0]['counts'].as_py()} times; leave it once"
        )
    return {"bucket": bucket, "labels": len(counted)}


def label_ids(plan: Plan, block: Block, rows: Int64s, column: str, lists: pa.Array) -> Int64s:
    """Label ids int64 of all values of a column of lists, in their order.

    Raises:
        SourceError: a value is no label.
    """
    values = lists.flatten()
    if values.null_count:
        nulls = values.is_null().to_numpy(zero_copy_only=False)
        _refuse(block, rows, lists, nulls, column, plan.num_labels)
    if not plan.source.labels_are_strings:
        ids = pc.cast(values, pa.int64()).to_numpy()
        limit = MAX_INFERRED_LABELS if plan.num_labels is None else plan.num_labels
        bad = (ids < 0) | (ids >= limit)
        if bad.any():
            _refuse(block, rows, lists, bad, column, limit)
        return ids
    strings = pc.cast(values, pa.string())
    ids = np.full(len(strings), -1, dtype=np.int64)
    for path, group, first in plan.vocabulary:
        known = read_parquet(path, group, ["label"])["label"].combine_chunks()
        found = pc.index_in(strings, value_set=pc.cast(known, pa.string()))
        places = pc.fill_null(found, -1).to_numpy()
        ids = np.where(places >= 0, places + first, ids)
    if (ids < 0).any():
        _refuse(block, rows, lists, ids < 0, column, plan.num_labels)
    return ids


def _refuse(
    block: Block,
    rows: Int64s,
    lists: pa.Array,
    bad: np.ndarray,
    column: str,
    num_labels: int | None,
) -> NoReturn:
    """Names the first of the values that are `bad`, bool [m]."""
    at = int(np.argmax(bad))
    offsets = lists.offsets.to_numpy() - lists.offsets[0].as_py()
    row = int(np.searchsorted(offsets, at, side="right")) - 1
    known = "" if num_labels is None else f", which is none of the {num_labels} labels"
    raise SourceError(
        f"{where(block, int(rows[row]) - block.first)} has {lists.flatten()[at].as_py()!r} in "
        f"{column}{known}; correct it"
    )
