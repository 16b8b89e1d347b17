"""Reading Parquet: footers, whole row groups, first rows, and how an error names a row."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq

from renee_ray.data.sources.records import Block, SourceError
from renee_ray.data.storage import filesystem_of, is_transient, patiently
from renee_ray.data.untrusted import read_row_groups
from renee_ray.errors import reason

SLICE_ROWS = 1 << 16
"""The most rows that are handed on together, and the rows of a row group that is written."""
BUFFER_BYTES = 1 << 20
Origins = dict[str, tuple[str, str, int]]
"""Path -> the file that its rows are from, what stands before a row's number, the first row's.

These are files that a conversion has written, with SLICE_ROWS rows in each row group but the last.
"""


def row_name(block: Block, row: int, origins: Origins) -> str:
    """Returns what an error calls a row of a block: that of its origin, where it has one."""
    if block.path in origins:
        path, between, first = origins[block.path]
        return f"{path}{between}{first + block.group * SLICE_ROWS + row}"
    return f"{block.path}: row {row} of row group {block.group}"


@contextlib.contextmanager
def _reading(sentence: Callable[[str], str]) -> Iterator[None]:
    """Raises SourceError with the sentence of a reason, where what is read is no whole Parquet."""
    try:
        yield
    except (OSError, ValueError, NotImplementedError) as error:  # pa.ArrowInvalid is one
        if is_transient(error):
            raise
        raise SourceError(sentence(reason(error))) from None


def footer(path: str) -> tuple[pa.Schema, pq.FileMetaData]:
    """Reads the footer of a file. Raises SourceError where it is not Parquet."""
    filesystem, root = filesystem_of(path)
    told = _reading(lambda why: f"{path} is not Parquet ({why}); replace it")
    with filesystem.open_input_file(root) as file, told:
        footer = pq.ParquetFile(file)
        return footer.schema_arrow, footer.metadata


def read_block(block: Block, columns: list[str], origins: Origins | None = None) -> pa.Table:
    """Reads all rows of the block.

    Raises:
        SourceError: the file is damaged; the one in `origins` is named before it.
    """

    def read() -> pa.Table:
        filesystem, root = filesystem_of(block.path)
        with filesystem.open_input_file(root) as file:
            return read_row_groups(pq.ParquetFile(file), [block.group], columns)

    def sentence(why: str) -> str:
        if origins and block.path in origins:
            return (
                f"{row_name(block, 0, origins)} and below cannot be read ({why:.200}) from the "
                f"copy {block.path}; correct it, or convert again if it is right"
            )
        return f"{block.path} cannot be read ({why:.200}) in row group {block.group}; replace it"

    with _reading(sentence):
        return patiently(read, f"reading {block.path}")


def first_rows(path: str, columns: Collection[str] | None, number: int) -> pa.Table:
    """Reads at most `number` rows of a file; columns other than these (None: all) are null.

    Raises:
        SourceError: it is not Parquet, or damaged.
    """
    schema, _ = patiently(partial(footer, path), f"reading {path}")
    wanted = [name for name in schema.names if columns is None or name in columns]

    def read() -> pa.Table:
        filesystem, root = filesystem_of(path)
        with filesystem.open_input_file(root) as file:
            # With a buffer, pages are read as they are needed, not whole columns of a row group.
            reader = pq.ParquetFile(file, buffer_size=BUFFER_BYTES)
            batches = reader.iter_batches(number, columns=wanted, use_threads=False)
            found = next((pa.Table.from_batches([each]) for each in batches if len(each)), None)
            return schema.empty_table() if found is None else found

    with _reading(lambda why: f"{path} cannot be read ({why:.200}); replace it"):
        rows = patiently(read, f"reading {path}")
    there = dict(zip(rows.column_names, rows.columns, strict=True))
    made = [
        there[each.name] if each.name in there else pa.nulls(len(rows), each.type)
        for each in schema
    ]
    return pa.table(made, schema=schema)
