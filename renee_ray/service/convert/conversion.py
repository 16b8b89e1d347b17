"""What the tasks of a conversion share, how they are run, and their files in between.

A scratch file is an Arrow file with a record batch for each key of its rows; its metadata has the
keys, int64 ascending. A task reads its key's batch of each file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from renee_ray.config.schema import ConvertConfig
from renee_ray.data import tokenizer
from renee_ray.data.sources.records import Block, Int64s, Source, num_rows
from renee_ray.data.split import Shuffle, shuffle_of
from renee_ray.data.storage import filesystem_of, patiently, write_file
from renee_ray.data.tokenizer import Vocabulary
from renee_ray.errors import Progress, ReneeError
from renee_ray.service.cluster.tasks import Reporter, stream

BUCKET_ROWS = 1 << 19
"""About the most rows of a bucket of the shuffle, and labels of a range: what a task holds."""

PART_ROWS, PARTS = 2048, 1024
"""The fewest rows of a part and the most parts of a split, where the user chose neither."""

JOURNAL = "done"
"""The directory of scratch with the results of tasks, for a conversion that is cut off."""
KEYS = b"keys"
"""Metadata of a scratch file."""

HELD = ("validation", "test")
"""The splits for which training points are held out."""
Groups = tuple[str, int, int]
"""A scratch file and the first and last key it has a group of."""


@dataclass(frozen=True)
class Conversion:
    """What every task is given. Its size goes with the number of blocks, not of rows.

    bucket_rows: rows of a bucket, and labels of a range.
    blocks: (split, block, rows of its split before it that are held out for each of HELD) of all
    points.
    files: the scratch files by what is in them.
    """

    source: Source
    dst: str
    scratch: str
    vocabulary: Vocabulary
    config: ConvertConfig
    bucket_rows: int
    shuffle: Shuffle
    blocks: tuple[tuple[str, Block, tuple[int, ...]], ...]
    files: dict[str, tuple[Groups, ...]] = field(default_factory=dict)

    def encode(self, texts: list[str]) -> pa.Array:
        """Tokenises texts, as `tokenizer.encode`."""
        return tokenizer.encode(self.vocabulary.serialised, texts, self.config.max_length)


def begin(
    source: Source, dst: str, scratch: str, vocabulary: Vocabulary, config: ConvertConfig
) -> Conversion:
    """Makes the conversion of a source: its blocks, and the order of its training points.

    Raises:
        ReneeError: `config.validation` and `config.test` leave no training point.
    """
    blocks = [(name, block) for name, table in source.splits.items() for block in table.blocks]
    starts = np.array([block.first for name, block in blocks if name == "train"])
    rows, size = num_rows(source.train), bucket_rows(config.part_rows)
    shares = (config.validation, config.test if source.test is None else 0.0)
    too_many = ReneeError(
        f"validation={shares[0]} and test={shares[1]} hold out all {rows} training points of "
        f"{source.labelled_path}; lower them"
    )
    if sum(shares) >= 1:
        raise too_many
    shuffle, held = shuffle_of(rows, starts, size, shares, config.seed)
    if held[-1].sum() == rows:
        raise too_many
    before = [*held[:-1].tolist(), *[[0, 0]] * (len(blocks) - len(starts))]
    with_held = tuple((*block, tuple(each)) for block, each in zip(blocks, before, strict=True))
    return Conversion(source, dst, scratch, vocabulary, config, size, shuffle, with_held)


def bucket_rows(chosen: int) -> int:
    """Returns the rows of a bucket: a multiple of those of a part, `chosen` by the user or 0."""
    least = chosen or PART_ROWS
    return least * max(1, BUCKET_ROWS // least)


def part_rows(chosen: int, rows: int, bucket: int) -> int:
    """Returns the rows of a part in a split of `rows`: `chosen`, or enough for parts to be few."""
    size = chosen or PART_ROWS
    while not chosen and rows > PARTS * size and bucket % (2 * size) == 0:
        size *= 2
    return size


def run(
    work: Callable[[Any, Any], dict[str, Any]],
    shared: Any,
    tasks: Sequence[Any],
    scratch: str,
    what: str,
    on_progress: Progress,
) -> Iterator[dict[str, Any]]:
    """Yields the results of work(shared, task) for all `tasks`, in any order; reports progress.

    Results are kept in directory `scratch`, by the name of `work` and the place of the task.
    """

    def numbered(given: tuple[Any, Sequence[Any]], i: int) -> dict[str, Any]:
        return work(given[0], given[1][i])

    numbered.__name__ = work.__name__
    reporter = Reporter(what, len(tasks), on_progress)
    for result in stream(numbered, (shared, tasks), len(tasks), f"{scratch}/{JOURNAL}"):
        reporter.one_more()
        yield result


# ------------------------------------------------------------------------------- scratch files


def keys_of(files: tuple[Groups, ...]) -> range:
    """Returns all keys for which a scratch file may have a group."""
    if not files:
        return range(0)
    return range(min(first for _, first, _ in files), max(last for _, _, last in files) + 1)


def write_groups(conversion: Conversion, name: str, table: pa.Table, keys: Int64s) -> list[Groups]:
    """Writes a scratch file with a group for each value of `keys`, which ascend; none if empty."""
    if not len(table):
        return []
    values, starts = np.unique(keys, return_index=True)
    schema = table.schema.with_metadata({KEYS: values.astype("<i8").tobytes()})
    sink, options = pa.BufferOutputStream(), pa.ipc.IpcWriteOptions(compression="lz4")
    with pa.ipc.new_file(sink, schema, options=options) as writer:
        for start, stop in zip(starts, [*starts[1:], len(table)], strict=True):
            (batch,) = table.slice(start, stop - start).combine_chunks().to_batches()
            writer.write_batch(batch)
    write_file(f"{conversion.scratch}/{name}", sink.getvalue())
    return [(name, int(values[0]), int(values[-1]))]


def read_groups(conversion: Conversion, what: str, key: int) -> Iterator[tuple[str, pa.Table]]:
    """Yields (file, its rows) of each scratch file of `what` that has a group for `key`."""
    for name, first, last in conversion.files.get(what, ()):
        if first <= key <= last:
            table = read_group(f"{conversion.scratch}/{name}", key)
            if table is not None:
                yield name, table


def read_group(path: str, key: int) -> pa.Table | None:
    """Reads the rows of a scratch file's group for `key`."""
    return patiently(partial(_read_group, path, key), f"reading {path}")


def _read_group(path: str, key: int) -> pa.Table | None:
    filesystem, root = filesystem_of(path)
    with filesystem.open_input_file(root) as file:
        reader = pa.ipc.open_file(file)
        keys = np.frombuffer(reader.schema.metadata[KEYS], "<i8")
        at = int(np.searchsorted(keys, key))
        if at == len(keys) or keys[at] != key:
            return None
        return pa.Table.from_batches([reader.get_batch(at)]).replace_schema_metadata()
