"""dataset.json: what a dataset consists of. It is written last and checked when it is read."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.fs as pafs
from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from renee_ray.data.dataset.schema import MAX_LABELS, MAX_ROWS, SPLITS
from renee_ray.data.destination import Kind
from renee_ray.data.storage import filesystem_of, patiently
from renee_ray.data.untrusted import first_problem, parse_json
from renee_ray.errors import ReneeError, reason

FORMAT_VERSION = 3
MANIFEST = "dataset.json"
PART_PATH = re.compile(rf"({'|'.join(SPLITS)})/part-\d{{1,12}}\.parquet", re.ASCII)


class DatasetError(ReneeError):
    """A directory that is no dataset, or a damaged one."""


def _all_splits(raw: Any) -> Any:
    """Keeps the known splits; one that is missing is None, which is refused by its name."""
    return {name: raw.get(name) for name in SPLITS} if isinstance(raw, dict) else raw


Count = Annotated[int, Field(strict=True, ge=0, le=MAX_ROWS)]
Propensity = Annotated[float, Field(strict=True, gt=0, le=1e6)]


@dataclass(frozen=True)
class Part:
    """One Parquet file of a split."""

    path: str
    """Relative to the dataset's directory."""
    rows: Count
    first: Count
    """Position of its first row in the split: for labels, the first label_id."""
    size: Count
    """Bytes of the file."""
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """Of the file, in hexadecimal."""


@dataclass(frozen=True)
class Manifest:
    """What dataset.json says. `from_json` alone validates the fields."""

    format_version: int
    tokenizer: str
    """Name or directory, as given at conversion."""
    vocabulary_hash: str
    """SHA-256 of the vocabulary, so that an encoder with another one can be refused."""
    max_length: Annotated[int, Field(strict=True, ge=1, le=1 << 20)]
    """Tokens kept of each text, special tokens included."""
    pad_id: Annotated[int, Field(strict=True, ge=0, lt=1 << 31)]
    num_labels: Annotated[int, Field(strict=True, ge=0, le=MAX_LABELS)]
    has_label_texts: Annotated[bool, Field(strict=True)]
    propensity_a: Propensity
    propensity_b: Propensity
    splits: Annotated[dict[str, tuple[Part, ...]], BeforeValidator(_all_splits)]
    """Keys SPLITS; a split without rows has no parts."""
    other_texts: tuple[Count, ...]
    """For each part of labels, the number of its labels that are not `is_point`."""
    statistics: dict[str, Any]
    """Counts of the conversion, for people, plans and first weights."""
    labels_hash: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """`hash_labels` of all labels."""

    def num_points(self, split: str) -> int:
        """Rows of `split` ("labels" too)."""
        parts = self.splits[split]
        return parts[-1].first + parts[-1].rows if parts else 0

    @property
    def hash(self) -> str:
        """SHA-256 of what `to_json` writes."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> Manifest:
        """Parses a manifest that was read from `where`, which errors name.

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
        try:
            manifest = _MANIFEST.validate_python(raw)
        except ValidationError as error:
            raise _damaged(where, first_problem(error)) from None
        if problem := _disagreement(manifest):
            raise _damaged(where, problem)
        return manifest


_MANIFEST = TypeAdapter(Manifest)


def _damaged(where: str, problem: str) -> DatasetError:
    return DatasetError(f"{where} {problem}; convert the source again")


def _disagreement(manifest: Manifest) -> str | None:
    """Says where fields of a manifest do not fit together; None where they do."""
    for split, parts in manifest.splits.items():
        paths: set[str] = set()
        following = 0
        for part in parts:
            if not PART_PATH.fullmatch(part.path) or part.path.partition("/")[0] != split:
                return (
                    f"has a part outside the dataset's directory, {part.path!r:.80}, or not named "
                    f"{split}/part-NUMBER.parquet"
                )
            if part.path in paths:
                return f"has the part {part.path} twice"
            if part.first != following:
                return f"has part {part.path} at row {part.first} instead of {following}"
            paths.add(part.path)
            following += part.rows
    rows = [part.rows for part in manifest.splits["labels"]]
    counts = manifest.other_texts
    if len(counts) != len(rows) or any(n > most for n, most in zip(counts, rows, strict=True)):
        return f"has other_texts={list(counts)!r:.80}, which do not fit its labels parts"
    if sum(rows) != manifest.num_labels:
        return f"has num_labels={manifest.num_labels} but {sum(rows)} rows in its labels parts"
    return None


DATASET = Kind(
    "a dataset", MANIFEST, "_converting.json", frozenset({"format_version", "vocabulary_hash"}),
    PART_PATH, SPLITS, beside_others=True,
)  # fmt: skip
"""The files of a dataset, for the directory that it is written to."""


def part_path(split: str, index: int) -> str:
    return f"{split}/part-{index:05d}.parquet"


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
    """The hash of all labels, from the hashes of ranges of them."""
    return f"{sum(int(each, 16) for each in hashes) % 2**256:064x}"


def has_manifest(path: str) -> bool:
    filesystem, root = filesystem_of(path)
    name = f"{root}/{MANIFEST}"
    found = patiently(lambda: filesystem.get_file_info(name), f"reading {path}")
    return bool(found.type == pafs.FileType.File)
