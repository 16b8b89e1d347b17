"""Hostile run directories and checkpoints: the cases of docs/security.md that concern them.

A run is as much of one as is read before Ray is started; its checkpoint is a real one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest

from renee_ray.checkpoint.state import MANIFEST, Checkpoint
from renee_ray.data.dataset import Dataset
from renee_ray.service.run.directory import RunDirectory

from ..data.tiny import write_tiny
from ..training import test_checkpoint as kept
from .parts import run_directory
from .place import Case, Made, Place, refused

STEP = f"checkpoints/{kept.NAME}"


def run_of(place: Place) -> Path:
    """A run with one committed checkpoint, and the dataset beside it."""
    dataset = place.given / "set"
    write_tiny(dataset)
    path = run_directory(place, dataset)
    kept.write(path)
    return path


def write(path: Path, content: object) -> None:
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def test_the_run_is_one(place: Place) -> None:
    """What the cases change is read without an error as it was."""
    directory = RunDirectory(str(run_of(place)))
    assert directory.config().data == str(place.given / "set")
    assert directory.dataset().manifest.num_labels == 11
    for which in ("best", "last"):
        checkpoint = directory.checkpoint(which)
        checkpoint.load_shard(kept.empty_shard(2, 1, "bf16_split"))


# --------------------------------------------------------------------------------- files of a run


def evaluated(name: str, content: Any) -> Callable[[Place], Made]:
    """A run whose file `name` is `content`, or what `content` makes of it, to be evaluated."""

    def make(place: Place) -> Made:
        path = run_of(place) / name
        write(path, content(json.loads(path.read_text())) if callable(content) else content)
        return ["evaluate", str(place.given / "run"), str(place.given / "set")]

    return make


def exported(change: Callable[[Place, dict[str, Any]], object]) -> Callable[[Place], Made]:
    """A run whose run.json is changed, to be exported: that reads the dataset it names."""

    def make(place: Place) -> Made:
        path = run_of(place) / "run.json"
        saved = json.loads(path.read_text())
        change(place, saved)
        write(path, saved)
        return ["export", str(place.given / "run"), str(place.given / "exported")]

    return make


def config(**values: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda saved: {**saved, "config": {**saved["config"], **values}}


def rename_data(place: Place, saved: dict[str, Any]) -> None:
    saved["dataset"]["path"] = str(place.secret)


def point_to(url: str) -> Callable[[Place, dict[str, Any]], None]:
    def change(place: Place, saved: dict[str, Any]) -> None:
        saved["dataset"]["path"] = url

    return change


NESTED = "[" * 10**5
RUNS = [
    Case("run-nested", evaluated("run.json", NESTED), "run.json"),
    Case("run-not-json", evaluated("run.json", "{"), "run.json"),
    Case("run-not-an-object", evaluated("run.json", "[]"), "run.json"),
    Case("run-without-configuration", evaluated("run.json", "{}"), "run.json"),
    Case("run-configuration-of-another-kind", evaluated("run.json", {"config": 3}), "run.json"),
    Case("run-unknown-key", evaluated("run.json", config(hook="os.system")), "no key 'hook'"),
    Case(
        "run-dataset-of-another-kind", evaluated("run.json", lambda s: {**s, "dataset": 3}), "run"
    ),
    Case("run-names-a-file-outside", exported(rename_data), "not at .*secret.txt any more"),
    Case("run-names-keys", exported(point_to("s3://a:b@bucket/set")), "carries credentials"),
]


# ------------------------------------------------------------------------------------ checkpoints


def manifest(content: Any) -> Callable[[Place], Made]:
    """A checkpoint whose manifest is `content`, or what `content` makes of it."""

    def make(place: Place) -> Made:
        run = place.given / "run"
        kept.write(run)
        file = run / STEP / MANIFEST
        write(file, content(json.loads(file.read_text())) if callable(content) else content)
        return lambda: loaded(run / STEP)

    return make


def state(**values: Any) -> Callable[[Place], Made]:
    return manifest(lambda m: {**m, "state": {**m["state"], **values}})


def files(change: Callable[[dict[str, Any]], object]) -> Callable[[Place], Made]:
    def changed(content: dict[str, Any]) -> dict[str, Any]:
        change(content["files"])
        return content

    return manifest(changed)


def loaded(path: Path) -> None:
    """All of a checkpoint, as a run that goes on loads it."""
    opened = Checkpoint(pafs.LocalFileSystem(), str(path))
    encoder, _ = kept.model()
    opened.load_encoder(encoder)  # type: ignore[arg-type]
    opened.moments()
    opened.load_shard(kept.empty_shard(1, 0, "bf16_split"))


CLIMBS = "../../outside/classifier-000000000000-000000000005.safetensors"
FACTS = {"bytes": 100, "header_crc32": 1}
BEYOND = f"classifier-0-{'9' * 5000}.safetensors"
CHECKPOINTS = [
    Case("checkpoint-nested", manifest(NESTED), "manifest.json"),
    Case("checkpoint-of-another-kind", manifest([1]), "manifest.json is damaged"),
    Case("checkpoint-empty", manifest({}), "manifest.json is damaged"),
    Case("checkpoint-version-no-number", manifest('{"format_version": NaN}'), "format version nan"),
    Case("state-step-text", state(step="31; rm"), "manifest.json is damaged"),
    Case("state-history-text", state(history="x"), "manifest.json is damaged"),
    Case("state-facts-list", state(facts=[]), "manifest.json is damaged"),
    Case("files-outside", files(lambda f: f.update({CLIMBS: FACTS})), "is damaged"),
    Case("files-many-digits", files(lambda f: f.update({BEYOND: FACTS})), "is damaged"),
    Case("files-none", files(lambda f: f.clear()), "has no encoder.safetensors"),
]


CASES = [*RUNS, *CHECKPOINTS]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_refused(case: Case, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    refused(case, place, capsys)


def test_the_weights_file_of_a_run_is_not_read_to_score(place: Place) -> None:
    """run.json may name any file as encoder.weights; the checkpoint has all weights."""
    from renee_ray.config.score import ScoreConfig
    from renee_ray.service.score.job import scoring_config

    run = run_of(place)
    saved = json.loads((run / "run.json").read_text())
    saved["config"]["encoder"] = {"weights": str(place.secret)}
    write(run / "run.json", saved)
    found = scoring_config(RunDirectory(str(run)).config(), ScoreConfig(), 2)
    assert found.encoder.weights == "" and found.num_workers == 2
    assert Dataset.open(found.data).manifest.num_labels == 11
