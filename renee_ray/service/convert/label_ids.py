"""Gives labels that are strings ids, without any task that knows all of them.

    strings    tasks    a task a block, of points and of the labels' table: its distinct labels to
                        scratch files, by bucket of their hash
    join       tasks    a task a bucket: its distinct labels get ids, their rows in the table or
                        where they are sorted to; labels with ids to scratch files, by block

A block of points then reads its own labels' ids, its group of each bucket's file.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from renee_ray.data.sources.columns import LABELS
from renee_ray.data.sources.records import (
    MAX_INFERRED_LABELS,
    Block,
    Int64s,
    Records,
    Source,
    SourceError,
)
from renee_ray.errors import Progress
from renee_ray.service.convert import conversion as shared
from renee_ray.service.convert.conversion import (
    Conversion,
    Groups,
    read_group,
    read_groups,
    run,
    write_groups,
)

TABLE = "labels"
"""Stands for a split in the blocks of the labels' table."""


@dataclass(frozen=True)
class Vocabulary:
    """A table of labels that was made of the points' labels.

    blocks: one for each bucket with labels (`group`), in a scratch file each.
    """

    blocks: tuple[Block, ...]
    columns = ("label",)

    def read(self, block: Block, columns: Collection[str]) -> Iterator[Records]:
        table = read_group(block.path, block.group)
        assert table is not None
        labels = table["label"].combine_chunks()
        yield Records(block.first, {"label": labels}, lambda row: f"label {block.first + row}")


