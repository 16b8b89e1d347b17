"""What evaluate, predict, export, serve and train refuse before Ray starts."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import transformers as hf

from renee_ray.cli.main import main
from renee_ray.config.schema import RunConfig
from renee_ray.data import dataset as layout
from renee_ray.data import tokenizer
from renee_ray.data.dataset import Dataset
from renee_ray.errors import ReneeError
from renee_ray.service.run.directory import RunDirectory
from renee_ray.service.train.train import train

from ..data.tiny import write_tiny
from .test_changing_labels import bag_config, save_checkpoint
from .test_labels import reordered, run_on

MINILM = "sentence-transformers/all-MiniLM-L6-v2"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """As much of a run as is read before it is refused, trained on the dataset beside it."""
    made = write_tiny(tmp_path / "set")
    path = tmp_path / "run"
    run_on(made, path)
    configure(path, MINILM)
    return path


def configure(run: Path, encoder: str, max_length: int = 32) -> None:
    saved = json.loads((run / "run.json").read_text())
    saved["config"] = {
        "data": str(run.parent / "set"), "output": str(run),
        "encoder": {"name": encoder, "max_length": max_length},
    }  # fmt: skip
    (run / "run.json").write_text(json.dumps(saved))


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main(list(map(str, arguments))) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and not ray.is_initialized()
    return error


def test_sources_that_are_none(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone, file, out = run.parent / "gone", run.parent / "texts.txt", run.parent / "out"
    file.write_text("a text\n")
    assert f"{gone} is not a renee_ray dataset" in refused(capsys, "evaluate", run, gone)
    assert f"{gone} does not exist" in refused(capsys, "predict", run, gone, out)
    assert f"{file} is not a renee_ray dataset" in refused(capsys, "evaluate", run, file)
    assert f"{run} is a run" in refused(capsys, "evaluate", run, run)
    assert f"{run} is a run" in refused(capsys, "predict", run, run, out)
    assert "is not a run" in refused(capsys, "evaluate", run.parent / "set", run)
    assert "not a renee_ray dataset" in refused(capsys, "evaluate", run, run.parent)
    assert not out.exists()


def test_parts_of_scores_without_a_bag(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run.parent / "out"
    error = refused(capsys, "predict", run, run.parent / "set", out, "explain=true")
    assert "without a bag" in error and "encoder.bag.dim" in error and not out.exists()


def test_other_labels(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original = Dataset.open(str(run.parent / "set"))
    other = reordered(original, run.parent / "other")
    said = "label 0 is 'label 1' and was 'label 0'"
    out = run.parent / "out"
    config = bag_config(original.path, str(run))
    save_checkpoint(RunDirectory(str(run)), config, original.manifest.num_labels)
    assert said in refused(capsys, "evaluate", run, other.path)
    assert said in refused(capsys, "predict", run, other.path, out)
    # Converted again where it was, in another order: label texts come from there.
    shutil.rmtree(original.path)
    shutil.copytree(other.path, original.path)
    (run.parent / "texts.txt").write_text("a text\n")
    assert "other labels" in refused(capsys, "predict", run, run.parent / "texts.txt", out)
    assert "other labels" in refused(capsys, "export", run, out)
    assert not out.exists()


def test_a_split_without_labels(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = Dataset.open(str(run.parent / "set"))
    statistics = {"test": {"points": 8, "label_pairs": 0}}
    layout.write_manifest(made.path, replace(made.manifest, statistics=statistics))
    error = refused(capsys, "evaluate", run, made.path)
    assert "no point of split=test" in error and "has a label" in error


def test_texts_longer_than_the_encoder_can_read(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = hf.RobertaConfig(vocab_size=30, max_position_embeddings=9, **small)
    encoder = run.parent / "encoder"
    hf.RobertaModel(config).save_pretrained(encoder)
    shutil.copy(Path(tokenizer_file()), encoder)
    data, out = run.parent / "set", run.parent / "out"  # of texts of up to 9 tokens
    configure(run, str(encoder), max_length=8)
    said = "has 7 positions, and encoder.max_length=8 of a dataset of max_length=9"
    (run.parent / "texts.txt").write_text("a text\n")
    assert said in refused(capsys, "evaluate", run, data)
    assert said in refused(capsys, "predict", run, data, out)
    assert said in refused(capsys, "predict", run, run.parent / "texts.txt", out)
    vocabulary = tokenizer.load(str(encoder)).hash
    made = write_tiny(run.parent / "training")
    layout.write_manifest(made.path, replace(made.manifest, vocabulary_hash=vocabulary))
    settings = {"data": made.path, "output": str(out), "num_workers": 1}
    with pytest.raises(ReneeError, match=said):
        train(RunConfig(**settings, encoder={"name": str(encoder), "max_length": 8}))
    assert not out.exists() and not ray.is_initialized()


def tokenizer_file() -> str:
    from renee_ray.data.models import resolve_model

    return f"{resolve_model(MINILM)}/tokenizer.json"
