"""A small random dataset on disk, for tests of what reads one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from renee_ray.data import dataset as layout
from renee_ray.data.dataset import Dataset, Manifest, Part
from renee_ray.data.storage import make_directory

PAD = 0


def make_splits(path: str) -> None:
    """The directories of a dataset's parts."""
    for split in layout.SPLITS:
        make_directory(f"{path}/{split}")


def write_tiny(
    path: str | Path,
    *,
    train: tuple[int, ...] = (6, 0, 9, 5),
    validation: tuple[int, ...] = (4,),
    test: tuple[int, ...] = (5, 3),
    labels: tuple[int, ...] = (7, 4),
    vocabulary: int = 30,
    longest: int = 9,
    seed: int = 0,
    empty: tuple[int, ...] = (),
) -> Dataset:
    """Parts of so many rows; tokens in [1, vocabulary), up to three labels a point, texts but of
    the labels `empty`."""
    rng = np.random.default_rng(seed)
    num_labels = sum(labels)
    make_splits(str(path))
    splits: dict[str, tuple[Part, ...]] = {}
    counts = np.zeros(num_labels, dtype=np.int64)
    for split, sizes in (("train", train), ("validation", validation), ("test", test)):
        ids = rng.permutation(sum(sizes)) + (1000 if split == "validation" else 0)
        rows = [_point(rng, int(i), num_labels, vocabulary, longest, split) for i in ids]
        if split != "test":
            for row in rows:
                counts[row["labels"]] += 1
        splits[split] = _write(str(path), split, sizes, pa.Table.from_pylist(rows, layout.POINTS))
    drawn = [_tokens(rng, vocabulary, longest) for _ in range(num_labels)]
    texts = [
        {
            "label_id": label,
            "text": "" if label in empty else f"label {label}",
            "input_ids": [1, 2] if label in empty else drawn[label],
            "train_count": int(counts[label]),
            "is_point": label % 3 == 0,
        }
        for label in range(num_labels)
    ]
    table = pa.Table.from_pylist(texts, layout.LABELS)
    splits["labels"] = _write(str(path), "labels", labels, table)
    layout.write_manifest(
        str(path),
        Manifest(
            format_version=layout.FORMAT_VERSION,
            tokenizer="none",
            vocabulary_hash="00",
            max_length=longest,
            pad_id=PAD,
            num_labels=num_labels,
            has_label_texts=True,
            propensity_a=0.55,
            propensity_b=1.5,
            splits=splits,
            other_texts=_other_texts(splits["labels"]),
            statistics={"labels": {"empty_texts": len(empty)}},
            labels_hash=layout.hash_labels(0, table["text"]),
        ),
    )
    return Dataset.open(str(path))


def _other_texts(parts: tuple[Part, ...]) -> tuple[int, ...]:
    ids = [range(part.first, part.first + part.rows) for part in parts]
    return tuple(sum(label % 3 != 0 for label in part) for part in ids)


def _point(
    rng: np.random.Generator, id: int, num_labels: int, vocabulary: int, longest: int, split: str
) -> dict[str, Any]:
    chosen = rng.permutation(num_labels)[: rng.integers(0, 6)]
    number = int(rng.integers(0, 4))
    filtered = chosen[number:] if split == "test" else chosen[:0]
    return {
        "point_id": id,
        "input_ids": _tokens(rng, vocabulary, longest),
        "labels": sorted(chosen[:number].tolist()),
        "filter_labels": sorted(filtered.tolist()),
    }


def _tokens(rng: np.random.Generator, vocabulary: int, longest: int) -> list[int]:
    return rng.integers(1, vocabulary, rng.integers(1, longest + 1)).tolist()


def _write(path: str, split: str, sizes: tuple[int, ...], table: pa.Table) -> tuple[Part, ...]:
    parts, first = [], 0
    for index, rows in enumerate(sizes):
        relative = layout.part_path(split, index)
        parts.append(layout.write_part(path, relative, first, table.slice(first, rows)))
        first += rows
    return tuple(parts)