def with_label_ids(conversion: Conversion, on_progress: Progress) -> Conversion:
    """Gives every label that is a string an id.

    Raises:
        SourceError: a label that is null, or twice in the table.
    """
    source, scratch = conversion.source, conversion.scratch
    if not source.labels_are_strings:
        return conversion
    blocks = [(name, block) for name, block, _ in conversion.blocks]
    blocks += [] if source.labels is None else [(TABLE, block) for block in source.labels.blocks]
    # So many that a bucket's labels fit in a task, even if each row had three of its own.
    buckets = -(-sum(block.rows for _, block in blocks) // shared.BUCKET_ROWS)
    tasks = [(i, *block, buckets) for i, block in enumerate(blocks)]
    strings: list[Groups] = []
    for result in run(_strings, conversion, tasks, scratch, "labels read, blocks", on_progress):
        strings += map(tuple, result["files"])
    asked = replace(conversion, files={"strings": tuple(sorted(strings))})
    made: dict[int, tuple[int, list[Groups]]] = {}
    ids: list[Groups] = []
    what = "labels sorted, buckets"
    for result in run(_join, asked, range(buckets), scratch, what, on_progress):
        made[result["bucket"]] = result["labels"], result["vocabulary"]
        ids += map(tuple, result["ids"])
    if source.labels is None:
        source = _with_vocabulary(source, scratch, made)
    files = conversion.files | {"ids": tuple(sorted(ids))}
    return replace(conversion, source=source, files=files)


def _with_vocabulary(
    source: Source, scratch: str, made: dict[int, tuple[int, list[Groups]]]
) -> Source:
    """Gives the source the labels that each bucket has made: (their number, their file)."""
    blocks, first = list[Block](), 0
    for bucket in sorted(made):
        number, files = made[bucket]
        blocks += [Block(f"{scratch}/{name}", first, number, bucket) for name, _, _ in files]
        first += number
    return replace(source, labels=Vocabulary(tuple(blocks)), num_labels=first)


def refuse_multi_hot(source: Source, greatest: int, duplicates: int) -> None:
    """Refuses lists of 0 and 1 for every label that were read as ids.

    Args:
        greatest: the greatest id. duplicates: number of ids that a point has already.

    Raises:
        SourceError: there are ids 0 and 1 alone, and points that have one more than once.
    """
    if source.labels_are_strings or greatest > 1 or not duplicates:
        return
    raise SourceError(
        f"{source.labelled_path} has the labels 0 and 1 alone and repeats them in rows, as rows "
        f"with a 0 or 1 for every label (multi-hot) do; write the ids of each point's labels, or "
        f"give labels=multi-hot, which reads such rows of Parquet, or labels=ids if they are ids"
    )


def _strings(conversion: Conversion, task: tuple[int, str, Block, int]) -> dict[str, Any]:
    """Finds the distinct labels of a block of points, or all labels of one of the table."""
    i, name, block, num_buckets = task
    source = conversion.source
    table = source.labels if name == TABLE else source.splits[name]
    assert table is not None
    wanted = ["label"] if name == TABLE else [each for each in LABELS if each in table.columns]
    found = [pa.array([], pa.string())]
    for records in table.read(block, wanted):
        for values in records.columns.values():
            found.append(pc.cast(values if name == TABLE else values.flatten(), pa.string()))
    labels = pa.concat_arrays(found)
    labels = labels if name == TABLE else pc.unique(labels)
    # A label of the table comes with its id, a label of points with the block that asks for it.
    first = np.arange(block.first, block.first + len(labels))
    ids = first if name == TABLE else np.full(len(labels), i)
    hashes = pd.util.hash_array(labels.to_numpy(zero_copy_only=False))
    buckets = (hashes % np.uint64(num_buckets)).astype(np.int64)
    order = np.argsort(buckets, kind="stable")
    grouped = pa.table({"label": labels, "id": ids}).take(pa.array(order))
    return {"files": write_groups(conversion, f"{name}-strings-{i}", grouped, buckets[order])}


def _join(conversion: Conversion, bucket: int) -> dict[str, Any]:
    """Gives the bucket's labels ids, or places in the bucket, for the blocks that have them."""
    empty = pa.table({"label": pa.array([], pa.string()), "id": pa.array([], pa.int64())})
    known, asked = [empty], [empty]
    for name, table in read_groups(conversion, "strings", bucket):
        (known if name.startswith(TABLE) else asked).append(table)
    wanted, vocabulary = pa.concat_tables(asked).combine_chunks(), list[Groups]()
    if conversion.source.labels is None:
        labels = pc.unique(wanted["label"])
        labels = labels.take(pc.array_sort_indices(labels))
        ids = pa.array(np.arange(len(labels)))
        made, keys = pa.table({"label": labels}), np.full(len(labels), bucket)
        vocabulary = write_groups(conversion, f"vocabulary-{bucket}", made, keys)
    else:
        given = pa.concat_tables(known).combine_chunks()
        labels, ids = given["label"].combine_chunks(), given["id"].combine_chunks()
        _check_distinct(labels)
    at = pc.index_in(wanted["label"], value_set=labels)
    table = pa.table({"label": wanted["label"], "id": ids.take(at), "block": wanted["id"]})
    table = table.filter(at.is_valid()).sort_by("block")
    keys = table["block"].to_numpy()
    table = table.drop_columns(["block"])
    files = write_groups(conversion, f"ids-{bucket:08d}", table, keys)
    return {"bucket": bucket, "labels": len(labels), "vocabulary": vocabulary, "ids": files}


def _check_distinct(labels: pa.Array) -> None:
    counted = pc.value_counts(labels)
    twice = counted.filter(pc.greater(counted.field("counts"), 1))
    if len(twice):
        raise SourceError(
            f"the labels' table has the label {twice[0]['values'].as_py()!r} "
            f"{twice[0]['counts'].as_py()} times; leave it once"
        )


@dataclass(frozen=True)
class LabelIds:
    """The ids of a block's labels. labels: None where the source has ids itself."""

    num_labels: int | None
    labels: pa.Array | None
    ids: Int64s

    @classmethod
    def of_block(cls, conversion: Conversion, i: int) -> LabelIds:
        """Reads the ids of the labels of block i of points."""
        source = conversion.source
        if not source.labels_are_strings:
            return cls(source.num_labels, None, np.zeros(0, np.int64))
        firsts = defaultdict[int, int](int)
        if isinstance(source.labels, Vocabulary):
            firsts.update({block.group: block.first for block in source.labels.blocks})
        labels, ids = [pa.array([], pa.string())], [np.zeros(0, np.int64)]
        for name, table in read_groups(conversion, "ids", i):
            labels += table["label"].chunks
            ids.append(table["id"].to_numpy() + firsts[int(name.rpartition("-")[2])])
        return cls(source.num_labels, pa.concat_arrays(labels), np.concatenate(ids))

    def of(self, records: Records, column: str) -> tuple[Int64s, Int64s]:
        """Looks up a column of lists of labels.

        Returns:
            (place of the row, id) of each label, int64, in their order.

        Raises:
            SourceError: a value is no label.
        """
        if column not in records.columns:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        lists = records.columns[column]
        values, lengths = lists.flatten(), pc.list_value_length(lists).to_numpy()
        rows, limit = np.repeat(np.arange(len(lists)), lengths), self.num_labels
        if self.labels is not None:
            at = pc.index_in(pc.cast(values, pa.string()), value_set=self.labels)
            ids = np.append(self.ids, -1)[pc.fill_null(at, -1).to_numpy()]
            bad = ids < 0
        else:
            ids = values.to_numpy()
            limit = MAX_INFERRED_LABELS if limit is None else limit
            bad = (ids < 0) | (ids >= limit)
        if bad.any():
            first = int(np.argmax(bad))
            number = len(self.ids) if limit is None else limit
            raise SourceError(
                f"{records.where(int(rows[first]))} has {values[first].as_py()!r} in {column}, "
                f"which is none of the {number} labels; correct it"
            )
        return rows, ids
