"""Folders of text files, for a conversion: their lines counted, filters by block, blocks of rows.

    count      tasks    a task a range of bytes: its line ends; a file in gzip is unpacked
    filters    tasks    a task a block of lines: its pairs to scratch files, by the block of points
                        that they belong to

A block of points then reads its lines of the texts and of the labels, and its group of each file
of filters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from renee_ray.data import dataset as layout
from renee_ray.data import tokenizer
from renee_ray.data.sources import xmlrepo
from renee_ray.data.sources.lines import (
    Counted,
    Int64s,
    Lines,
    Range,
    count,
    cuts,
    lines_of,
    ranges,
    read,
)
from renee_ray.data.sources.parquet import Block
from renee_ray.data.sources.raw import Raw, RawSplit, agreed, files_of
from renee_ray.data.sources.source import Source
from renee_ray.data.sources.xmlrepo import MAX_INFERRED_LABELS
from renee_ray.service.convert.plan import Groups, Plan, read_groups, run, write_groups


@dataclass(frozen=True)
class _Count:
    ranges: list[Range]
    scratch: str


def counted(paths: list[str], scratch: str, on_progress: Callable[[str], None]) -> dict[str, Lines]:
    """The lines of each file; those in gzip are unpacked into `scratch`.

    Raises:
        SourceError: as `renee_ray.data.sources.lines.count`.
    """
    by_path = {path: ranges(path, scratch) for path in paths}
    plan = _Count([each for parts in by_path.values() for each in parts], scratch)
    found: dict[tuple[str, int], Counted] = {}
    for result in run(_count, plan, len(plan.ranges), "files counted, ranges", on_progress):
        part = plan.ranges[result["range"]]
        found[part.path, part.start] = Counted(**result["counted"])
    return {
        path: lines_of(parts, [found[path, part.start] for part in parts])
        for path, parts in by_path.items()
    }


def _count(plan: _Count, i: int) -> dict[str, Any]:
    return {"range": i, "counted": asdict(count(plan.ranges[i]))}


def index_text(found: Source, scratch: str, on_progress: Callable[[str], None]) -> Raw:
    """The files of `found`, which agree.

    Raises:
        SourceError: as `counted` and `renee_ray.data.sources.raw.agreed`.
    """
    return agreed(found, counted(files_of(found), scratch, on_progress))


def text_blocks(split: RawSplit) -> tuple[Block, ...]:
    """The rows of a split in blocks."""
    files = [split.texts] + ([] if split.labels is None else [split.labels])
    return tuple(
        Block(split.texts.path, 0, start, stop - start) for start, stop in cuts(split.rows, *files)
    )


# ------------------------------------------------------------------------------------- filters


@dataclass(frozen=True)
class _Filters:
    plan: Plan
    pieces: tuple[tuple[str, int, int], ...]
    """(split, first and last line) of each task."""

    @property
    def scratch(self) -> str:
        return self.plan.scratch


def with_filters(plan: Plan, on_progress: Callable[[str], None]) -> Plan:
    """Brings the filter pairs to the blocks of their points.

    Raises:
        SourceError: a bad filter line.
    """
    assert isinstance(plan.source, Raw)
    splits = {"train": plan.source.train, "test": plan.source.test}
    pieces = [
        (name, start, stop)
        for name, split in splits.items()
        if split is not None and split.filters is not None
        for start, stop in cuts(split.filters.rows, split.filters)
    ]
    work, files = _Filters(plan, tuple(pieces)), []
    for result in run(_filters, work, len(pieces), "filter lines read, blocks", on_progress):
        files += [tuple(result["file"])] if result["file"] else []
    return replace(plan, files=plan.files | {"filters": tuple(sorted(files))})


def _filters(work: _Filters, i: int) -> dict[str, Groups | None]:
    name, start, stop = work.pieces[i]
    plan = work.plan
    assert isinstance(plan.source, Raw)
    split = plan.source.split(name)
    assert split.filters is not None
    limit = MAX_INFERRED_LABELS if plan.num_labels is None else plan.num_labels
    rows, labels = xmlrepo.parse_filters(read(split.filters, start, stop), split.rows, limit)
    blocks = [(i, block.first) for i, (each, block, _) in enumerate(plan.blocks) if each == name]
    firsts = np.array([first for _, first in blocks])
    keys = blocks[0][0] + np.searchsorted(firsts, rows, side="right") - 1
    order = np.argsort(keys, kind="stable")
    table = pa.table({"row": rows[order], "label": labels[order]})
    return {"file": write_groups(plan, f"filters-{i}", table, keys[order])}


# -------------------------------------------------------------------------------------- points


def text_points(plan: Plan, i: int) -> Iterator[tuple[pa.Table, dict[str, int]]]:
    """(rows of block i as the dataset has them, counts of what was odd in its lines).

    Raises:
        SourceError: a bad line.
    """
    assert isinstance(plan.source, Raw)
    name, block, _ = plan.blocks[i]
    split, stop = plan.source.split(name), block.first + block.rows
    lines = read(split.texts, block.first, stop)
    if split.labels is None:
        texts, found = xmlrepo.parse_objects(lines, plan.num_labels)
    else:
        found = xmlrepo.parse_pairs(read(split.labels, block.first, stop), plan.num_labels)
        texts = xmlrepo.texts_of(lines)
    groups = [table for _, table in read_groups(plan, "filters", i)]
    pairs = pa.concat_tables(groups) if groups else pa.table({"row": _NONE, "label": _NONE})
    filters = xmlrepo.pairs(pairs["row"].to_numpy() - block.first, pairs["label"].to_numpy())
    columns = {
        "point_id": pa.array(np.arange(block.first, stop)),
        "input_ids": tokenizer.encode(plan.tokenizer, texts.texts, plan.max_length),
        "labels": _lists(found.offsets(block.rows), found.labels),
        "filter_labels": _lists(filters.offsets(block.rows), filters.labels),
    }
    counts = {"duplicate_pairs": found.duplicates, "zero_values": found.zeros, **texts.odd()}
    yield pa.table(columns, schema=layout.POINTS), counts


_NONE = np.zeros(0, dtype=np.int64)


def _lists(offsets: Int64s, values: Int64s) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values))


def text_labels(plan: Plan, start: int, stop: int) -> tuple[pa.Array, dict[str, int]]:
    """Texts of labels [start, stop), and counts of what was odd in them.

    Raises:
        SourceError: a bad line.
    """
    assert isinstance(plan.source, Raw) and plan.source.label_texts is not None
    lines = read(plan.source.label_texts, start, stop)
    if plan.source.is_json:
        texts = xmlrepo.parse_objects(lines, None, with_labels=False)[0]
    else:
        texts = xmlrepo.texts_of(lines)
    return pa.array(texts.texts, pa.string()), texts.odd()
