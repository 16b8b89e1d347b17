"""A source that is no Parquet, written by tasks as Parquet of a source."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from renee_ray.data.sources.own import Own
from renee_ray.data.sources.parquet import index_parquet
from renee_ray.data.sources.records import Source, SourceError
from renee_ray.data.sources.repository import Repository
from renee_ray.data.sources.row_groups import SLICE_ROWS, Origins
from renee_ray.data.storage import make_directory, write_file
from renee_ray.errors import Progress
from renee_ray.service.convert.conversion import run

Task = tuple[int, str, list[str]]
"""Its number, the split, and the files."""


def written(
    found: Own | Repository, labels_are: str, scratch: str, on_progress: Progress
) -> Source:
    """Writes a source to `scratch`, and makes the source of what was written.

    Raises:
        SourceError: a file that cannot be read, a bad row, or an error of `index_parquet`.
    """
    tasks = [(number, *task) for number, task in enumerate(found.tasks())]
    origins: Origins = {}
    rows, odd = Counter[str](), defaultdict[str, Counter[str]](Counter)
    what = "files read"
    for result in run(write_pieces, (found, scratch), tasks, scratch, what, on_progress):
        rows[result["split"]] += result["rows"]
        odd[result["split"]].update(result["odd"])
        origins |= {path: tuple(origin) for path, *origin in result["pieces"]}
    for _, split, files in tasks:
        if not rows[split] and not (split == "test" and isinstance(found, Repository)):
            raise SourceError(f"{files[0]} has no row; give it rows, or leave it out")
    source = index_parquet(scratch, labels_are, origins)
    if found.num_labels is not None:
        source = replace(source, num_labels=found.num_labels)
    return replace(source, odd=dict(odd))


def write_pieces(shared: tuple[Own | Repository, str], task: Task) -> dict[str, Any]:
    """Writes some files of a split as Parquet files SCRATCH/SPLIT/*, in their order."""
    (found, scratch), (number, split, paths) = shared, task
    made, rows, odd = [], 0, Counter[str]()
    make_directory(f"{scratch}/{split}")
    for i, piece in enumerate(found.pieces(split, paths)):
        sink = pa.BufferOutputStream()
        pq.write_table(piece.table, sink, row_group_size=SLICE_ROWS, use_dictionary=False)
        name = f"{scratch}/{split}/{number:06d}-{i:06d}.parquet"
        write_file(name, sink.getvalue())
        made.append((name, piece.path, piece.between, piece.number))
        rows += len(piece.table)
        odd.update(piece.odd)
    return {"split": split, "rows": rows, "odd": odd, "pieces": made}
