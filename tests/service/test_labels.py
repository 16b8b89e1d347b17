"""The labels, texts and tokenizer of a run and of a dataset: the same, or told apart."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import renee_ray
from renee_ray.config.score import ExportConfig
from renee_ray.data import dataset as layout
from renee_ray.data import tokenizer
from renee_ray.data.dataset import Dataset, add_hashes, hash_labels
from renee_ray.errors import ReneeError
from renee_ray.rank.batch import Ragged, ragged, truncate
from renee_ray.service.run.directory import RUN_FILE, RunDirectory
from renee_ray.service.run.labels import check_labels
from renee_ray.service.train.resuming import identity

from ..data.tiny import write_tiny
from .test_changing_labels import run_at


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
    manifest = replace(original.manifest, splits=splits)
    texts = Dataset(str(path), manifest).read_rows("labels", 0, manifest.num_labels)["text"]
    manifest = replace(manifest, labels_hash=hash_labels(0, texts))
    layout.write_manifest(str(path), manifest)
    return Dataset.open(str(path))


def run_on(dataset: Dataset, path: Path) -> RunDirectory:
    """As much of a run as names its labels."""
    path.mkdir()
    (path / "run.json").write_text(json.dumps({"config": {}, "dataset": identity(dataset)}))
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


def test_labels_in_another_order_are_refused(tmp_path: Path) -> None:
    original = write_tiny(tmp_path / "set")
    run = run_on(original, tmp_path / "run")
    check_labels(run, original)
    with pytest.raises(ReneeError, match="label 0 is 'label 1' and was 'label 0'"):
        check_labels(run, reordered(original, tmp_path / "other"))
    check_labels(run, write_tiny(tmp_path / "cut", labels=(2, 9), seed=1))
    with pytest.raises(ReneeError, match="num_labels=11"):
        check_labels(run, write_tiny(tmp_path / "fewer", labels=(10,)))


def test_the_dataset_trained_on_is_gone_or_another(tmp_path: Path) -> None:
    """Then the hash that the run keeps decides."""
    original = write_tiny(tmp_path / "set")
    run = run_on(original, tmp_path / "run")
    other, same = reordered(original, tmp_path / "other"), write_tiny(tmp_path / "same", seed=1)
    shutil.rmtree(original.path)
    with pytest.raises(ReneeError, match="other labels"):
        check_labels(run, other)
    check_labels(run, same)
    shutil.copytree(other.path, original.path)
    with pytest.raises(ReneeError, match="other labels"):
        check_labels(run, run.dataset())


def test_without_texts_their_number_is_compared(tmp_path: Path) -> None:
    run = run_on(write_tiny(tmp_path / "set"), tmp_path / "run")
    bare = replace(write_tiny(tmp_path / "bare", seed=1).manifest, has_label_texts=False)
    check_labels(run, Dataset(str(tmp_path / "bare"), bare))


def tell_of(run: RunDirectory, **facts: Any) -> None:
    """Makes the run's dataset one with other facts in its manifest."""
    dataset = run.dataset()
    layout.write_manifest(dataset.path, replace(dataset.manifest, **facts))
    known = {"config": run.config().model_dump(), "dataset": identity(Dataset.open(dataset.path))}
    run.write(RUN_FILE, known)


def test_long_texts_are_cut_as_those_of_a_dataset(tmp_path: Path) -> None:
    """Also where the tokenizer ends no text with a token of its own."""
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(30)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    (tmp_path / "words").mkdir()
    words.save(str(tmp_path / "words" / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "words" / "tokenizer_config.json").write_text(json.dumps(kind))
    run = run_at(tmp_path)
    vocabulary = tokenizer.load(str(tmp_path / "words"))
    tell_of(run, tokenizer=vocabulary.name, vocabulary_hash=vocabulary.hash, max_length=20)
    text = " ".join(f"w{i}" for i in range(1, 29))
    tokens = tokenizer.encode(vocabulary.serialised, [text], 20)
    kept = truncate(ragged(tokens), 9).values.tolist()
    assert kept == [*range(1, 9), 20]
    renee_ray.export(run.path, str(tmp_path / "export"), ExportConfig())
    for path in (run.path, str(tmp_path / "export")):
        model = renee_ray.load(path)
        expected = model.embed_tokens(Ragged.of_lists([kept])).numpy()
        np.testing.assert_array_equal(model.embed([text]), expected)


def test_an_export_has_the_tokenizer_of_its_dataset(tmp_path: Path) -> None:
    run = run_at(tmp_path)
    tell_of(run, vocabulary_hash="0" * 64)
    with pytest.raises(ReneeError, match="not the one that"):
        renee_ray.export(run.path, str(tmp_path / "export"), ExportConfig())
    assert not (tmp_path / "export").exists()
