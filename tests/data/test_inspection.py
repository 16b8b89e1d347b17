"""`inspect` on a converted-like dataset that is right, then wrong in one way at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from renee_ray.cli.main import main
from renee_ray.data import dataset as layout
from renee_ray.data.dataset import Dataset, DatasetError
from renee_ray.data.inspection import inspect

from .tiny import make_splits

TRAIN = [  # labels, filter labels
    ([0, 2], [3]),
    ([1], []),
    ([0, 1, 2], [4]),
]


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Three training points, one of validation, one of test; five labels in two parts."""
    path = str(tmp_path / "set")
    make_splits(path)
    write = {
        "train": [points([2, 0, 3], TRAIN)],
        "validation": [points([1], [([4], [])])],
        "test": [points([0], [([3], [0])])],
        "labels": [labels(0, [2, 2, 2]), labels(3, [0, 1])],
    }
    splits = {}
    for split, tables in write.items():
        first, parts = 0, []
        for index, table in enumerate(tables):
            parts.append(layout.write_part(path, layout.part_path(split, index), first, table))
            first += len(table)
        splits[split] = tuple(parts)
    texts = pa.concat_tables(write["labels"])["text"]
    manifest = layout.Manifest(
        layout.FORMAT_VERSION, "nowhere/none", "00", 4, 0, 5, True, 0.55, 1.5, splits, (3, 0),
        {"train": {"label_pairs": 6, "filter_pairs": 2, "without_labels": 0}},
        layout.hash_labels(0, texts),
    )  # fmt: skip
    layout.write_manifest(path, manifest)
    return Dataset.open(path)


def points(ids: list[int], lists: list[tuple[list[int], list[int]]]) -> pa.Table:
    columns = {
        "point_id": ids,
        "input_ids": [[1, 2, 3][: 1 + i % 3] for i in range(len(ids))],
        "labels": [each for each, _ in lists],
        "filter_labels": [each for _, each in lists],
    }
    return pa.table(columns, schema=layout.POINTS)


def labels(first: int, counts: list[int]) -> pa.Table:
    ids = list(range(first, first + len(counts)))
    columns = {
        "label_id": ids,
        "text": [f"label {i}" for i in ids],
        "input_ids": [[5, 6] for _ in ids],
        "train_count": counts,
        "is_point": [i >= 3 for i in ids],
    }
    return pa.table(columns, schema=layout.LABELS)


def test_what_is_in_it(dataset: Dataset) -> None:
    facts = inspect(dataset, samples=2)
    assert facts["points"] == {"train": 3, "validation": 1, "test": 1}
    assert facts["tokens_a_row"]["train"] == {
        "mean": 2.0, "p50": 2, "p90": 3, "p99": 3, "p100": 3, "histogram": {"1": 1, "2-3": 2},
    }  # fmt: skip
    assert facts["labels_a_point"]["train"]["histogram"] == {"1": 1, "2-3": 2}
    assert [sample["labels"] for sample in facts["samples"]] == [["label 0", "label 2"],
                                                                  ["label 1"]]  # fmt: skip
    assert "not decoded" in facts["samples"][0]["text"]


def test_a_long_text_is_cut(dataset: Dataset) -> None:
    long = "\u00e4" * 2_000_000

    def change(table: pa.Table) -> pa.Table:
        return table.set_column(1, "text", pa.array([long] * len(table)))

    rewrite(dataset, "labels", change)
    facts = inspect(Dataset.open(dataset.path))
    (shown, _), *_ = [sample["labels"] for sample in facts["samples"]]
    assert len(shown) < 200 and shown.endswith("… (2,000,000 characters)")
    assert len(json.dumps(facts)) < 20_000


def test_a_right_one_is_verified(dataset: Dataset) -> None:
    assert inspect(dataset, verify=True)["problems"] == []


def rewrite(
    dataset: Dataset, split: str, change: Callable[[pa.Table], pa.Table], index: int = 0
) -> None:
    """A part with other content, under a manifest that agrees to its bytes."""
    old = dataset.manifest.splits[split][index]
    new = layout.write_part(dataset.path, old.path, old.first, change(dataset.read_part(old)))
    parts = list(dataset.manifest.splits[split])
    parts[index] = replace(new, rows=old.rows)
    splits = {**dataset.manifest.splits, split: tuple(parts)}
    layout.write_manifest(dataset.path, replace(dataset.manifest, splits=splits))


def test_wrong_content_is_told_by_part(dataset: Dataset) -> None:
    wrong = pa.array([[0, 2], [5], [0]], pa.list_(pa.int64()))
    rewrite(dataset, "train", lambda table: table.set_column(2, "labels", wrong))
    dataset = Dataset.open(dataset.path)
    rewrite(dataset, "test", lambda table: table.drop_columns(["filter_labels"]))
    one, other = inspect(Dataset.open(dataset.path), verify=True)["problems"]
    assert "train/part-00000.parquet has 5 in labels, which is not in [0, 5)" in one
    assert "test/part-00000.parquet has nothing as column 'filter_labels'" in other


def test_a_wrong_count_in_the_manifest(dataset: Dataset) -> None:
    parts = dataset.manifest.splits["train"]
    splits = {**dataset.manifest.splits, "train": (replace(parts[0], rows=4),)}
    wrong = Dataset(dataset.path, replace(dataset.manifest, splits=splits))
    (problem,) = inspect(wrong, verify=True)["problems"]
    assert "train/part-00000.parquet has 3 rows and dataset.json says 4" in problem


@pytest.mark.parametrize("place", [10, 150, -20, -2])
def test_a_flipped_byte_anywhere(dataset: Dataset, place: int) -> None:
    file = Path(dataset.path, "labels/part-00001.parquet")
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    problems = inspect(dataset, verify=True)["problems"]
    assert f"{file} has bytes that changed" in problems[0]


def test_a_removed_file(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    file = Path(dataset.path, "test/part-00000.parquet")
    file.unlink()
    with pytest.raises(DatasetError, match="is missing"):
        Dataset.open(dataset.path)
    assert main(["inspect", dataset.path, "--verify", "--json"]) == 1
    printed = capsys.readouterr()
    assert f"{file} is missing and dataset.json names it" in json.loads(printed.out)["problems"]
    assert "problems: convert its source again" in printed.err


def test_the_command(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", dataset.path, "--verify"]) == 0
    text = capsys.readouterr().out
    for shown in ("5 labels", "Tokens of a training point", "2-3", "label 2", "verified"):
        assert shown in text
    assert main(["inspect", dataset.path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["labels"] == 5
