"""Hostile run directories and checkpoints: the cases of docs/security.md that concern them.

A run is as much of one as is read before Ray is started; its checkpoint is a real one.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from renee_ray.data.dataset import Dataset
from renee_ray.service.run import RunDirectory
from renee_ray.training.checkpoint import OPTIMIZER, STATE

from .data.tiny import write_tiny
from .hostile import Case, Place, place, refused
from .training import test_checkpoint as kept

__all__ = ["place"]
Made = list[str] | Callable[[], object]
STEP = "step-000000031"
BEST = "best-000000031"
SNAPSHOT = "checkpoint_manager_snapshot.json"


def run_of(place: Place) -> Path:
    """A run with one committed checkpoint, which is also the best, and the dataset beside it."""
    dataset = place.given / "set"
    made = write_tiny(dataset).manifest
    path = place.given / "run"
    path.mkdir()
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
    kept.write(path / STEP)
    kept.write(path / BEST)
    write(path / "best.json", {"directory": BEST, "step": 31, "metrics": {"P@1": 1.0}})
    write(path / SNAPSHOT, snapshot(STEP))
    return path


def write(path: Path, content: object) -> None:
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def snapshot(name: str) -> dict[str, Any]:
    """What Ray Train writes of one checkpoint in the directory `name`."""
    result = {"checkpoint_dir_name": name, "metrics": {}}
    return {
        "ray_version": ray.__version__,
        "checkpoint_results": [result],
        "checkpoint_report_indices": [0],
        "pending_training_results": [],
        "pending_validation_specs": [],
        "latest_checkpoint_result": result,
        "current_report_index": 1,
        "validated_checkpoint_dir_names": [],
        "timed_out_validation_checkpoint_dir_names": [],
        "failed_validation_checkpoint_dir_names": [],
    }


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


def checkpoint(which: str, name: str, content: Any) -> Callable[[Place], Made]:
    """A run with another file in it, whose checkpoint is to be found and its state read."""

    def make(place: Place) -> Made:
        run = run_of(place)
        kept.write(place.outside / "stolen")
        write(run / name, content)
        return lambda: RunDirectory(str(run)).checkpoint(which)

    return make


def config(**values: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda saved: {**saved, "config": {**saved["config"], **values}}


def linked(name: str) -> Callable[[Place], Made]:
    """A run in which `name` leads to somebody else's files."""

    def make(place: Place) -> Made:
        path = run_of(place) / name
        path.rename(place.outside / "theirs")
        path.symlink_to(place.outside / "theirs")
        return lambda: RunDirectory(str(place.given / "run")).config()

    return make


def written_through_a_link(place: Place) -> Made:
    run = run_of(place)
    (run / "history.json.tmp").symlink_to(place.secret)
    return lambda: RunDirectory(str(run)).write("history.json", {})


def name_best(name: str) -> dict[str, Any]:
    return {"directory": name, "step": 31, "metrics": {"P@1": 1.0}}


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
    Case(
        "run-names-a-wrapper",
        exported(point_to("reference://x/set")),
        "no filesystem is installed",
    ),
    Case("run-names-keys", exported(point_to("s3://a:b@bucket/set")), "carries credentials"),
    Case("run-link", linked("run.json"), "symbolic link"),
    Case("checkpoint-link", linked(STEP), "symbolic link"),
    Case("run-written-through-a-link", written_through_a_link, "symbolic link"),
    Case("best-outside", checkpoint("best", "best.json", name_best("../../outside/stolen")), "dam"),
    Case("best-nested", checkpoint("best", "best.json", NESTED), "best.json"),
    Case("best-of-another-kind", checkpoint("best", "best.json", [1]), "best.json is damaged"),
    Case("snapshot-outside", checkpoint("last", SNAPSHOT, snapshot("../../outside/stolen")), "run"),
    Case("snapshot-absolute", checkpoint("last", SNAPSHOT, snapshot("/etc")), "run"),
    Case("snapshot-nested", checkpoint("last", SNAPSHOT, NESTED), "no committed checkpoint|snap"),
    Case("snapshot-of-another-kind", checkpoint("last", SNAPSHOT, {"a": 1}), "checkpoint"),
]


# ------------------------------------------------------------------------------------ checkpoints


def state(content: Any) -> Callable[[Place], Made]:
    """A checkpoint whose state.json is `content`, or what `content` makes of it."""

    def make(place: Place) -> Made:
        path = place.given / "checkpoint"
        kept.write(path)
        file = path / STATE
        write(file, content(json.loads(file.read_text())) if callable(content) else content)
        return lambda: loaded(path)

    return make


def loaded(path: Path) -> None:
    """All of a checkpoint, as a run that goes on loads it."""
    opened = kept.opened(path)
    encoder, optimizer = kept.model()
    opened.load_encoder(encoder)  # type: ignore[arg-type]
    opened.load_optimizer(encoder, optimizer)  # type: ignore[arg-type]
    opened.load_shard(kept.empty_shard(1, 0, "bf16_split"))


def long_state(place: Place) -> Made:
    path = place.given / "checkpoint"
    kept.write(path)
    with open(path / STATE, "ab") as file:
        file.truncate(1 << 29)
    return lambda: kept.opened(path)


def safetensors(
    change: Callable[[dict[str, Any]], object] | bytes, file: str = "classifier-*"
) -> Callable[[Place], Made]:
    """A checkpoint with another header in its first file of this name, or other first bytes."""

    def make(place: Place) -> Made:
        path = place.given / "checkpoint"
        kept.write(path)
        first = sorted(path.glob(file))[0]
        content = first.read_bytes()
        if isinstance(change, bytes):
            first.write_bytes(change + content[len(change) :])
        else:
            length = struct.unpack("<Q", content[:8])[0]
            header = json.loads(content[8 : 8 + length])
            change(header)
            made = json.dumps(header).encode()
            first.write_bytes(struct.pack("<Q", len(made)) + made + content[8 + length :])
        return lambda: loaded(path)

    return make


