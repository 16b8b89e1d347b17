"""Files of lines, from which any rows can be read though the place of no single line is kept.

A task counts the line ends in a range of bytes: one number for each grain of GRAIN_BYTES. Rows are
then read from the grain in which they begin. Lines end at b"\\n" and nowhere else, because a text
may hold Unicode's line separators. A file with more carriage returns within its lines than lines
is refused: they are the line ends of another system.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import IO, Any

import numpy as np
import pyarrow as pa

from renee_ray.data.sources.records import Block, Int64s, SourceError
from renee_ray.data.storage import filesystem_of, patiently
from renee_ray.errors import reason

GRAIN_BYTES = 1 << 20
RANGE_BYTES = 1 << 26
"""Bytes that one task counts: a multiple of GRAIN_BYTES."""
REQUEST_BYTES = 1 << 23
"""Bytes of one request: an object store takes tens of milliseconds to answer any."""
MAX_LINE_BYTES = 1 << 26
"""A longer line is taken for damage: a text with all its labels is far shorter."""
PACKED_LEAST, PACKED_RATIO = 1 << 28, 100
"""The most that a packed file may unpack to: this many bytes, or this many times its own size.
Texts shrink to about a tenth."""
BLOCK_ROWS = 1 << 16
BLOCK_BYTES = 1 << 24
"""The most rows of a block, and about the most bytes of each of its files."""


class Unpacked(gzip.GzipFile):
    """Reads a file in gzip of `packed` bytes. Only `read` and `readinto` may be used.

    Raises:
        SourceError: it is damaged or truncated, or has more than it may hold.
    """

    def __init__(self, file: Any, path: str, packed: int) -> None:
        super().__init__(fileobj=file, mode="rb")
        self.path, self.packed = path, packed

    def read(self, size: int | None = -1) -> bytes:
        """Reads at most `size` bytes."""
        try:
            data = super().read(size)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise SourceError(
                f"{self.path} is not a complete gzip file ({reason(error)}); fetch it again"
            ) from error
        check_unpacked(self.path, self.tell(), self.packed)
        return data


def check_unpacked(path: str, size: int, packed: int) -> None:
    """Raises SourceError if `size` is more than a file of `packed` bytes may unpack to."""
    if size > max(PACKED_LEAST, PACKED_RATIO * packed):
        raise SourceError(
            f"{path} unpacks to more than {PACKED_RATIO} times its size; no data does; unpack it "
            f"yourself if it is right"
        )


# ------------------------------------------------------------------------------------- counting


@dataclass(frozen=True)
class Range:
    """Bytes [start, stop) of a file.

    A file in gzip cannot be read from the middle: it is one range, and unpacked when counted.
    """

    path: str
    start: int
    stop: int
    unpack_to: str | None = None


@dataclass(frozen=True)
class Counted:
    """What `count` found in a range."""

    newlines: list[int]
    """Line ends in each grain."""
    size: int
    """Bytes, unpacked."""
    begin: int
    """Bytes of a byte-order mark before the first line."""
    solid: int
    """Lines of the range up to the last that holds more than white space."""
    is_open: bool
    """The last byte is no line end."""
    returns: int
    """Carriage returns within lines."""


def ranges(path: str, scratch: str) -> list[Range]:
    """Splits a file into ranges; one in gzip will be unpacked into directory `scratch`."""
    filesystem, name = filesystem_of(path)
    size = patiently(lambda: filesystem.get_file_info(name).size, f"reading {path}")
    if path.endswith(".gz"):
        unpacked = path.rpartition("/")[2].removesuffix(".gz")
        return [Range(path, 0, size, f"{scratch}/{unpacked}")]
    starts = range(0, max(size, 1), RANGE_BYTES)
    return [Range(path, start, min(start + RANGE_BYTES, size)) for start in starts]


def count(part: Range) -> Counted:
    """Counts the line ends of a range, and unpacks gzip.

    Raises:
        SourceError: damaged or truncated gzip, or UTF-16.
    """
    return patiently(lambda: _count(part), f"reading {part.path}")


def _count(part: Range) -> Counted:
    filesystem, name = filesystem_of(part.path)
    with filesystem.open_input_file(name) as raw:
        raw.seek(part.start)
        file = pa.BufferedInputStream(raw, REQUEST_BYTES)
        if part.unpack_to is None:
            return _counted(_grains(file, part.stop - part.start), part)
        grains = _grains(Unpacked(file, part.path, part.stop), None)
        return _counted(_copied(grains, part.unpack_to), part)


def _grains(file: IO[bytes] | Unpacked, size: int | None) -> Iterator[bytes]:
    """Reads the next `size` bytes, or all if it is None."""
    while grain := file.read(GRAIN_BYTES if size is None else min(GRAIN_BYTES, size)):
        yield grain
        size = None if size is None else size - len(grain)


def _copied(grains: Iterator[bytes], path: str) -> Iterator[bytes]:
    filesystem, name = filesystem_of(path)
    with filesystem.open_output_stream(name) as sink:
        for grain in grains:
            sink.write(grain)
            yield grain


def _counted(grains: Iterator[bytes], part: Range) -> Counted:
    newlines: list[int] = []
    size = begin = solid = before = returns = 0
    last = b"\n"
    for grain in grains:
        if part.start == size == 0:
            begin = length_of_mark(grain, part.path)
        if filled := len(grain.rstrip()):
            solid = before + grain.count(b"\n", 0, filled) + 1
        newlines.append(grain.count(b"\n"))
        returns += len(lone_returns(last + grain))
        before += newlines[-1]
        size, last = size + len(grain), grain[-1:]
    return Counted(newlines, size, begin, solid, last != b"\n", returns)


def lone_returns(data: bytes) -> list[int]:
    """Finds the carriage returns within lines: those followed by neither \\n nor another \\r."""
    return [found.start() for found in re.finditer(rb"\r(?=[^\r\n])", data)]


def length_of_mark(head: bytes, path: str) -> int:
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise SourceError(f"{path}:1: the file is in UTF-16; save it as UTF-8")
    return 3 if head.startswith(b"\xef\xbb\xbf") else 0


# ------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Lines:
    """A file of lines.

    newlines: int64 [grains + 1], line ends before each grain, and in all.
    """

    path: str
    """The name that error messages use."""
    stored_at: str
    """Where its (uncompressed) bytes are."""
    newlines: Int64s
    size: int
    begin: int
    """Offset of the first line."""
    rows: int
    solid: int
    """Rows up to the last that holds more than white space."""
    skipped: int = 0
    """Lines before row 0: 1 with a header."""
    returns: int = 0
    """Carriage returns within lines."""

    def where(self, row: int) -> str:
        return f"{self.path}:{self.skipped + row + 1}"

    def without_header(self) -> Lines:
        return replace(
            self, rows=self.rows - 1, solid=max(self.solid - 1, 0), skipped=self.skipped + 1
        )

    def without_blank_tail(self, rows: int) -> Lines:
        """Returns the file without the rows after the first `rows`, if all of them are blank."""
        return replace(self, rows=rows) if self.solid <= rows < self.rows else self

    def without_blank_end(self) -> Lines:
        """Returns the file without the blank rows at its end."""
        return replace(self, rows=min(self.rows, self.solid))


@dataclass(frozen=True)
class LineBatch:
    """Consecutive lines in memory: line i is data[starts[i]:starts[i + 1]], its end included.

    starts: int64 [n + 1]. first: the row of the file that is line 0 of the batch.
    """

    lines: Lines
    data: bytes
    starts: Int64s
    first: int

    def where(self, i: int) -> str:
        """Returns file:line of line i of the batch."""
        return self.lines.where(self.first + i)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __iter__(self) -> Iterator[bytes]:
        """Yields each line without its end."""
        bounds = self.starts.tolist()
        for start, stop in pairwise(bounds):
            yield self.data[start:stop].removesuffix(b"\n").removesuffix(b"\r")

    def contents(self) -> pa.Array:
        """Returns all lines without their ends, as large_binary."""
        return pa.array(list(self), pa.large_binary())


def lines_of(parts: list[Range], counted: list[Counted]) -> Lines:
    """Makes the file of all its ranges, in order, and what was counted in each."""
    newlines = np.cumsum([0, *(n for each in counted for n in each.newlines)], dtype=np.int64)
    returns = sum(each.returns for each in counted)
    if returns > newlines[-1]:
        raise SourceError(
            f"{parts[0].path} has {newlines[-1]} line feeds and {returns} carriage returns that "
            f"none follows; write a line feed at the end of each line (and spaces within texts)"
        )
    _refuse_long_lines(parts[0].path, newlines)
    size, begin = sum(each.size for each in counted), counted[0].begin
    rows = int(newlines[-1]) + int(counted[-1].is_open and size > begin)
    solid = before = 0
    for each in counted:
        solid = before + each.solid if each.solid else solid
        before += sum(each.newlines)
    stored_at = parts[0].unpack_to or parts[0].path
    solid = min(solid, rows)
    path = parts[0].path
    return Lines(path, stored_at, newlines, size, begin, rows, solid, returns=returns)


def _refuse_long_lines(path: str, newlines: Int64s) -> None:
    grains = max(1, MAX_LINE_BYTES // GRAIN_BYTES)
    without = newlines[:-grains] == newlines[grains:]
    if without.any():
        line = int(newlines[int(without.argmax())]) + 1
        raise SourceError(
            f"{path}:{line}: the line is longer than {MAX_LINE_BYTES} bytes; shorten it, or "
            f"correct the file's line ends"
        )


def read(lines: Lines, start: int, stop: int) -> LineBatch:
    """Reads rows [start, stop) of the file.

    Raises:
        SourceError: the file has changed since it was counted.
    """
    if start >= stop:
        return LineBatch(lines, b"", np.zeros(1, np.int64), start)
    first, last = start + lines.skipped, stop + lines.skipped
    low = max(int(np.searchsorted(lines.newlines, first, side="left")) - 1, 0)
    high = int(np.searchsorted(lines.newlines, last, side="left"))
    data = _bytes_of(lines, low * GRAIN_BYTES, min(high * GRAIN_BYTES, lines.size))
    ends = np.flatnonzero(np.frombuffer(data, np.uint8) == 10) + 1
    if first == 0:
        ends = np.concatenate([[lines.begin], ends])
    if high == len(lines.newlines) and not data.endswith(b"\n"):
        ends = np.append(ends, len(data))
    at = first - int(lines.newlines[low]) - (first > 0)
    starts = ends[at : at + stop - start + 1]
    if len(starts) <= stop - start:
        raise SourceError(
            f"{lines.path} was changed while it was being read: no line {last}; convert again when "
            f"it is complete"
        )
    return LineBatch(lines, data[starts[0] : starts[-1]], starts - starts[0], start)


def _bytes_of(lines: Lines, start: int, stop: int) -> bytes:
    def read_bytes() -> bytes:
        filesystem, name = filesystem_of(lines.stored_at)
        with filesystem.open_input_file(name) as file:
            return file.read_at(stop - start, start)

    data = patiently(read_bytes, f"reading {lines.path}")
    if len(data) != stop - start:
        raise SourceError(
            f"{lines.path} became shorter while it was being read: no byte {start + len(data)}; "
            f"convert again when it is complete"
        )
    return data


def blocks_of(rows: int, *files: Lines) -> tuple[Block, ...]:
    """Splits rows [0, rows) into blocks that are read together from all of `files`."""
    step = max(1, BLOCK_BYTES // GRAIN_BYTES)
    marks = [np.arange(0, rows, BLOCK_ROWS)]
    marks += [lines.newlines[::step] - lines.skipped for lines in files]
    firsts = np.unique(np.concatenate(marks))
    bounds = [*firsts[(firsts >= 0) & (firsts < rows)].tolist(), rows]
    return tuple(Block(files[0].path, start, stop - start) for start, stop in pairwise(bounds))
