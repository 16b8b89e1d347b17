"""A tiny dataset, and parts of it that are written anew."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from renee_ray.data import dataset as layout
from renee_ray.data.dataset import Dataset

from ..data.tiny import write_tiny
from .place import Place

Change = Callable[[pa.Table], pa.Table]


def tiny(place: Place) -> Path:
    path = place.given / "set"
    write_tiny(path)
    return path


def replaced(path: Path, split: str, content: bytes) -> Dataset:
    """The dataset with another first part, of which the manifest knows size and SHA-256."""
    name = f"{split}/part-00000.parquet"
    (path / name).write_bytes(content)
    raw = json.loads((path / layout.MANIFEST).read_text())
    raw["splits"][split][0] |= {
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    (path / layout.MANIFEST).write_text(json.dumps(raw))
    return Dataset.without_check(str(path))


def parquet(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", **options)
    return sink.getvalue()


def first_part(path: Path, split: str) -> pa.Table:
    return pq.read_table(path / split / "part-00000.parquet")


def column(
    name: str, values: Any, kind: pa.DataType | None = None
) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        index = table.column_names.index(name)
        made = values if isinstance(values, pa.Array) else pa.array(values, kind)
        return table.set_column(index, name, made)

    return change


def run_directory(place: Place, dataset: Path) -> Path:
    """As much of a run as is read before Ray is started."""
    path = place.given / "run"
    path.mkdir()
    made = Dataset.open(str(dataset)).manifest
    saved = {
        "config": {"data": str(dataset), "output": str(path)},
        "dataset": {
            "path": str(dataset),
            "num_labels": made.num_labels,
            "vocabulary_hash": made.vocabulary_hash,
            "manifest_hash": made.hash,
        },
    }
    (path / "run.json").write_text(json.dumps(saved))
    return path
