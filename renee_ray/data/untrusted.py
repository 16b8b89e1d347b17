"""Reads untrusted files: limits are checked before anything is parsed or decoded.

A dataset, a run directory or a model may come from anywhere (docs/security.md). Nothing here
knows what a file means. It limits bytes, nesting and decoded sizes, and refuses links out of a
directory.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from pydantic import ValidationError, ValidatorFunctionWrapHandler, WrapValidator

from renee_ray.errors import ReneeError

BYTES_A_ROW = 1 << 20
"""Limit for decoded Parquet, on average over the rows that are read together."""
MIN_LIMIT, MAX_LIMIT = 1 << 28, 1 << 33
"""Bounds of that limit for all of these rows, in bytes."""
LEVEL_BYTES = 4
"""Bytes of the repetition and definition levels of a value while it is decoded."""
FIXED_BYTES = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8}


def read_bounded(filesystem: pafs.FileSystem, name: str, limit: int, where: str) -> bytes:
    """Reads a file of at most `limit` bytes.

    Raises:
        ReneeError: it is longer. OSError: it cannot be read.
    """
    with filesystem.open_input_file(name) as file:
        size = file.size()
        if size > limit:
            raise ReneeError(f"{where} has {size} bytes, which no such file has; replace it")
        content: bytes = file.read(size)
    return content


def parse_json(content: str | bytes) -> Any:
    """Parses a JSON text.

    Raises:
        ValueError: it is no JSON, is nested too deeply, or holds a number that is not finite.
    """
    text = content.decode("utf-8", "replace") if isinstance(content, bytes) else content
    try:
        return json.loads(text, parse_constant=_no_number, parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _one_by_one(raw: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    if not isinstance(raw, dict):
        return validate(raw)
    return {name: validate({name: value})[name] for name, value in raw.items()}


FIRST_ENTRY = WrapValidator(_one_by_one)
"""Stops at the first wrong entry of a mapping, as `FailFast` does for sequences. pydantic would
else describe every one, in a thousand times the memory of the file."""


def first_problem(error: ValidationError) -> str:
    """Returns the first problem that pydantic found, as the predicate of a sentence on a file."""
    first = error.errors(include_url=False)[0]
    key = ".".join(map(str, first["loc"]))
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"lacks {key}"
    if not key:
        return f"cannot be parsed: {message}"
    return f"has {key}={first['input']!r:.80}: {message[0].lower()}{message[1:]}"


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text:.40} is too large a number")
    return value


def refuse_links_out(filesystem: pafs.FileSystem, root: str, where: str) -> None:
    """Refuses a local directory with symbolic links that lead out of it.

    Otherwise a directory from elsewhere could make us read, or write to, any file of this machine.
    `root` itself may be reached through links.

    Raises:
        ReneeError: names the first such link.
    """
    if not isinstance(filesystem, pafs.LocalFileSystem) or not os.path.isdir(root):
        return
    real = os.path.realpath(root)
    for link in _links(real):
        if not os.path.realpath(link).startswith(real + os.sep):
            raise ReneeError(
                f"{where} holds the symbolic link {os.path.relpath(link, real)!r}, which leads "
                f"out of it; put the files themselves there"
            )


def _links(directory: str) -> Iterator[str]:
    with os.scandir(directory) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_symlink():
                yield entry.path
            elif entry.is_dir():
                yield from _links(entry.path)


def read_row_groups(
    open_parquet: Callable[..., pq.ParquetFile], groups: Sequence[int], columns: Sequence[str]
) -> pa.Table:
    """Reads some columns of some row groups, once check_row_groups allows it.

    Raises:
        ValueError: as there, or the file has not the rows that it says.
    """
    rows = check_row_groups(open_parquet, groups, columns)
    table = open_parquet().read_row_groups(list(groups), columns=list(columns), use_threads=False)
    if len(table) != rows:
        raise ValueError(f"{len(table)} rows where its footer says {rows}")
    return table


def check_row_groups(
    open_parquet: Callable[..., pq.ParquetFile], groups: Sequence[int], columns: Sequence[str]
) -> int:
    """Counts the rows of some row groups, and limits the memory that they decode to.

    Args:
        open_parquet: opens the file, with keyword arguments of pq.ParquetFile.

    Raises:
        ValueError: they take more.
    """
    file = open_parquet()
    metadata = file.metadata
    schema = file.schema_arrow
    sizes = {each.name: _fixed_size(each.type) for each in schema if each.name in columns}
    rows = sum(metadata.row_group(group).num_rows for group in groups)
    limit = min(max(MIN_LIMIT, rows * BYTES_A_ROW), MAX_LIMIT)
    leaves = _leaves(metadata, columns)
    # Certain: fixed widths and encoded bytes. Possible: texts that repeat a dictionary's entry.
    certain, possible, packed = 0, 0, set()
    for group in groups:
        for leaf in leaves:
            chunk = metadata.row_group(group).column(leaf)
            fixed = FIXED_BYTES.get(chunk.physical_type)
            encoded, values = chunk.total_uncompressed_size, chunk.num_values
            if min(encoded, values) < 0:
                raise ValueError("a column with a negative size")
            size = sizes.get(_root(metadata, leaf), 0)
            values = max(values, metadata.row_group(group).num_rows * size)
            certain += values * (LEVEL_BYTES + (fixed or 0)) + encoded
            if fixed is None and chunk.has_dictionary_page:
                # Each value may be one enormous entry of the dictionary.
                possible += values * encoded
                packed.add(_root(metadata, leaf))
    if certain > limit:
        raise ValueError(f"{rows} rows would decode to {certain} bytes, more than {limit}")
    if certain + possible > limit:
        _refuse_long_texts(
            open_parquet(read_dictionary=_paths(metadata, packed)), groups, packed, limit
        )
    return rows


def _fixed_size(kind: pa.DataType) -> int:
    """Returns how many values a list of fixed size has in memory, null or not; else 0."""
    if isinstance(kind, pa.BaseExtensionType):
        return _fixed_size(kind.storage_type)
    if any(_fixed_size(kind.field(i).type) for i in range(kind.num_fields)):
        raise ValueError("lists of fixed size within another type")
    return kind.list_size if pa.types.is_fixed_size_list(kind) else 0


def rows_of(metadata: pq.FileMetaData) -> int:
    """Returns the rows of a Parquet file, if its row groups agree with its footer.

    Raises:
        ValueError: they do not.
    """
    sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    if min(sizes, default=0) < 0 or sum(sizes) != metadata.num_rows:
        raise ValueError(f"{metadata.num_rows} rows in its footer, {sum(sizes)} in its row groups")
    return sum(sizes)


def _leaves(metadata: pq.FileMetaData, columns: Sequence[str]) -> list[int]:
    return [leaf for leaf in range(metadata.num_columns) if _root(metadata, leaf) in columns]


def _root(metadata: pq.FileMetaData, leaf: int) -> str:
    return str(metadata.schema.column(leaf).path.partition(".")[0])


def _paths(metadata: pq.FileMetaData, columns: set[str]) -> list[str]:
    return [metadata.schema.column(leaf).path for leaf in _leaves(metadata, sorted(columns))]


def _refuse_long_texts(
    file: pq.ParquetFile, groups: Sequence[int], columns: set[str], limit: int
) -> None:
    """Adds up the lengths of texts, read as indices into their dictionaries, up to the limit."""
    total = 0
    for column in sorted(columns):
        for group in groups:
            read = file.read_row_group(group, columns=[column], use_threads=False)
            for piece in read[column].chunks:
                while not pa.types.is_dictionary(piece.type):
                    piece = piece.flatten()
                sizes = pc.binary_length(piece.dictionary).take(piece.indices)
                total += pc.sum(pc.cast(sizes, pa.int64())).as_py() or 0
            if total > limit:
                raise ValueError(f"{column} would decode to more than {limit} bytes")
