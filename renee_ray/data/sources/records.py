"""What a source is to a conversion: tables whose rows tasks read as records, block by block.

A table knows its blocks (`Block`) and reads any one of them, as Arrow arrays of these columns:

    text                     large_string
    label                    string
    point_id                 int64
    input_ids                large_list<int64>, no row without tokens
    labels, filter_labels    large_list<int64> or large_list<string>, as the source lists them

Only Parquet is read in blocks. Another kind of source yields its rows as `Piece`s, which a
conversion writes as Parquet first; nothing after that tells them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from renee_ray.errors import ReneeError

Int64s = NDArray[np.int64]

MAX_INFERRED_LABELS = 10**8
"""A larger id is taken for damage where nothing says how many labels there are."""


class SourceError(ReneeError):
    """Raw data that cannot be converted."""


@dataclass(frozen=True)
class Block:
    """Rows of a table that one task reads together.

    path: the file that they are in.
    first: the number of the first row in the table.
    group: the row group of the file.
    """

    path: str
    first: int
    rows: int
    group: int = 0


@dataclass(frozen=True)
class Records:
    """Consecutive rows of a table, the first of which is row number `first`."""

    first: int
    columns: dict[str, pa.Array]
    where: Callable[[int], str]
    """The file and the line or row of one of these rows, counted from 0, for error messages."""
    replaced: Int64s = field(default_factory=lambda: np.zeros(0, np.int64))
    """Bytes of each row's text that are not UTF-8; empty where no text was read."""

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def numbers(self) -> pa.Array:
        """Returns the number of each row in the table, int64."""
        return pa.array(np.arange(self.first, self.first + len(self)))


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of a source, to be written as Parquet.

    table: with the columns of a Parquet source.
    path, number: of the first row; between: what stands between them where an error names a row.
    odd: counts for a conversion's statistics.
    """

    table: pa.Table
    path: str
    number: int
    between: str = ": row "
    odd: dict[str, int] = field(default_factory=dict)


class Table(Protocol):
    """Rows of a split, or of the labels."""

    @property
    def blocks(self) -> tuple[Block, ...]:
        """All rows, in their order."""

    @property
    def columns(self) -> Collection[str]:
        """The columns that can be read."""

    def read(self, block: Block, columns: Collection[str]) -> Iterator[Records]:
        """Reads these columns of a block, if not more, in one piece or several.

        Raises:
            SourceError: a row that cannot be read; the sentence names file, row and remedy.
        """


@dataclass(frozen=True)
class Source:
    """Tables that agree with one another.

    labels: a row for each label in the order of the ids, with its text, its name or both.
    labelled_path: the file, or first file, with the labels of training points.
    num_labels: None while only the greatest id or all names can tell.
    labels_are_strings: the labels of points are names; else they are ids.
    odd: counts for the statistics of each split, of what was odd where it was no Parquet yet.
    notes: sentences about files that are there and not read.
    """

    train: Table
    test: Table | None
    labels: Table | None
    labelled_path: str
    num_labels: int | None
    labels_are_strings: bool = False
    odd: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def splits(self) -> dict[str, Table]:
        return {"train": self.train} | ({} if self.test is None else {"test": self.test})


@dataclass(frozen=True)
class Names:
    """A table of labels whose texts are in memory."""

    texts: tuple[str, ...]
    path: str
    columns = ("text",)

    @property
    def blocks(self) -> tuple[Block, ...]:
        return (Block(self.path, 0, len(self.texts)),)

    def read(self, block: Block, columns: Collection[str]) -> Iterator[Records]:
        texts = pa.array(self.texts, pa.large_string())
        nothing = np.zeros(len(texts), np.int64)
        yield Records(0, {"text": texts}, lambda row: f"{self.path}: label {row}", nothing)


def num_rows(table: Table) -> int:
    """Returns the number of rows of a table."""
    return sum(block.rows for block in table.blocks)


def lists_of(num_rows: int, rows: Int64s, values: pa.Array) -> pa.Array:
    """Gathers the values of each row in a large_list; `rows` [m] ascend."""
    offsets = np.searchsorted(rows, np.arange(num_rows + 1))
    return pa.LargeListArray.from_arrays(pa.array(offsets), values)


# -------------------------------------------------------------------------------------- texts


def decode_texts(column: pa.Array) -> tuple[pa.Array, Int64s]:
    """Decodes a column of bytes, large_binary, to (large_string, bytes replaced in each row).

    A null is an empty text, as a blank line is; bytes that are not UTF-8 are replaced.
    """
    filled = pc.fill_null(column, b"")
    try:
        return pc.cast(filled, pa.large_string()), np.zeros(len(filled), np.int64)
    except pa.ArrowInvalid:
        pass  # one by one, to tell how many
    texts, replaced = zip(*map(decoded, filled.to_pylist()), strict=True)
    return pa.array(texts, pa.large_string()), np.array(replaced, np.int64)


def decoded(line: bytes) -> tuple[str, int]:
    """Decodes a line; returns the text and how many of its bytes are not UTF-8."""
    try:
        return line.decode("utf-8"), 0
    except UnicodeDecodeError:
        valid = len(line.decode("utf-8", "ignore").encode())
        return line.decode("utf-8", "replace"), len(line) - valid


def whole_characters(text: str) -> tuple[str, int]:
    """Replaces lone surrogates (from \\ud800 escapes); returns the text and their number."""
    try:
        text.encode()
    except UnicodeEncodeError:
        broken = sum("\ud800" <= character <= "\udfff" for character in text)
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), broken
    return text, 0


def odd_texts(texts: Sequence[str], replaced: Int64s) -> dict[str, int]:
    """Counts what was odd in texts, for a conversion's statistics."""
    return {
        "empty_texts": sum(not text.strip() for text in texts),
        "replaced_lines": int(np.count_nonzero(replaced)),
        "replaced_bytes": int(replaced.sum()),
    }
