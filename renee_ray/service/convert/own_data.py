"""Own data, written by tasks as Parquet of a source."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from renee_ray.data.sources.own import Own, pieces
from renee_ray.data.sources.parquet import SLICE_ROWS, index_parquet
from renee_ray.data.sources.records import Source, SourceError, num_rows
from renee_ray.data.storage import make_directory, write_file
from renee_ray.service.convert.conversion import Progress, run

Task = tuple[str, int, list[str]]
"""The split, the number of its first file, and the files."""


def written(own: Own, labels_are: str, scratch: str, on_progress: Progress) -> Source:
    """Writes own data to `scratch`, a task a file, and makes the source of what was written.

    Raises:
        SourceError: a file that cannot be read, a bad row, or an error of `index_parquet`.
    """
    tasks: list[Task] = []
    for split in ("train", "test", "labels"):
        paths = own.splits.get(split, [])
        together = own.fields is not None and own.fields.pairs and split != "labels"
        files = [paths] if together and paths else [[path] for path in paths]
        tasks += [(split, number, each) for number, each in enumerate(files)]
    origins = {}
    for result in run(_write_pieces, (own, scratch), tasks, scratch, "files read", on_progress):
        for path, origin, first in result["pieces"]:
            origins[path] = origin, first
    source = index_parquet(scratch, labels_are, origins)
    for split, table in (("test", source.test), ("labels", source.labels)):
        if split in own.splits and (table is None or not num_rows(table)):
            raise SourceError(f"{own.splits[split][0]} has no row; give it rows, or leave it out")
    return source


def _write_pieces(shared: tuple[Own, str], task: Task) -> dict[str, Any]:
    (own, scratch), (split, number, paths), made = shared, task, []
    make_directory(f"{scratch}/{split}")
    for i, (path, first, table) in enumerate(pieces(own, split, paths)):
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, row_group_size=SLICE_ROWS)
        name = f"{scratch}/{split}/{number:06d}-{i:06d}.parquet"
        write_file(name, sink.getvalue())
        made.append((name, path, first))
    return {"pieces": made}