def every(**values: Any) -> Callable[[dict[str, Any]], None]:
    """Changes the entry of every tensor."""

    def change(header: dict[str, Any]) -> None:
        for name, entry in header.items():
            if name != "__metadata__":
                entry.update(values)

    return change


def deep(header: dict[str, Any]) -> None:
    nested: Any = 0
    for _ in range(900):
        nested = [nested]
    header["high"] = nested


CLIMBS = "../../outside/classifier-000000000000-000000000005.safetensors"
CHECKPOINTS = [
    Case("state-nested", state(NESTED), "state.json"),
    Case("state-long", long_state, "state.json"),
    Case("state-of-another-kind", state([1]), "state.json is damaged"),
    Case("state-empty", state({}), "state.json is damaged"),
    Case("state-not-a-number", state('{"format_version": NaN}'), "state.json"),
    Case("state-step-text", state(lambda s: {**s, "step": "31; rm"}), "state.json"),
    Case("state-step-huge", state(lambda s: {**s, "step": 10**30}), "state.json"),
    Case(
        "state-position-negative",
        state(lambda s: {**s, "position": {"epoch": -1, "batch": 0}}),
        "state.json",
    ),
    Case("state-history-text", state(lambda s: {**s, "history": "x"}), "state.json"),
    Case("state-facts-text", state(lambda s: {**s, "facts": []}), "state.json"),
    Case(
        "state-shards-outside", state(lambda s: {**s, "shards": [CLIMBS]}), "state.json is damaged"
    ),
    Case(
        "state-shards-many-digits",
        state(lambda s: {**s, "shards": [f"classifier-0-{'9' * 5000}.safetensors"]}),
        "state.json",
    ),
    Case("state-shards-nowhere", state(lambda s: {**s, "shards": []}), "labels from 0 on"),
    Case(
        "header-huge", safetensors(struct.pack("<Q", 2**63)), "header of 9223372036854775808 bytes"
    ),
    Case(
        "header-not-json", safetensors(struct.pack("<Q", 8) + b"\xff" * 8), "cannot be read|damaged"
    ),
    Case("header-deep", safetensors(deep), "cannot be read|damaged|lacks"),
    Case(
        "header-offsets-beyond",
        safetensors(every(data_offsets=[2**40, 2**41])),
        "truncated|damaged|cannot be read",
    ),
    Case(
        "header-offsets-negative",
        safetensors(every(data_offsets=[-100, 0])),
        "cannot be read|damaged",
    ),
    Case(
        "header-offsets-overlapping",
        safetensors(every(data_offsets=[0, 60])),
        "damaged|cannot be read",
    ),
    Case(
        "header-offsets-huge",
        safetensors(every(data_offsets=[2**70, 2**71])),
        "truncated|damaged|read",
    ),
    Case("header-shape-lies", safetensors(every(shape=[10**9, 6])), "damaged|cannot be read"),
    Case("header-dtype-lies", safetensors(every(dtype="F64")), "lacks|damaged"),
    Case("header-dtype-list", safetensors(every(dtype=["F32"])), "cannot be read|damaged|lacks"),
    Case(
        "encoder-header-huge",
        safetensors(struct.pack("<Q", 2**63), "encoder*"),
        "encoder.safetensors",
    ),
    Case(
        "encoder-shape-lies", safetensors(every(shape=[10**9]), "encoder*"), "encoder.safetensors"
    ),
    Case("optimizer-header-huge", safetensors(struct.pack("<Q", 2**63), OPTIMIZER), OPTIMIZER),
    Case("optimizer-shapes-swapped", safetensors(every(shape=[1]), OPTIMIZER), OPTIMIZER),
]


OPEN = {
    "run-nested", "run-not-json", "run-not-an-object", "run-without-configuration",
    "run-configuration-of-another-kind", "run-dataset-of-another-kind", "run-link",
    "checkpoint-link", "run-written-through-a-link", "best-nested", "snapshot-outside",
    "snapshot-absolute", "snapshot-nested", "snapshot-of-another-kind", "state-nested",
    "state-step-text", "state-step-huge", "state-position-negative", "state-history-text",
    "state-facts-text", "state-shards-many-digits", "header-deep",
    "header-offsets-negative", "header-offsets-overlapping", "header-offsets-huge",
    "header-shape-lies",
}  # fmt: skip
"""Not handled yet. Each fails its test when it is, and goes from this list then."""
CASES = [*RUNS, *CHECKPOINTS]


def marked(case: Case) -> Any:
    marks = [pytest.mark.xfail(strict=True)] if case.name in OPEN else []
    return pytest.param(case, id=case.name, marks=marks)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", map(marked, CASES))
def test_refused(case: Case, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    refused(case, place, capsys)


def test_the_weights_file_of_a_run_is_not_read_to_score(place: Place) -> None:
    """run.json may name any file as encoder.weights; the checkpoint has all weights."""
    from renee_ray.config import ScoreConfig
    from renee_ray.service.predict import scoring_config

    run = run_of(place)
    saved = json.loads((run / "run.json").read_text())
    saved["config"]["encoder"] = {"weights": str(place.secret)}
    write(run / "run.json", saved)
    found = scoring_config(RunDirectory(str(run)).config(), ScoreConfig(), 2)
    assert found.encoder.weights == "" and found.num_workers == 2
    assert Dataset.open(found.data).manifest.num_labels == 11
