"""Whether a table of labels is in the order of its ids: a label's id is its place in the table."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from renee_ray.data.sources.columns import kind_of, plain
from renee_ray.data.sources.records import Block, SourceError
from renee_ray.data.sources.row_groups import Origins, footer, read_block, row_name
from renee_ray.data.storage import patiently

ID_COLUMNS = ("label_id", "id")
"""Columns that may hold the ids of labels; the first that is there does."""


def check_label_ids(blocks: Iterable[Block], origins: Origins) -> None:
    """Compares the ids of labels, where files have a column of them, with the places of the rows.

    Raises:
        SourceError: an id is not its row's.
    """
    names: dict[str, str | None] = {}
    for block in blocks:
        if block.path not in names:
            there = patiently(partial(footer, block.path), f"reading {block.path}")[0].names
            names[block.path] = next((n for n in ID_COLUMNS if there.count(n) == 1), None)
        if (name := names[block.path]) is None:
            continue
        given = read_block(block, [name], origins)[name]
        ids = _numbers(given)
        if ids is None:
            continue
        wrong = np.flatnonzero(ids != np.arange(block.first, block.first + len(ids)))
        if len(wrong):
            row = int(wrong[0])
            value = given[row].as_py()
            value = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
            raise SourceError(
                f"{row_name(block, row, origins)} has {value!r:.60} in {name} and is label "
                f"{block.first + row}; give all labels in the order of their ids, from 0, or leave "
                f"that column out"
            )


def _numbers(given: pa.ChunkedArray) -> NDArray[np.float64] | None:
    """Returns ids as float64, NaN for a null; None where they are codes, which are no places."""
    values = pa.concat_arrays([plain(chunk) for chunk in given.chunks])
    if kind_of(values.type) == "nothing":
        return None
    try:
        if kind_of(values.type) == "string":
            values = pc.utf8_trim_whitespace(pc.cast(values, pa.large_string()))
        return pc.cast(values, pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    except (pa.ArrowInvalid, NotImplementedError):
        return None
