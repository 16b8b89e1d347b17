"""A dataset directory: its schemas, its manifest, and reading rows by position.

    dataset.json            the manifest; written last, so a directory without it is no dataset
    train/part-*.parquet    POINTS, in the order of a seeded hash of point_id
    validation/, test/      POINTS, ascending point_id
    labels/part-*.parquet   LABELS, ascending label_id, so that a row's position is its label_id

A part is one Parquet file, the unit of shuffling: about a thousand a split, if it is so large.
Its row groups are small, so that nothing here reads much more than the rows asked for.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property, partial
from typing import Any, TypeGuard

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from renee_ray.data.storage import (
    absolute,
    filesystem_of,
    is_transient,
    listing,
    make_directory,
    patiently,
    replace_file,
    write_file,
)
from renee_ray.data.untrusted import (
    parse_json,
    read_bounded,
    read_row_groups,
    refuse_links_out,
    rows_of,
)
from renee_ray.errors import ReneeError, reason

FORMAT_VERSION = 3
MANIFEST = "dataset.json"
SPLITS = ("train", "validation", "test", "labels")
ROW_GROUP_ROWS = 2048
"""Rows that are decoded together: who wants a few reads no more of a part."""
_PART = re.compile(r"part-\d{1,12}\.parquet", re.ASCII)
MANIFEST_LIMIT = 1 << 27
"""Bytes of a manifest: half a million parts."""
MAX_LABELS = 1 << 31
MAX_ROWS = 1 << 48
MAX_TEXT = 4096
ROWS_A_BYTE = 8
"""More rows than a byte of a part can stand for; row groups take 4 bytes a row at the least."""

POINTS = pa.schema(
    {
        "point_id": pa.int64(),
        "input_ids": pa.list_(pa.int32()),
        "labels": pa.list_(pa.int64()),
        "filter_labels": pa.list_(pa.int64()),
    }
)
"""A row of train, validation or test. point_id: row number in the source file of its split,
from 0 (validation: in the training file). input_ids: unpadded, special tokens included.
labels, filter_labels: ascending, unique."""

LABELS = pa.schema(
    {
        "label_id": pa.int64(),
        "text": pa.string(),
        "input_ids": pa.list_(pa.int32()),
        "train_count": pa.int64(),
        "is_point": pa.bool_(),
    }
)
"""A row of labels. train_count: points of the source's training file that carry the label
(train and validation together, no augmentation). is_point: the label is a filter label of a point
of train, so that its text, or one like it, is among the points."""


class DatasetError(ReneeError):
    """A directory that is no dataset, or a damaged one."""


@dataclass(frozen=True)
class Part:
    """One Parquet file of a split."""

    path: str
    """Relative to the dataset's directory."""
    rows: int
    first: int
    """Position of its first row in the split: for labels, the first label_id."""
    size: int
    """Bytes of the file."""
    sha256: str
    """Of the file, in hexadecimal."""


