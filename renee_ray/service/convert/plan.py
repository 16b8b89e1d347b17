"""What the tasks of a conversion share, and their files in between.

A scratch file holds groups of rows by key, one after another (Arrow streams), and at its end
where each begins: int64 keys, offsets and their number. A task reads its key's group of each file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from renee_ray.data.sources.lines import Int64s
from renee_ray.data.sources.parquet import Block, ParquetSource
from renee_ray.data.sources.raw import Raw
from renee_ray.data.split import Shuffle
from renee_ray.data.storage import filesystem_of, patiently, write_file
from renee_ray.service.tasks import Reporter, stream

BUCKET_ROWS = 1 << 19
"""Rows of a bucket of the shuffle, and labels of a range, about: what a task holds."""

PART_ROWS, PARTS = 2048, 1024
"""Rows of a part at the least, and parts of a split at the most, where the user chose neither."""

JOURNAL = "done"
"""Directory of scratch with the results of tasks, for a conversion that is cut off."""
TAIL_BYTES = 1 << 16
"""Of a scratch file, read at first: the places of some thousand groups."""

Groups = tuple[str, int, int]
"""A scratch file and the first and last key it has a group of."""


@dataclass(frozen=True)
class Plan:
    """What every task is given. Its size goes with the number of blocks, not of rows.

    blocks: (split, block, rows of its split before it that are held out) of each task that reads
        the source.
    vocabulary: where it is made of strings, the first id of each of its buckets, and their number.
    files: the scratch files by what is in them.
    tasks: (what, key) of each task that reads scratch files.
    part_rows: rows of a part of each split that is written.
    """

    source: Raw | ParquetSource
    dst: str
    scratch: str
    tokenizer: str
    vocabulary_size: int
    max_length: int
    bucket_rows: int
    shuffle: Shuffle
    blocks: tuple[tuple[str, Block, int], ...]
    files: dict[str, tuple[Groups, ...]]
    vocabulary: tuple[int, ...] = ()
    num_labels: int | None = None
    tasks: tuple[tuple[str, int], ...] = ()
    part_rows: dict[str, int] = field(default_factory=dict)


def bucket_rows(chosen: int) -> int:
    """Rows of a bucket: a multiple of the rows of a part, `chosen` by the user if not 0."""
    least = chosen or PART_ROWS
    return least * max(1, BUCKET_ROWS // least)


def part_rows(chosen: int, rows: int, bucket: int) -> int:
    """Rows of a part in a split of so many `rows`: `chosen`, or so many that parts are few."""
    size = chosen or PART_ROWS
    while not chosen and rows > PARTS * size and bucket % (2 * size) == 0:
        size *= 2
    return size


def run(
    work: Callable[[Any, int], dict[str, Any]],
    plan: Any,
    tasks: int,
    what: str,
    on_progress: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """Results of work(plan, i) for i in [0, tasks), in any order, and progress said.

    Args:
        plan: has a directory `scratch`, where results are kept.
    """
    reporter = Reporter(what, tasks, on_progress)
    for result in stream(work, plan, tasks, f"{plan.scratch}/{JOURNAL}"):
        reporter.one_more()
        yield result


def keys_of(files: tuple[Groups, ...]) -> range:
    """All keys that a scratch file may have a group of."""
    if not files:
        return range(0)
    return range(min(first for _, first, _ in files), max(last for _, _, last in files) + 1)


def write_groups(plan: Plan, name: str, table: pa.Table, keys: Int64s) -> Groups | None:
    """Writes a scratch file with a group for each value of `keys`, which ascend."""
    if not len(table):
        return None
    values, starts = np.unique(keys, return_index=True)
    sink = pa.BufferOutputStream()
    offsets = []
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    for start, stop in zip(starts, [*starts[1:], len(table)], strict=True):
        offsets.append(sink.tell())
        with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
            writer.write_table(table.slice(start, stop - start).combine_chunks())
    index = np.array([*values, *offsets, sink.tell(), len(values)], dtype="<i8")
    sink.write(index.tobytes())
    write_file(f"{plan.scratch}/{name}", sink.getvalue())
    return name, int(values[0]), int(values[-1])


def read_groups(plan: Plan, what: str, key: int) -> Iterator[tuple[str, pa.Table]]:
    """(file, its rows) of each scratch file of `what` that has a group for `key`."""
    for name, first, last in plan.files.get(what, ()):
        if first <= key <= last:
            path = f"{plan.scratch}/{name}"
            table = patiently(partial(_read_group, path, key), f"reading {path}")
            if table is not None:
                yield name, table


def _read_group(path: str, key: int) -> pa.Table | None:
    filesystem, root = filesystem_of(path)
    with filesystem.open_input_file(root) as file:
        size = file.size()
        tail = file.read_at(min(size, TAIL_BYTES), max(size - TAIL_BYTES, 0))
        count = int(np.frombuffer(tail[-8:], "<i8")[0])
        needed = 8 * (2 * count + 2)
        if needed > len(tail):
            tail = file.read_at(needed, size - needed)
        index = np.frombuffer(tail[-needed:], "<i8")
        at = int(np.searchsorted(index[:count], key))
        if at == count or index[at] != key:
            return None
        start, stop = index[count + at : count + at + 2].tolist()
        return pa.ipc.open_stream(file.read_at(stop - start, start)).read_all()
