"""Reads a dataset's rows by their position, and checks every value that it hands out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from renee_ray.data.dataset.manifest import (
    MANIFEST,
    PART_PATH,
    DatasetError,
    Manifest,
    Part,
)
from renee_ray.data.dataset.schema import empty, schema_of, wrong_column, wrong_value
from renee_ray.data.order import overlapping
from renee_ray.data.storage import (
    absolute,
    filesystem_of,
    is_transient,
    listing,
    patiently,
    read_file,
)
from renee_ray.data.untrusted import read_row_groups
from renee_ray.errors import reason


class Dataset:
    """A converted dataset. Picklable, and cheap to make from (path, manifest) anywhere."""

    def __init__(self, path: str, manifest: Manifest) -> None:
        self.path = absolute(path)
        self.manifest = manifest

    @classmethod
    def open(cls, path: str) -> Dataset:
        """Opens the dataset at `path`, a directory or URL, and checks that its files are there.

        Raises:
            DatasetError: there is no dataset.json, or it cannot be used; a part that it names is
                missing or has another size, or there is a part that it does not name.
        """
        dataset = cls.without_check(path)
        for problem in dataset.wrong_files():
            raise DatasetError(f"{problem}; restore it or convert the source again")
        return dataset

    @classmethod
    def without_check(cls, path: str) -> Dataset:
        """Opens the dataset without a look at its parts."""
        where = f"{path.rstrip('/')}/{MANIFEST}"
        if (content := read_file(where)) is None:
            raise DatasetError(
                f"{path} is not a renee_ray dataset: no {MANIFEST}; "
                f"run `renee-ray convert SRC {path}` first"
            )
        return cls(path, Manifest.from_json(content.decode("utf-8", errors="replace"), where))

    def __reduce__(self) -> tuple[type[Dataset], tuple[str, Manifest]]:
        # Leaves out the cached filesystem: a remote one holds connections.
        return type(self), (self.path, self.manifest)

    @cached_property
    def _located(self) -> tuple[pafs.FileSystem, str]:
        return filesystem_of(self.path)

    def wrong_files(self) -> Iterator[str]:
        """Yields a sentence, without its stop, on each part that a listing shows to be wrong."""
        for split, parts in self.manifest.splits.items():
            listed = listing(self.where(split))
            sizes = {f"{split}/{info.base_name}": info.size for info in listed}
            for part in parts:
                size = sizes.get(part.path)
                if size is None:
                    yield f"{self.where(part.path)} is missing and {MANIFEST} names it"
                elif size != part.size:
                    yield (
                        f"{self.where(part.path)} has {size} bytes and {MANIFEST} says {part.size}"
                    )
            for name in sorted(sizes.keys() - {part.path for part in parts}):
                if PART_PATH.fullmatch(name):
                    yield f"{self.where(name)} is there and {MANIFEST} does not name it"

    def where(self, relative: str) -> str:
        """Returns the path of a file of the dataset, for people."""
        return f"{self.path.rstrip('/')}/{relative}"

    def checksum(self, part: Part) -> str:
        """Computes the SHA-256 of the file of `part` as it is now.

        Raises:
            OSError: it cannot be read.
        """
        filesystem, root = self._located
        with filesystem.open_input_stream(f"{root}/{part.path}") as source:
            digest = hashlib.sha256()
            while block := source.read(2**20):
                digest.update(block)
        return digest.hexdigest()

    def read_part(self, part: Part, columns: Sequence[str] | None = None) -> pa.Table:
        """Reads all rows of `part`; `columns` None means every column.

        Raises:
            DatasetError: the file is missing, is no Parquet, has another number of rows or
                other columns, decodes to far more than its rows may, or holds a null, a label
                that there is not, or a negative number.
        """
        return self.read_rows_of(part, 0, part.rows, columns)

    def read_rows(
        self, split: str, start: int, stop: int, columns: Sequence[str] | None = None
    ) -> pa.Table:
        """Reads rows [start, stop) of `split` in stored order; of "labels", these label ids.

        Only the row groups concerned are read.

        Raises:
            IndexError: [start, stop) is not within the split.
            DatasetError: as in read_part.
        """
        parts = self.manifest.splits[split]
        if not 0 <= start <= stop <= self.manifest.num_points(split):
            raise IndexError(
                f"rows [{start}, {stop}) of {split}, which has {self.manifest.num_points(split)}"
            )
        starts = [*(part.first for part in parts), self.manifest.num_points(split)]
        tables = [
            self.read_rows_of(parts[i], low, high, columns)
            for i, low, high in overlapping(starts, start, stop)
        ]
        return pa.concat_tables(tables) if tables else empty(split, columns)

    def read_other_texts(self, part: Part, count: int, start: int, stop: int) -> pa.Table:
        """Reads label_id and input_ids of the labels [start, stop) of the `count` not `is_point`.

        Their places are known only once `is_point` of the whole part has been read.

        Raises:
            DatasetError: as in read_part, or there are not `count` of them.
        """
        columns = ["label_id", "input_ids"]
        is_point = self.read_part(part, ["is_point"])["is_point"].to_numpy()
        places = np.flatnonzero(~is_point)
        if len(places) != count:
            raise DatasetError(
                f"{self.where(part.path)} has {len(places)} labels that are no points and "
                f"{MANIFEST} says {count}; convert the source again"
            )
        places = places[start:stop]
        if not len(places):
            return empty("labels", columns)
        low = int(places[0])
        table = self.read_rows_of(part, low, int(places[-1]) + 1, columns)
        return table.take(pa.array(places - low))

    def read_rows_of(
        self, part: Part, start: int, stop: int, columns: Sequence[str] | None = None
    ) -> pa.Table:
        """Reads rows [start, stop) of `part`, as read_part does."""
        return patiently(
            lambda: self._read_once(part, start, stop, columns),
            f"reading {self.where(part.path)}",
        )

    def _read_once(
        self, part: Part, start: int, stop: int, columns: Sequence[str] | None
    ) -> pa.Table:
        where, split = self.where(part.path), part.path.partition("/")[0]
        filesystem, root = self._located
        selected = list(schema_of(split).names if columns is None else columns)
        try:
            with filesystem.open_input_file(f"{root}/{part.path}") as source:
                file = pq.ParquetFile(source, page_checksum_verification=True)
                if file.metadata.num_rows != part.rows:
                    raise DatasetError(
                        f"{where} has {file.metadata.num_rows} rows and {MANIFEST} says "
                        f"{part.rows}; convert the source again"
                    )
                if wrong := wrong_column(file.schema_arrow, split, selected):
                    raise DatasetError(f"{where} {wrong}; convert the source again")
                groups, skip = overlapping_groups(file.metadata, start, stop)
                table = read_row_groups(file, groups, selected)
        except (OSError, ValueError, NotImplementedError) as error:  # pyarrow's are among them
            if is_transient(error):
                raise
            raise DatasetError(
                f"{where} cannot be read ({type(error).__name__}: {reason(error):.200}); "
                f"convert the source again"
            ) from error
        table = table.slice(skip, stop - start)
        if wrong := wrong_value(table, part.first + start, self.manifest.num_labels):
            raise DatasetError(f"{where} {wrong}; convert the source again")
        return table


def overlapping_groups(metadata: pq.FileMetaData, start: int, stop: int) -> tuple[list[int], int]:
    """Returns the row groups of rows [start, stop), and the rows before `start` in the first."""
    sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    found = list(overlapping(np.cumsum([0, *sizes]), start, stop))
    return [i for i, _, _ in found], found[0][1] if found else 0
