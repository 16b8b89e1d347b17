"""Labels of a Parquet source -> ids, where they are strings without any task that knows all.

    strings    tasks    a task a block, of points and of the labels' table: its distinct labels to
                        scratch files, by bucket of their hash
    join       tasks    a task a bucket: its distinct labels get ids, their rows in the table or
                        where they are sorted to; labels with ids to scratch files, by block

A block of points then reads its own labels' ids, its group of each bucket's file.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from renee_ray.data.sources.lines import Int64s, SourceError
from renee_ray.data.sources.parquet import Block, ParquetSource, label_columns, slices, where
from renee_ray.data.sources.raw import Raw
from renee_ray.data.sources.xmlrepo import MAX_INFERRED_LABELS
from renee_ray.service.convert import plan as convert_plan
from renee_ray.service.convert.plan import Groups, Plan, read_groups, run, write_groups

TABLE = "labels"
"""Stands for a split in the blocks of the labels' table."""


def with_vocabulary(plan: Plan, on_progress: Callable[[str], None]) -> Plan:
    """Gives every label that is a string an id.

    Raises:
        SourceError: a label that is null, or twice in the table.
    """
    source = plan.source
    assert isinstance(source, ParquetSource)
    if not source.labels_are_strings:
        return plan
    table = () if source.labels is None else source.labels.blocks
    blocks = plan.blocks + tuple((TABLE, block, 0) for block in table)
    # So many that a bucket's labels fit in a task, even if each row had three of its own.
    rows = sum(block.rows for _, block, _ in blocks)
    buckets = tuple(("strings", key) for key in range(-(-rows // convert_plan.BUCKET_ROWS)))
    read = replace(plan, blocks=blocks, tasks=buckets)
    strings: list[Groups] = []
    for result in run(_strings, read, len(read.blocks), "labels read, blocks", on_progress):
        strings += [tuple(result["file"])] if result["file"] else []
    read = replace(read, files={"strings": tuple(sorted(strings))})
    sizes, files = [0] * len(buckets), defaultdict[str, list[Groups]](list)
    for result in run(_join, read, len(buckets), "labels sorted, buckets", on_progress):
        sizes[result["bucket"]] = result["labels"]
        for what, groups in result["files"]:
            files[what].append(tuple(groups))
    plan = replace(plan, files={what: tuple(sorted(groups)) for what, groups in files.items()})
    if source.labels is not None:
        return plan
    firsts = np.cumsum([0, *sizes]).tolist()
    return replace(plan, vocabulary=tuple(firsts), num_labels=firsts[-1])


def refuse_multi_hot(source: Raw | ParquetSource, greatest: int, duplicates: int) -> None:
    """Refuses lists of 0 and 1 for every label that were read as ids.

    Args:
        greatest: the greatest id. duplicates: ids that a point has already.

    Raises:
        SourceError: there are ids 0 and 1 alone, and points that have one more than once.
    """
    strings = isinstance(source, ParquetSource) and source.labels_are_strings
    if strings or greatest > 1 or not duplicates:
        return
    remedy = "give labels=multi-hot to read them so, or labels=ids if they are ids"
    if not isinstance(source, ParquetSource):
        remedy = "write the ids of each point's labels, or give labels=ids if they are ids"
    raise SourceError(
        f"{source.labelled_path} has the labels 0 and 1 alone and repeats them in rows, as rows "
        f"with a 0 or 1 for every label (multi-hot) do; {remedy}"
    )


def _strings(plan: Plan, i: int) -> dict[str, Any]:
    """Distinct labels of a block of points; all of the table's, with their rows."""
    assert isinstance(plan.source, ParquetSource)
    name, block, _ = plan.blocks[i]
    of_table = name == TABLE
    columns = ["label"] if of_table else label_columns(plan.source.split(name))
    found: list[pa.Array] = []
    for _, rows in slices(block, columns):
        for values in rows.values():
            found.append(pc.cast(values if of_table else values.flatten(), pa.string()))
    labels = pa.concat_arrays(found)
    labels = labels if of_table else pc.unique(labels)
    ids = np.arange(block.first, block.first + len(labels)) if of_table else np.full(len(labels), i)
    hashes = pd.util.hash_array(labels.to_numpy(zero_copy_only=False))
    buckets = (hashes % np.uint64(len(plan.tasks))).astype(np.int64)
    order = np.argsort(buckets, kind="stable")
    # Of points, `id` is the block that asks.
    table = pa.table({"label": labels, "id": ids}).take(pa.array(order))
    return {"file": write_groups(plan, f"{name}-strings-{i}", table, buckets[order])}


def _join(plan: Plan, i: int) -> dict[str, Any]:
    """The bucket's labels with their ids, or places in the bucket, by the blocks that have them."""
    assert isinstance(plan.source, ParquetSource)
    _, bucket = plan.tasks[i]
    empty = pa.table({"label": pa.array([], pa.string()), "id": pa.array([], pa.int64())})
    known, asked = [empty], [empty]
    for name, table in read_groups(plan, "strings", bucket):
        (known if name.startswith(TABLE) else asked).append(table)
    wanted, files = pa.concat_tables(asked).combine_chunks(), []
    if plan.source.labels is None:
        labels = pc.unique(wanted["label"])
        labels = labels.take(pc.array_sort_indices(labels))
        ids = pa.array(np.arange(len(labels)))
        made, keys = pa.table({"label": labels}), np.full(len(labels), bucket)
        files.append(("vocabulary", write_groups(plan, f"vocabulary-{bucket}", made, keys)))
    else:
        given = pa.concat_tables(known).combine_chunks()
        labels, ids = given["label"].combine_chunks(), given["id"].combine_chunks()
        _check_distinct(labels)
    at = pc.index_in(wanted["label"], value_set=labels)
    table = pa.table({"label": wanted["label"], "id": ids.take(at), "block": wanted["id"]})
    table = table.filter(at.is_valid()).sort_by("block")
    keys = table["block"].to_numpy()
    table = table.drop_columns(["block"])
    files.append(("ids", write_groups(plan, f"ids-{bucket:08d}", table, keys)))
    found = [(what, groups) for what, groups in files if groups]
    return {"bucket": bucket, "labels": len(labels), "files": found}


def _check_distinct(labels: pa.Array) -> None:
    counted = pc.value_counts(labels)
    twice = counted.filter(pc.greater(counted.field("counts"), 1))
    if len(twice):
        raise SourceError(
            f"the labels' table has the label {twice[0]['values'].as_py()!r} "
            f"{twice[0]['counts'].as_py()} times; leave it once"
        )


@dataclass(frozen=True)
class Ids:
    """The ids of a block's labels. labels: None where the source has ids itself."""

    num_labels: int | None
    labels: pa.Array | None
    ids: Int64s

    def of(self, block: Block, rows: Int64s, column: str, lists: pa.Array) -> Int64s:
        """Label ids int64 of all values of a column of lists, in their order.

        Raises:
            SourceError: a value is no label.
        """
        values = lists.flatten()
        limit = self.num_labels
        if self.labels is not None:
            at = pc.index_in(pc.cast(values, pa.string()), value_set=self.labels)
            ids = np.append(self.ids, -1)[pc.fill_null(at, -1).to_numpy()]
            bad = ids < 0
        else:
            ids = values.to_numpy()
            limit = MAX_INFERRED_LABELS if limit is None else limit
            bad = (ids < 0) | (ids >= limit)
        if bad.any():
            _refuse(block, rows, lists, bad, column, limit)
        return ids


def ids_of_block(plan: Plan, i: int) -> Ids:
    """The ids of the labels of block i."""
    assert isinstance(plan.source, ParquetSource)
    if not plan.source.labels_are_strings:
        return Ids(plan.num_labels, None, np.zeros(0, np.int64))
    labels, ids = [pa.array([], pa.string())], [np.zeros(0, np.int64)]
    for name, table in read_groups(plan, "ids", i):
        labels += table["label"].chunks
        first = plan.vocabulary[int(name.rpartition("-")[2])] if plan.vocabulary else 0
        ids.append(table["id"].to_numpy() + first)
    return Ids(plan.num_labels, pa.concat_arrays(labels), np.concatenate(ids))


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
