"""Reads files that may come from elsewhere (docs/security.md), with errors of one kind."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

BYTES_A_ROW = 1 << 20
"""Limit for decoded Parquet, on average over the rows that are read together."""
MIN_LIMIT, MAX_LIMIT = 1 << 28, 1 << 33
"""Bounds of that limit for all of these rows, in bytes."""
BYTES_A_VALUE = 12
"""Bytes of a number and of its levels while it is decoded, at most."""


def parse_json(content: str | bytes) -> Any:
    """Parses a JSON text.

    Raises:
        ValueError: it is no JSON, or is nested too deeply.
    """
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def object_or_empty(content: bytes) -> dict[str, Any]:
    """Parses an object in JSON; empty where it is none."""
    try:
        found = parse_json(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


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


def read_row_groups(
    file: pq.ParquetFile, groups: Sequence[int], columns: Sequence[str]
) -> pa.Table:
    """Reads some columns of some row groups, unless a few bytes stand for far too many values.

    Raises:
        ValueError: they do, or the file has not the rows that it says.
    """
    rows = size = 0
    for group in map(file.metadata.row_group, groups):
        rows += group.num_rows
        for column in map(group.column, range(group.num_columns)):
            if column.path_in_schema.partition(".")[0] in columns:
                size += column.num_values * BYTES_A_VALUE + column.total_uncompressed_size
    limit = min(max(MIN_LIMIT, rows * BYTES_A_ROW), MAX_LIMIT)
    if size > limit:
        raise ValueError(f"{rows} rows would decode to {size} bytes, more than {limit}")
    table = file.read_row_groups(list(groups), columns=list(columns), use_threads=False)
    if len(table) != rows:
        raise ValueError(f"{len(table)} rows where its footer says {rows}")
    return table
