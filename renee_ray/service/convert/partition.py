"""Brings points to the buckets, and their labels to the ranges, that parts are written from.

partition    tasks    a task a block: its points to scratch files, by bucket of the shuffle;
                      its counts of labels, by range of ids
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from renee_ray.data import dataset as layout
from renee_ray.data import tokenizer
from renee_ray.data.dataset import MAX_LABELS
from renee_ray.data.sources.columns import LABELS
from renee_ray.data.sources.records import Int64s, Records, SourceError, odd_texts
from renee_ray.errors import Progress
from renee_ray.service.convert.conversion import (
    HELD,
    Conversion,
    Groups,
    part_rows,
    run,
    write_groups,
)
from renee_ray.service.convert.label_ids import LabelIds, refuse_multi_hot
from renee_ray.service.convert.statistics import add, totals_of

COUNTS = pa.schema({"label": pa.int64(), "train": pa.int64(), "filter": pa.int64()})


@dataclass(frozen=True)
class Partitioned:
    """What is known when all points have been read and found good.

    rows: of each split, and of "labels". part_rows: rows of a part of each.
    totals: counts for the statistics of each.
    """

    rows: dict[str, int]
    part_rows: dict[str, int]
    totals: dict[str, Counter[str]]

    @property
    def paths(self) -> list[str]:
        """The paths of all parts that will be written."""
        return [
            layout.part_path(name, index)
            for name, rows in self.rows.items()
            for index in range(-(-rows // self.part_rows[name]))
        ]


def partition(conversion: Conversion, on_progress: Progress) -> tuple[Conversion, Partitioned]:
    """Reads all points into scratch files.

    Returns:
        (the conversion with these files and the number of labels, what was found)

    Raises:
        SourceError: a bad row, or no training point has a label.
    """
    source, files = conversion.source, defaultdict[str, list[Groups]](list)
    totals: dict[str, Counter[str]] = {name: Counter() for name in layout.SPLITS}
    for name, counts in source.odd.items():
        add(totals[name], counts)
    least, greatest, blocks = MAX_LABELS, -1, range(len(conversion.blocks))
    scratch = conversion.scratch
    for result in run(_partition, conversion, blocks, scratch, "blocks read", on_progress):
        for what, groups in result["files"].items():
            files[what] += map(tuple, groups)
        for name, counts in result["totals"].items():
            add(totals[name], counts)
        least, greatest = min(least, result["least"]), max(greatest, result["greatest"])
    if not totals["train"]["label_pairs"] + totals["validation"]["label_pairs"]:
        raise SourceError(
            f"{source.labelled_path} gives no training point a label; there is nothing to learn"
        )
    if conversion.config.labels not in ("ids", "multi-hot"):
        duplicates = sum(total["duplicate_pairs"] for total in totals.values())
        refuse_multi_hot(source, greatest, duplicates)
    totals["labels"]["least_id"], totals["labels"]["greatest_id"] = least, greatest
    num_labels = greatest + 1 if source.num_labels is None else source.num_labels
    rows = {name: totals[name]["rows"] for name in layout.SPLITS} | {"labels": num_labels}
    chosen, size = conversion.config.part_rows, conversion.bucket_rows
    sizes = {name: part_rows(chosen, number, size) for name, number in rows.items()}
    sorted_files = {what: tuple(sorted(groups)) for what, groups in files.items()}
    conversion = replace(
        conversion,
        source=replace(source, num_labels=num_labels),
        files=conversion.files | sorted_files,
    )
    return conversion, Partitioned(rows, sizes, totals)


def _partition(conversion: Conversion, i: int) -> dict[str, Any]:
    name, block, before = conversion.blocks[i]
    table, label_ids = conversion.source.splits[name], LabelIds.of_block(conversion, i)
    files, counts = defaultdict[str, list[Groups]](list), [COUNTS.empty_table()]
    least, greatest = MAX_LABELS, -1
    totals: dict[str, Counter[str]] = defaultdict(Counter)
    held = dict(zip(HELD, before, strict=True))
    for number, records in enumerate(table.read(block, table.columns)):
        points, odd = _points(conversion, records, label_ids)
        for column in LABELS:
            values = points[column].combine_chunks().flatten()
            if len(values):
                ends = pc.min_max(values)
                least = min(least, ends["min"].as_py())
                greatest = max(greatest, ends["max"].as_py())
        ids = points["point_id"].to_numpy()
        for split, rows, buckets in _destinations(conversion, name, ids, held):
            mine = points.take(pa.array(rows))
            files[split] += write_groups(conversion, f"{split}-{i}-{number}", mine, buckets)
            add(totals[split], totals_of(mine, conversion.config.max_length))
            if name == "train" and split in held:
                held[split] += len(rows)
            if name == "train" and split != "test":
                counts.append(_counts(mine, split))
        add(totals[name], odd)
    summed = _summed(pa.concat_tables(counts))
    keys = summed["label"].to_numpy() // conversion.bucket_rows
    files["counts"] += write_groups(conversion, f"counts-{i}", summed, keys)
    return {"files": files, "totals": totals, "least": least, "greatest": greatest}


def _destinations(
    conversion: Conversion, name: str, points: Int64s, held: dict[str, int]
) -> Iterator[tuple[str, Int64s, Int64s]]:
    """Yields (split, places among `points` of its rows in their order there, their buckets).

    Args:
        held: rows of the split held out before these, for each of HELD.
    """
    if name != "train":
        yield name, np.arange(len(points)), points // conversion.bucket_rows
        return
    splits = conversion.shuffle.splits(points)
    kept = np.flatnonzero(splits == len(HELD))
    keys = conversion.shuffle.keys(points[kept])
    order = np.argsort(keys)
    yield "train", kept[order], conversion.shuffle.buckets(keys[order])
    for number, split in enumerate(HELD):
        rows = np.flatnonzero(splits == number)
        yield split, rows, (held[split] + np.arange(len(rows))) // conversion.bucket_rows


def _counts(points: pa.Table, split: str) -> pa.Table:
    """Counts the points with each label, and those, not held out, with it as a filter label."""
    pieces = []
    for column, target in (("labels", "train"), ("filter_labels", "filter")):
        if target == "filter" and split == "validation":
            continue
        labels, counts = np.unique(
            points[column].combine_chunks().flatten().to_numpy(), return_counts=True
        )
        zeros = np.zeros_like(labels)
        both = {"label": labels, "train": zeros, "filter": zeros, target: counts}
        pieces.append(pa.table(both, schema=COUNTS))
    return pa.concat_tables(pieces)


def _summed(counts: pa.Table) -> pa.Table:
    found = counts.group_by("label").aggregate([("train", "sum"), ("filter", "sum")])
    columns = found.select(["label", "train_sum", "filter_sum"]).rename_columns(COUNTS.names)
    return columns.sort_by("label").cast(COUNTS)


def _points(
    conversion: Conversion, records: Records, ids: LabelIds
) -> tuple[pa.Table, dict[str, int]]:
    columns, number = {"point_id": records.numbers()}, len(records)
    columns["labels"], duplicates = _sorted_lists(number, *ids.of(records, "labels"))
    columns["filter_labels"], _ = _sorted_lists(number, *ids.of(records, "filter_labels"))
    odd = {"duplicate_pairs": duplicates}
    if "input_ids" in records.columns:
        columns["input_ids"] = given_tokens(conversion, records)
    else:
        texts = records.columns["text"].to_pylist()
        columns["input_ids"] = conversion.encode(texts)
        odd |= odd_texts(texts, records.replaced)
    return pa.table(columns, schema=layout.POINTS), odd


def _sorted_lists(num_rows: int, rows: Int64s, values: Int64s) -> tuple[pa.ListArray, int]:
    """Sorts the values of each row; returns the lists and the number of duplicates left out.

    Args:
        rows: the place of each value's row.
    """
    width = int(values.max(initial=0)) + 1
    keys = np.unique(rows * width + values)
    offsets = np.searchsorted(keys, np.arange(num_rows + 1) * width).astype(np.int32)
    lists = pa.ListArray.from_arrays(pa.array(offsets), pa.array(keys % width))
    return lists, len(values) - len(keys)


def given_tokens(conversion: Conversion, records: Records) -> pa.Array:
    """Cuts the tokens that the source has to max_length, as those of a text would be."""
    lists, num_tokens = (
        records.columns["input_ids"],
        tokenizer.size(conversion.vocabulary.serialised),
    )
    values = lists.flatten().to_numpy()
    lengths = pc.list_value_length(lists).to_numpy()
    bad = ~((values >= 0) & (values < num_tokens))
    if bad.any():
        at = int(np.argmax(bad))
        row = int(np.searchsorted(np.cumsum(lengths), at, side="right"))
        raise SourceError(
            f"{records.where(row)} has the token {values[at]} and the tokenizer has {num_tokens}; "
            f"give the tokenizer that made the tokens"
        )
    kept = np.minimum(lengths, conversion.config.max_length)
    starts = np.cumsum(lengths) - lengths
    offsets = np.concatenate([[0], np.cumsum(kept)])
    places = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], kept)
    cut = kept < lengths
    places[offsets[1:][cut] - 1] = (starts + lengths)[cut] - 1  # the end-of-text token stays
    return pa.ListArray.from_arrays(
        pa.array(offsets.astype(np.int32)), pa.array(values[places].astype(np.int32))
    )
