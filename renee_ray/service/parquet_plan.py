"""What the tasks of a conversion from Parquet share, and their files in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from renee_ray.data.parquet_source import Block, Int64s, ParquetSource, Table
from renee_ray.data.storage import filesystem_of, patiently, write_file
from renee_ray.service.tasks import Reporter, stream

BUCKET_ROWS = 1 << 19
"""Rows of a bucket of the shuffle, and labels of a range, about: what a task holds."""

JOURNAL = "done"
"""Directory of scratch with the results of tasks, for a conversion that is cut off."""
Groups = dict[int, list[tuple[str, int]]]
"""By bucket or range: (scratch file, row group) of what it has in each."""


@dataclass(frozen=True)
class Plan:
    """What every task is given; arrays are shared, not copied, on a node.

    places: "train" -> int64 [rows], the position of each row of the source in train, or
        -1 - its position in validation; test keeps its order.
    blocks: (split, block) of each task that reads the source.
    vocabulary: of labels that are strings, (file, row group, id of its first label).
    points: (split, bucket, its pieces) of each task that writes points.
    labels: (range, its pieces) of each task that writes labels.
    """

    source: ParquetSource
    dst: str
    scratch: str
    tokenizer: str
    vocabulary_size: int
    max_length: int
    part_rows: int
    places: dict[str, Int64s]
    blocks: tuple[tuple[str, Block], ...]
    vocabulary: tuple[tuple[str, int, int], ...] = ()
    num_labels: int | None = None
    points: tuple[tuple[str, int, tuple[tuple[str, int], ...]], ...] = ()
    labels: tuple[tuple[int, tuple[tuple[str, int], ...]], ...] = ()

    @property
    def bucket_rows(self) -> int:
        """A multiple of `part_rows`."""
        return self.part_rows * max(1, BUCKET_ROWS // self.part_rows)


def run(
    work: Callable[[Plan, int], dict[str, Any]],
    plan: Plan,
    tasks: int,
    what: str,
    on_progress: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """Results of work(plan, i) for i in [0, tasks), in any order, and progress said."""
    reporter = Reporter(what, tasks, on_progress)
    for result in stream(work, plan, tasks, f"{plan.scratch}/{JOURNAL}"):
        reporter.one_more()
        yield result


def label_columns(table: Table) -> list[str]:
    """The columns of points that hold labels."""
    return [name for name in ("labels", "filter_labels") if name in table.columns]


def write_groups(plan: Plan, name: str, table: pa.Table, keys: NDArray[np.int64]) -> list[int]:
    """Writes a scratch file with a row group for each value of `keys`, which ascend; the values."""
    values, starts = np.unique(keys, return_index=True)
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, table.schema, compression="zstd", write_statistics=False) as writer:
        for start, stop in pairwise([*starts.tolist(), len(table)]):
            rows = table.slice(start, stop - start)
            writer.write_table(rows, row_group_size=len(rows))
    _store(plan, name, sink)
    return values.tolist()


def write_table(plan: Plan, name: str, table: pa.Table) -> None:
    """Writes a scratch file of one row group."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=max(len(table), 1))
    _store(plan, name, sink)


def _store(plan: Plan, name: str, sink: pa.BufferOutputStream) -> None:
    write_file(f"{plan.scratch}/{name}", sink.getvalue())


def read_group(plan: Plan, name: str, group: int) -> pa.Table:
    """A row group of a scratch file."""
    return read_parquet(f"{plan.scratch}/{name}", group, None)


def read_parquet(path: str, group: int, columns: list[str] | None) -> pa.Table:
    """A row group of any file."""

    def read() -> pa.Table:
        filesystem, root = filesystem_of(path)
        with filesystem.open_input_file(root) as file:
            return pq.ParquetFile(file).read_row_group(group, columns=columns, use_threads=False)

    return patiently(read, f"reading {path}")
