"""Tokens as microsoft/renee stores them: a row of ids a text, padded to one length, and a mask.

    {tokenizer}-{length}/{trn_doc,tst_doc,lbl}_{input_ids,attention_mask}.dat
                                                        int64 [rows, length]

The labels of points are in the repository's text files beside this folder (repository.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from renee_ray.data.sources.lines import PIECE_BYTES, PIECE_ROWS
from renee_ray.data.sources.records import Int64s, SourceError
from renee_ray.data.storage import filesystem_of, listing, patiently


@dataclass(frozen=True)
class Memmap:
    """The tokens of one split, or of the labels.

    path: of the ids, to which `mask` belongs; length: tokens of a row, padding included.
    """

    path: str
    length: int

    @property
    def mask(self) -> str:
        return self.path.replace("_input_ids.dat", "_attention_mask.dat")

    @cached_property
    def rows(self) -> int:
        """The number of rows. Raises SourceError where the two files have other sizes."""
        both = [filesystem_of(path) for path in (self.path, self.mask)]
        sizes = [filesystem.get_file_info(name).size for filesystem, name in both]
        if sizes[0] != sizes[1] or sizes[0] is None or sizes[0] % (8 * self.length):
            raise SourceError(
                f"{self.path} and its attention_mask have {sizes} bytes, which are not the same "
                f"number of rows of {self.length} int64; tokenise again"
            )
        return int(sizes[0]) // (8 * self.length)

    def pieces(self) -> Iterator[pa.Table]:
        """Reads all rows without their padding, in pieces with the column `input_ids`."""
        size = min(PIECE_ROWS, max(1, PIECE_BYTES // (8 * self.length)))
        for first in range(0, max(self.rows, 1), size):  # one of no rows at the least
            rows = min(size, self.rows - first)
            ids, mask = (self._numbers(path, first, rows) for path in (self.path, self.mask))
            counts = (mask != 0).sum(1)
            if rows and not counts.all():
                row = first + int(counts.argmin())
                raise SourceError(f"{self.path}: row {row} has no token; correct it")
            offsets = np.concatenate([[0], np.cumsum(counts)])
            tokens = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(ids[mask != 0]))
            yield pa.table({"input_ids": tokens})

    def _numbers(self, path: str, first: int, rows: int) -> Int64s:
        def read() -> bytes:
            filesystem, name = filesystem_of(path)
            with filesystem.open_input_file(name) as file:
                content: bytes = file.read_at(8 * self.length * rows, 8 * self.length * first)
            return content

        numbers = np.frombuffer(patiently(read, f"reading {path}"), "<i8")
        return numbers.reshape(rows, self.length)


def find_memmaps(path: str) -> dict[str, Memmap]:
    """Finds the tokens of "trn_doc", "tst_doc" and "lbl" below folder `path`.

    Raises:
        SourceError: there are several folders of them.
    """
    base, found = path.rstrip("/"), dict[str, dict[str, Memmap]]()
    for info in listing(base):
        match = re.fullmatch(r".+-(\d+)", info.base_name)
        if match and int(match[1]) and info.type == pafs.FileType.Directory:
            folder = f"{base}/{info.base_name}"
            names = {each.base_name for each in listing(folder)}
            made = {
                role: Memmap(f"{folder}/{role}_input_ids.dat", int(match[1]))
                for role in ("trn_doc", "tst_doc", "lbl")
                if f"{role}_input_ids.dat" in names
            }
            if made:
                found[folder] = made
    if len(found) > 1:
        raise SourceError(f"{' and '.join(sorted(found)[:2])} are both there; keep one of them")
    return next(iter(found.values()), {})
