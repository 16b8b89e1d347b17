"""Files that are read from their start to their end, plain or in gzip, and their lines.

Lines end at b"\\n" and nowhere else, because a text may hold Unicode's line separators. A file with
more carriage returns within its lines than lines is refused: they are the line ends of another
system.
"""

from __future__ import annotations

import gzip
import io
import re
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from renee_ray.data.sources.records import SourceError
from renee_ray.data.storage import filesystem_of, patiently
from renee_ray.errors import reason

REQUEST_BYTES = 1 << 23
"""Bytes of one request: an object store takes tens of milliseconds to answer any."""
MAX_LINE_BYTES = 1 << 26
"""A longer line is taken for damage: a text with all its labels is far shorter."""
PIECE_BYTES, PIECE_ROWS = 1 << 24, 1 << 16
"""About the most bytes of a file, and the most of its lines, that are in memory together."""
MARK = b"\xef\xbb\xbf"


class _Patient(io.RawIOBase):
    """The bytes of a file, read patiently.

    Raises:
        SourceError: it has fewer bytes than when it was opened.
    """

    def __init__(self, path: str) -> None:
        self.path, self.at = path, 0
        self.filesystem, self.name = filesystem_of(path)
        info = patiently(lambda: self.filesystem.get_file_info(self.name), f"reading {path}")
        self.size = info.size or 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        def read() -> bytes:
            with self.filesystem.open_input_file(self.name) as file:
                content: bytes = file.read_at(len(buffer), self.at)
            return content

        content = patiently(read, f"reading {self.path}")
        buffer[: len(content)] = content
        self.at += len(content)
        if not content and self.at < self.size:
            raise SourceError(
                f"{self.path} became shorter while it was being read: no byte {self.at}; convert "
                f"again when it is complete"
            )
        return len(content)

    def readall(self) -> bytes:
        # Not in the pieces of 8 KiB of the base class: each is a request.
        return b"".join(iter(lambda: self.read(REQUEST_BYTES) or b"", b""))


class _Unpacked(gzip.GzipFile):
    """Reads a file in gzip. Only `read` and `readinto` may be used.

    Raises:
        SourceError: it is damaged or truncated.
    """

    def __init__(self, file: Any, path: str) -> None:
        super().__init__(fileobj=file, mode="rb")
        self.path = path

    def read(self, size: int | None = -1) -> bytes:
        """Reads at most `size` bytes."""
        try:
            return super().read(size)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise SourceError(
                f"{self.path} is not a complete gzip file ({reason(error)}); fetch it again"
            ) from error


def opened(path: str) -> io.BufferedReader:
    """Opens a file, unpacked. Raises SourceError where it is in UTF-16, or no gzip."""
    file: io.BufferedReader = io.BufferedReader(_Patient(path), REQUEST_BYTES)
    if path.endswith(".gz"):
        unpacked: Any = _Unpacked(file, path)
        file = io.BufferedReader(unpacked, REQUEST_BYTES)
    if file.peek(2).startswith((b"\xff\xfe", b"\xfe\xff")):
        raise SourceError(f"{path}:1: the file is in UTF-16; save it as UTF-8")
    return file


class Lines:
    """The lines of a file without their ends, to be read once.

    number: lines read so far; solid: up to the last that holds more than white space;
    returns: carriage returns within them.

    Raises:
        SourceError: damaged gzip, UTF-16, a line that is too long, or other line ends.
    """

    def __init__(self, path: str) -> None:
        self.path, self.number, self.solid, self.returns = path, 0, 0, 0
        self._lines = self._read()

    def __iter__(self) -> Iterator[bytes]:
        return self._lines

    def _read(self) -> Iterator[bytes]:
        ends = 0
        with opened(self.path) as file:
            if file.peek(len(MARK)).startswith(MARK):
                file.read(len(MARK))
            for line in iter(partial(file.readline, MAX_LINE_BYTES + 1), b""):
                self.number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise SourceError(
                        f"{self.path}:{self.number}: the line is longer than {MAX_LINE_BYTES} "
                        f"bytes; shorten it, or correct the file's line ends"
                    )
                ends += line.endswith(b"\n")
                line = line.removesuffix(b"\n").removesuffix(b"\r")
                self.returns += lone_returns(line)
                self.solid = self.number if line and not line.isspace() else self.solid
                yield line
        if self.returns > ends:
            raise SourceError(
                f"{self.path} has {ends} line feeds and {self.returns} carriage returns that none "
                f"follows; write a line feed at the end of each line (and spaces within texts)"
            )

    def drain(self) -> Lines:
        """Reads the lines that are left."""
        deque(self, maxlen=0)
        return self


def lone_returns(line: bytes) -> int:
    """Counts the carriage returns within a line that no other one follows."""
    return len(re.findall(rb"\r(?=[^\r])", line)) if b"\r" in line else 0


def chunked(lines: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Yields lists of lines, with no more of them than a task holds; the last may be empty."""
    chunk, size = list[bytes](), 0
    for line in lines:
        chunk.append(line)
        size += len(line)
        if size > PIECE_BYTES or len(chunk) >= PIECE_ROWS:
            yield chunk
            chunk, size = [], 0
    yield chunk