@dataclass(frozen=True)
class Manifest:
    """What dataset.json says."""

    format_version: int
    tokenizer: str
    """Name or directory, as given at conversion."""
    vocabulary_hash: str
    """SHA-256 of the vocabulary, so that an encoder with another one can be refused."""
    max_length: int
    """Tokens kept of each text, special tokens included."""
    pad_id: int
    num_labels: int
    has_label_texts: bool
    propensity_a: float
    propensity_b: float
    splits: dict[str, tuple[Part, ...]]
    """Keys SPLITS; a split without rows has no parts."""
    other_texts: tuple[int, ...]
    """Of each part of labels, the labels that are not `is_point`."""
    statistics: dict[str, Any]
    """Counts of the conversion, for people."""
    labels_hash: str = ""
    """Of the labels' numbers and texts, as `hash_labels`; empty where an earlier renee_ray wrote
    the manifest."""

    def num_points(self, split: str) -> int:
        """Rows of `split` ("labels" too)."""
        parts = self.splits[split]
        return parts[-1].first + parts[-1].rows if parts else 0

    @property
    def hash(self) -> str:
        """SHA-256 of what `to_json` writes."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        content = asdict(self)
        if not self.labels_hash:  # runs know a manifest without it by its hash
            del content["labels_hash"]
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> Manifest:
        """The manifest in `text`, read from `where` (named in errors).

        Raises:
            DatasetError: not JSON, another format version, a wrong type, a part whose path
                leaves the directory, or parts that do not follow one another.
        """
        try:
            raw = parse_json(text)
        except ValueError as error:
            raise _damaged(where, f"is not JSON ({reason(error)})") from None
        if not isinstance(raw, dict):
            raise _damaged(where, f"holds a {type(raw).__name__} instead of an object")
        version = raw.get("format_version")
        if version != FORMAT_VERSION:
            raise DatasetError(
                f"{where} has format version {version!r:.40} and this renee_ray reads version "
                f"{FORMAT_VERSION}; convert the source again"
            )
        for name, kind in _SCALARS.items():
            if not _is(raw.get(name), kind):
                raise _damaged(
                    where, f"has {name}={raw.get(name)!r:.80} instead of a {kind.__name__}"
                )
        for name, (least, most) in _BOUNDS.items():
            if not least <= raw[name] <= most:
                raise _damaged(
                    where, f"has {name}={raw[name]!r:.40}, which is not in [{least}, {most}]"
                )
        labels_hash = raw.get("labels_hash", "")
        if not _is(labels_hash, str) or not re.fullmatch("[0-9a-f]{64}|", labels_hash):
            raise _damaged(where, f"has labels_hash={labels_hash!r:.80}, which is no hash")
        for name in ("tokenizer", "vocabulary_hash"):
            if len(raw[name]) > MAX_TEXT or not raw[name].isprintable():
                raise _damaged(where, f"has {name}={raw[name]!r:.80}, which is no name")
        splits = {name: _parts(raw["splits"].get(name), name, where) for name in SPLITS}
        known = {field.name for field in fields(cls)}
        texts = _other_texts(raw.get("other_texts"), splits["labels"], where)
        plain = {k: v for k, v in raw.items() if k in known}
        manifest = cls(**{**plain, "splits": splits, "other_texts": texts})
        if manifest.num_points("labels") != manifest.num_labels:
            raise _damaged(
                where,
                f"has num_labels={manifest.num_labels} but {manifest.num_points('labels')} rows "
                f"in its labels parts",
            )
        return manifest


_SCALARS: dict[str, type] = {
    "tokenizer": str,
    "vocabulary_hash": str,
    "max_length": int,
    "pad_id": int,
    "num_labels": int,
    "has_label_texts": bool,
    "propensity_a": float,
    "propensity_b": float,
    "splits": dict,
    "statistics": dict,
}

_BOUNDS: dict[str, tuple[float, float]] = {
    "max_length": (1, 1 << 20),
    "pad_id": (0, (1 << 31) - 1),
    "num_labels": (0, MAX_LABELS),
    "propensity_a": (0, 1e6),
    "propensity_b": (0, 1e6),
}


def _is(value: object, kind: type) -> bool:
    if kind is float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return math.isfinite(value) if isinstance(value, float) else abs(value) < 2**63
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _damaged(where: str, what: str) -> DatasetError:
    return DatasetError(f"{where} {what}; convert the source again")


def _parts(raw: object, split: str, where: str) -> tuple[Part, ...]:
    if not isinstance(raw, list):
        raise _damaged(where, f"has splits.{split}={raw!r:.80} instead of a list of parts")
    parts: list[Part] = []
    names: set[str] = set()
    expected_first = 0
    for item in raw:
        part = _part(item, split, where)
        if part.path in names:
            raise _damaged(where, f"has the part {part.path} twice")
        names.add(part.path)
        if part.first != expected_first:
            raise _damaged(
                where, f"has part {part.path} at row {part.first} instead of {expected_first}"
            )
        expected_first += part.rows
        parts.append(part)
    return tuple(parts)


def _other_texts(raw: object, parts: tuple[Part, ...], where: str) -> tuple[int, ...]:
    if (
        not isinstance(raw, list)
        or len(raw) != len(parts)
        or not all(
            _is(count, int) and 0 <= count <= part.rows
            for count, part in zip(raw, parts, strict=True)
        )
    ):
        raise _damaged(where, f"has other_texts={raw!r:.80}")
    return tuple(raw)


def _part(item: object, split: str, where: str) -> Part:
    if (
        not isinstance(item, dict)
        or not _is(item.get("path"), str)
        or not _is(item.get("rows"), int)
        or not _is(item.get("first"), int)
        or not _is(item.get("size"), int)
        or not re.fullmatch(r"[0-9a-f]{64}", str(item.get("sha256")))
        or min(item["rows"], item["first"], item["size"]) < 0
        or max(item["rows"], item["first"], item["size"]) > MAX_ROWS
    ):
        raise _damaged(where, f"has the part {item!r:.200} in splits.{split}")
    if not is_part_path(item["path"]) or item["path"].partition("/")[0] != split:
        raise _damaged(
            where,
            f"has a part outside the dataset's directory, {item['path']!r:.80}, or not named "
            f"{split}/part-NUMBER.parquet",
        )
    if item["rows"] > ROWS_A_BYTE * item["size"]:
        raise _damaged(
            where,
            f"says {item['rows']} rows of the {item['size']} bytes of {item['path']}",
        )
    return Part(item["path"], item["rows"], item["first"], item["size"], item["sha256"])


class Dataset:
    """A converted dataset. Cheap to make from (path, manifest) anywhere, and picklable."""

    def __init__(self, path: str, manifest: Manifest) -> None:
        self.path = absolute(path)
        self.manifest = manifest

    @classmethod
    def open(cls, path: str) -> Dataset:
        """The dataset at `path`, a local directory or the URL of one, whose files are all there.

        Raises:
            DatasetError: there is no dataset.json, or it cannot be used; a part that it names is
                missing or has another size, or there is a part that it does not name.
        """
        dataset = cls.without_check(path)
        for problem in dataset.wrong_files():
            raise DatasetError(f"{problem}; restore it or convert the source again")
        # Whoever lies about rows has a largest part: one footer of each split is enough.
        for parts in dataset.manifest.splits.values():
            if parts:
                largest = max(parts, key=lambda part: part.rows)
                dataset._read(largest, 0, 0, None)
        return dataset

    @classmethod
    def without_check(cls, path: str) -> Dataset:
        """As `open`, whatever has become of the parts."""
        filesystem, root = filesystem_of(path)
        refuse_links_out(filesystem, root, path)
        name = f"{root}/{MANIFEST}"
        there = patiently(lambda: filesystem.get_file_info(name), f"reading {path}")
        if there.type != pafs.FileType.File:
            raise DatasetError(
                f"{path} is not a renee_ray dataset: no {MANIFEST}; "
                f"run `renee-ray convert SRC {path}` first"
            )
        where = f"{path.rstrip('/')}/{MANIFEST}"
        content = patiently(
            lambda: read_bounded(filesystem, name, MANIFEST_LIMIT, where), f"reading {where}"
        )
        return cls(path, Manifest.from_json(content.decode("utf-8", errors="replace"), where))

    def __reduce__(self) -> tuple[type[Dataset], tuple[str, Manifest]]:
        # Not the cached filesystem: a remote one holds connections.
        return type(self), (self.path, self.manifest)

    def __repr__(self) -> str:
        return f"Dataset({self.path!r})"

    @cached_property
    def _located(self) -> tuple[pafs.FileSystem, str]:
        return filesystem_of(self.path)

    @property
    def filesystem(self) -> pafs.FileSystem:
        return self._located[0]

    @property
    def root(self) -> str:
        """The dataset's directory as `filesystem` names it."""
        return self._located[1]

    def wrong_files(self) -> Iterator[str]:
        """Sentences, without a stop, on the parts that are not as the manifest says, by listing."""
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
                if is_part_path(name):
                    yield f"{self.where(name)} is there and {MANIFEST} does not name it"

    def where(self, relative: str) -> str:
        """The path of a file of the dataset, for people."""
        return f"{self.path.rstrip('/')}/{relative}"

    def checksum(self, part: Part) -> str:
        """SHA-256 of the file of `part` as it now is.

        Raises:
            OSError: it cannot be read.
        """
        with self.filesystem.open_input_stream(f"{self.root}/{part.path}") as source:
            found = hashlib.sha256()
            while block := source.read(2**20):
                found.update(block)
        return found.hexdigest()

    def labels_hash(self) -> str:
        """The manifest's, or the same from the label texts where it has none.

        Raises:
            DatasetError: as in read_part.
        """
        if self.manifest.labels_hash:
            return self.manifest.labels_hash
        hashes = (
            hash_labels(part.first, self.read_part(part, ["text"])["text"])
            for part in self.manifest.splits["labels"]
        )
        return add_hashes(hashes)

    def read_part(self, part: Part, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows of `part`; `columns` None means every column.

        Raises:
            DatasetError: the file is missing, is no Parquet, has another number of rows or
                other columns, decodes to far more than its rows may, or holds a null, a label
                that there is not, or a negative number.
        """
        return self._read(part, 0, part.rows, columns)

    def read_unchecked(self, part: Part) -> pa.Table:
        """All rows and columns of `part` as they are, for whoever checks them.

        Raises:
            DatasetError: as in read_part, but for columns and values.
        """
        return self._read(part, 0, part.rows, None, check=False)

    def read_rows(
        self, split: str, start: int, stop: int, columns: Sequence[str] | None = None
    ) -> pa.Table:
        """Rows [start, stop) of `split` in stored order; for "labels", of those label ids.

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
        tables = [
            self._read(part, max(start - part.first, 0), min(stop - part.first, part.rows), columns)
            for part in _overlapping(parts, start, stop)
        ]
        return pa.concat_tables(tables) if tables else _empty(split, columns)

    def read_other_texts(self, part: Part, count: int, start: int, stop: int) -> pa.Table:
        """label_id and input_ids of labels of `part`: [start, stop) of the `count` not `is_point`.

        Where they are in a part is not known before `is_point` of all of it has been read.

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
            return _empty("labels", columns)
        low = int(places[0])
        table = self._read(part, low, int(places[-1]) + 1, columns)
        return table.take(pa.array(places - low))

    def read_rows_of(
        self, part: Part, start: int, stop: int, columns: Sequence[str] | None = None
    ) -> pa.Table:
        """Rows [start, stop) of `part`, as in read_rows."""
        return self._read(part, start, stop, columns)

    def _read(
        self,
        part: Part,
        start: int,
        stop: int,
        columns: Sequence[str] | None,
        *,
        check: bool = True,
    ) -> pa.Table:
        return patiently(
            lambda: self._read_once(part, start, stop, columns, check),
            f"reading {self.where(part.path)}",
        )

    def _read_once(
        self, part: Part, start: int, stop: int, columns: Sequence[str] | None, check: bool
    ) -> pa.Table:
        where, split = self.where(part.path), part.path.partition("/")[0]
        wanted = list(schema_of(split).names if columns is None else columns)
        try:
            with self.filesystem.open_input_file(f"{self.root}/{part.path}") as source:
                opened = partial(pq.ParquetFile, source, page_checksum_verification=True)
                file = opened()
                opened = partial(opened, metadata=file.metadata)
                if rows_of(file.metadata) != part.rows:
                    raise DatasetError(
                        f"{where} has {file.metadata.num_rows} rows and {MANIFEST} says "
                        f"{part.rows}; convert the source again"
                    )
                if check:
                    _check_columns(file.schema_arrow, split, wanted, where)
                elif columns is None:
                    wanted = file.schema_arrow.names
                groups, skip = _row_groups(file.metadata, start, stop)
                table = read_row_groups(opened, groups, wanted)
        except (OSError, ValueError, NotImplementedError) as error:  # pyarrow's are among them
            if is_transient(error):
                raise
            raise DatasetError(
                f"{where} cannot be read ({type(error).__name__}: {reason(error):.200}); "
                f"convert the source again"
            ) from error
        table = table.slice(skip, stop - start)
        if check and (wrong := _wrong_value(table, part.first + start, self.manifest.num_labels)):
            raise DatasetError(f"{where} {wrong}; convert the source again")
        return table


def _check_columns(found: pa.Schema, split: str, wanted: list[str], where: str) -> None:
    for name in wanted:
        kinds = [field.type for field in found if field.name == name]
        kind = schema_of(split).field(name).type
        if kinds != [kind]:
            shown = " and ".join(map(str, kinds)) or "nothing"
            raise DatasetError(
                f"{where} has {shown:.80} as column {name!r} instead of {kind}; "
                f"convert the source again"
            )


def _wrong_value(table: pa.Table, first: int, num_labels: int) -> str | None:
    """What no index, count or list of a dataset may be: indices go into arrays unchecked."""
    top = {"labels": num_labels, "filter_labels": num_labels, "input_ids": 1 << 31}
    top["train_count"] = MAX_ROWS
    for name in table.column_names:
        column = table[name]
        nulls = column.null_count
        if pa.types.is_list(column.type):
            column = pc.list_flatten(column)
            nulls += column.null_count
        if nulls:
            return f"has nulls in {name}"
        if name == "label_id":
            if not np.array_equal(column.to_numpy(), np.arange(first, first + len(column))):
                return "has labels that are not in the order of their ids"
        elif name in top and len(column):
            ends = pc.min_max(column)
            low, high = ends["min"].as_py(), ends["max"].as_py()
            if low < 0 or high >= top[name]:
                worst = low if low < 0 else high
                return f"has {worst} in {name}, which is not in [0, {top[name]})"
    return None


def _overlapping(parts: Sequence[Part], start: int, stop: int) -> Iterator[Part]:
    if start == stop:
        return
    index = bisect_right(parts, start, key=lambda part: part.first) - 1
    for part in parts[index:]:
        if part.first >= stop:
            return
        if part.first + part.rows > start:
            yield part


def _row_groups(metadata: pq.FileMetaData, start: int, stop: int) -> tuple[list[int], int]:
    """Row groups that hold rows [start, stop), and the rows before `start` in the first one."""
    groups: list[int] = []
    skip = 0
    first = 0
    for index in range(metadata.num_row_groups):
        rows = metadata.row_group(index).num_rows
        if first < stop and first + rows > start:
            if not groups:
                skip = start - first
            groups.append(index)
        first += rows
    return groups, skip


def _empty(split: str, columns: Sequence[str] | None) -> pa.Table:
    table = schema_of(split).empty_table()
    return table if columns is None else table.select(list(columns))


def hash_labels(first: int, texts: pa.Array | pa.ChunkedArray) -> str:
    """A hash of labels `first`, `first` + 1, ... with these texts: whatever parts they come in.

    The sum, modulo 2^256, of the SHA-256 of each label's number and text, so that ranges of labels
    are hashed apart and `add_hashes` gives the hash of all.
    """
    return add_hashes(
        hashlib.sha256(f"{label} {text}".encode()).hexdigest()
        for label, text in enumerate(texts.to_pylist(), first)
    )


def add_hashes(hashes: Iterable[str]) -> str:
    """The hash of all labels of which these are the hashes."""
    return f"{sum(int(each, 16) for each in hashes) % 2**256:064x}"


def schema_of(split: str) -> pa.Schema:
    return LABELS if split == "labels" else POINTS


def is_part_path(path: object) -> TypeGuard[str]:
    """Whether `path` is SPLIT/part-NUMBER.parquet."""
    if not isinstance(path, str):
        return False
    split, _, name = path.partition("/")
    return split in SPLITS and _PART.fullmatch(name) is not None


def part_path(split: str, index: int) -> str:
    return f"{split}/part-{index:05d}.parquet"


def write_part(path: str, relative: str, first: int, tables: pa.Table | Iterable[pa.Table]) -> Part:
    """Writes one part file under the dataset directory `path`, whose rows begin at `first`.

    Its pages carry checksums, which reading verifies.
    """
    table = tables if isinstance(tables, pa.Table) else pa.concat_tables(tables)
    buffer = pa.BufferOutputStream()
    pq.write_table(
        table, buffer, compression="zstd", row_group_size=ROW_GROUP_ROWS, write_page_checksum=True
    )
    content = buffer.getvalue()
    write_file(f"{path.rstrip('/')}/{relative}", content)
    return Part(relative, len(table), first, content.size, hashlib.sha256(content).hexdigest())


def write_manifest(path: str, manifest: Manifest) -> None:
    """Publishes `manifest` at `path`: readers see all of dataset.json or none."""
    make_directory(path)
    replace_file(f"{path.rstrip('/')}/{MANIFEST}", manifest.to_json().encode())


def has_manifest(path: str) -> bool:
    filesystem, root = filesystem_of(path)
    name = f"{root}/{MANIFEST}"
    found = patiently(lambda: filesystem.get_file_info(name), f"reading {path}")
    return bool(found.type == pafs.FileType.File)
