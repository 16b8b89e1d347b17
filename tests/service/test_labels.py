"""The labels of a run and of a dataset: the same, in another order, or nobody can tell."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from renee_ray.data import dataset as layout
from renee_ray.data.dataset import Dataset, add_hashes, hash_labels
from renee_ray.errors import ReneeError
from renee_ray.service.run.directory import RunDirectory
from renee_ray.service.run.labels import check_labels
from renee_ray.service.train.resuming import identity

from ..data.tiny import write_tiny


def dataset_of(path: Path, **changes: Any) -> Dataset:
    made = write_tiny(path, **changes)
    layout.write_manifest(made.path, replace(made.manifest, labels_hash=made.labels_hash()))
    return Dataset.open(made.path)


def reordered(original: Dataset, path: Path) -> Dataset:
    """The same, its first two labels exchanged."""
    shutil.copytree(original.path, path)
    part = original.manifest.splits["labels"][0]
    table = original.read_part(part)
    order = [1, 0, *range(2, len(table))]
    for name in ("text", "input_ids", "train_count", "is_point"):
        at = table.column_names.index(name)
        table = table.set_column(at, name, table[name].take(pa.array(order)))
    written = layout.write_part(str(path), part.path, 0, table)
    splits = original.manifest.splits
    splits = {**splits, "labels": (written, *splits["labels"][1:])}
    manifest = replace(original.manifest, splits=splits, labels_hash="")
    made = Dataset(str(path), manifest)
    layout.write_manifest(str(path), replace(manifest, labels_hash=made.labels_hash()))
    return Dataset.open(str(path))


def run_on(dataset: Dataset, path: Path) -> RunDirectory:
    """As much of a run as names its labels."""
    known = identity(dataset)
    path.mkdir()
    (path / "run.json").write_text(json.dumps({"config": {}, "dataset": known}))
    return RunDirectory(str(path))


def test_the_hash_knows_the_order_and_not_the_parts() -> None:
    texts = pa.array(["a", "b", "", "c c"])
    whole = hash_labels(0, texts)
    for cut in range(5):
        pieces = [hash_labels(0, texts[:cut]), hash_labels(cut, texts[cut:])]
        assert add_hashes(pieces) == add_hashes(pieces[::-1]) == whole
    others = ["b a  c c", "a b c c ", "a b  d"]
    found = {hash_labels(0, pa.array(["b", "a", "", "c c"])), hash_labels(1, texts)}
    found |= {hash_labels(0, pa.array(each.split(" "))) for each in others}
    assert len(found | {whole}) == 6
    assert len(whole) == 64


def test_a_manifest_without_the_hash_keeps_its_own(tmp_path: Path) -> None:
    """Runs know it by that."""
    old = write_tiny(tmp_path / "set").manifest
    assert "labels_hash" not in old.to_json()
    assert "labels_hash" in replace(old, labels_hash="0" * 64).to_json()


def test_labels_in_another_order_are_refused(tmp_path: Path) -> None:
    original = dataset_of(tmp_path / "set")
    run = run_on(original, tmp_path / "run")
    check_labels(run, original)
    with pytest.raises(ReneeError, match="label 0 is 'label 1' and was 'label 0'"):
        check_labels(run, reordered(original, tmp_path / "other"))
    check_labels(run, dataset_of(tmp_path / "cut", labels=(2, 9), seed=1))
    with pytest.raises(ReneeError, match="num_labels=11"):
        check_labels(run, dataset_of(tmp_path / "fewer", labels=(10,)))


def test_the_dataset_trained_on_is_gone_or_another(tmp_path: Path) -> None:
    """Then the hash that the run keeps decides."""
    original = dataset_of(tmp_path / "set")
    run = run_on(original, tmp_path / "run")
    other, same = reordered(original, tmp_path / "other"), dataset_of(tmp_path / "same", seed=1)
    shutil.rmtree(original.path)
    with pytest.raises(ReneeError, match="other labels"):
        check_labels(run, other)
    check_labels(run, same)
    shutil.copytree(other.path, original.path)
    with pytest.raises(ReneeError, match="other labels"):
        check_labels(run, run.dataset())


def test_without_texts_their_number_is_compared(tmp_path: Path) -> None:
    run = run_on(dataset_of(tmp_path / "set"), tmp_path / "run")
    bare = replace(dataset_of(tmp_path / "bare", seed=1).manifest, has_label_texts=False)
    check_labels(run, Dataset(str(tmp_path / "bare"), bare))
