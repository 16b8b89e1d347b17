"""The whole path with nothing but s3:// URLs, on a gateway that demands credentials."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.dataset as pads
import pyarrow.fs as pafs
import pytest
import ray

from renee_ray.cli import main
from renee_ray.data.dataset import Dataset

from .conftest import TESTS, Command, Run, end, finish, renee_ray, start
from .gateway import BUCKET, SECRET_KEY, Gateway

pytestmark = pytest.mark.slow
OUTAGE_S = 20
SRC, DATA = f"s3://{BUCKET}/source", f"s3://{BUCKET}/dataset"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    server = Gateway(tmp_path_factory.mktemp("weed"))
    try:
        server.start()
        yield server
    finally:
        server.kill()


def run(gateway: Gateway, *arguments: str) -> Command:
    done = finish(start(*arguments, env=gateway.env))
    assert done.status == 0, done.stderr
    assert SECRET_KEY not in done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def dataset_on_s3(gateway: Gateway, source: Path) -> str:
    remote = gateway.filesystem()
    pafs.copy_files(str(source), f"{BUCKET}/source", pafs.LocalFileSystem(), remote)
    run(gateway, "convert", SRC, DATA, "validation=0.1", "part_rows=64")
    return DATA


@dataclass(frozen=True)
class RemoteRun:
    """A run on the gateway: where, what `train --json` printed, its losses by step."""

    path: str
    result: dict[str, Any]
    losses: dict[int, float]


def remote_run(gateway: Gateway, path: str, command: Command) -> RemoteRun:
    with gateway.filesystem().open_input_file(f"{path.removeprefix('s3://')}/history.json") as file:
        history = json.loads(file.read())
    losses = {each["step"]: each["loss"] for each in history["steps"]}
    return RemoteRun(path, json.loads(command.stdout), losses)


@pytest.fixture(scope="module")
def trained_on_s3(gateway: Gateway, dataset_on_s3: str, recipe: str) -> RemoteRun:
    path = f"s3://{BUCKET}/runs/undisturbed"
    done = run(
        gateway, "train", recipe, f"data={dataset_on_s3}", f"output={path}",
        "checkpoint.every_steps=0", "--json",
    )  # fmt: skip
    return remote_run(gateway, path, done)


def assert_equal_to_local(found: RemoteRun, trained: Run) -> None:
    assert found.result["step"] == trained.result["step"]
    assert found.result["validation"] == pytest.approx(trained.result["validation"], abs=1e-3)
    local = {each["step"]: each["loss"] for each in trained.history["steps"]}
    assert found.losses == pytest.approx(local, rel=1e-4)


def test_the_parts_are_those_of_a_local_conversion(
    gateway: Gateway, dataset_on_s3: str, dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in gateway.env.items():
        monkeypatch.setenv(name, value)
    assert Dataset.open(dataset_on_s3).manifest == Dataset.open(dataset).manifest
    done = run(gateway, "inspect", dataset_on_s3, "--verify", "--json")
    assert json.loads(done.stdout)["problems"] == []


def test_training_equals_a_local_run(trained_on_s3: RemoteRun, trained: Run) -> None:
    assert_equal_to_local(trained_on_s3, trained)


def test_evaluation_equals_a_local_one(
    gateway: Gateway, trained_on_s3: RemoteRun, trained: Run, dataset: str, dataset_on_s3: str
) -> None:
    votes = "neighbours=5"
    remote = run(gateway, "evaluate", trained_on_s3.path, dataset_on_s3, votes, "--json")
    local = renee_ray("evaluate", trained.path, dataset, votes, "--json")
    here, there = json.loads(local.stdout), json.loads(remote.stdout)
    assert there["points"] == here["points"] == TESTS
    assert there["metrics"] == pytest.approx(here["metrics"], abs=1e-3)


def test_predictions_and_export(
    gateway: Gateway, trained_on_s3: RemoteRun, dataset_on_s3: str
) -> None:
    predictions, model = f"s3://{BUCKET}/predictions", f"s3://{BUCKET}/model"
    run(gateway, "predict", trained_on_s3.path, dataset_on_s3, predictions, "k=7", "texts=true")
    files = gateway.filesystem()
    names = [i.path for i in files.get_file_info(pafs.FileSelector(f"{BUCKET}/predictions"))]
    parts = sorted(name for name in names if name.endswith(".parquet"))
    rows = pads.dataset(parts, filesystem=files).to_table().to_pylist()
    assert sorted(row["point_id"] for row in rows) == list(range(TESTS))
    assert all(len(row["label_texts"]) == 7 for row in rows)
    run(gateway, "export", trained_on_s3.path, model)
    listed = files.get_file_info(pafs.FileSelector(f"{BUCKET}/model", recursive=True))
    names = [info.path.removeprefix(f"{BUCKET}/model/") for info in listed]
    assert {"export.json", "head.safetensors", "encoder/model.safetensors"} <= set(names)


def test_an_outage_is_waited_for(
    gateway: Gateway, dataset_on_s3: str, recipe: str, trained: Run
) -> None:
    path = f"s3://{BUCKET}/runs/outage"
    process = start(
        "train", recipe, f"data={dataset_on_s3}", f"output={path}", "--json", env=gateway.env
    )
    try:
        _wait_for(gateway, f"{BUCKET}/runs/outage/step-000000005")
        gateway.kill()
        time.sleep(OUTAGE_S)
        assert process.poll() is None, process.communicate()
        gateway.start()
        done = finish(process)
    finally:
        end(process)
    assert done.status == 0, done.stderr
    assert_equal_to_local(remote_run(gateway, path, done), trained)
    said = re.findall(r"trying again for|storage is slow or away", done.stderr)
    assert len(said) <= 6, done.stderr  # once an operation, not once an attempt


@pytest.mark.parametrize(
    "arguments",
    [
        ("convert", SRC, f"s3://{BUCKET}/never"),
        ("inspect", DATA),
        ("train", "RECIPE", f"data={DATA}", f"output=s3://{BUCKET}/runs/never"),
        ("evaluate", f"s3://{BUCKET}/runs/undisturbed", DATA),
        ("predict", f"s3://{BUCKET}/runs/undisturbed", DATA, f"s3://{BUCKET}/never"),
        ("export", f"s3://{BUCKET}/runs/undisturbed", f"s3://{BUCKET}/never"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_wrong_key_is_one_sentence(
    gateway: Gateway,
    recipe: str,
    arguments: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in (gateway.env | {"AWS_SECRET_ACCESS_KEY": "wrong-secret-77c1"}).items():
        monkeypatch.setenv(name, value)
    assert main([recipe if word == "RECIPE" else word for word in arguments]) == 1
    said = capsys.readouterr().err
    assert "refuses the credentials" in said and "AWS_SECRET_ACCESS_KEY" in said
    assert said.count("\n") == 1
    assert "wrong-secret" not in said and SECRET_KEY not in said
    assert not ray.is_initialized(), "a refused key is found before Ray is started"


def _wait_for(gateway: Gateway, path: str, seconds: float = 240) -> None:
    files, until = gateway.filesystem(), time.monotonic() + seconds
    while files.get_file_info(path).type == pafs.FileType.NotFound:
        assert time.monotonic() < until, path
        time.sleep(0.2)
