"""The whole path with nothing but s3:// URLs, on a gateway that demands credentials.

Every command is interrupted: the gateway is killed while it is at work, and comes back.
"""

from __future__ import annotations

import io
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import pyarrow.dataset as pads
import pyarrow.fs as pafs
import pytest
import ray

from renee_ray.cli.main import main
from renee_ray.data.dataset import Dataset

from .conftest import RAW_K, TESTS, Run, descendants
from .gateway import BUCKET, SECRET_KEY, Gateway
from .test_predict import brute_force

pytestmark = pytest.mark.slow
OUTAGE_S = float(os.environ.get("RENEE_RAY_OUTAGE_S", "6"))
"""Of the gateway, in each command."""
SRC, DATA, RUN = f"s3://{BUCKET}/source", f"s3://{BUCKET}/dataset", f"s3://{BUCKET}/runs/one"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    server = Gateway(tmp_path_factory.mktemp("weed"))
    with pytest.MonkeyPatch.context() as patch:
        try:
            server.start()
            for name, value in server.env.items():
                patch.setenv(name, value)
            yield server
        finally:
            server.kill()


@pytest.mark.parametrize(
    "arguments",
    [
        ("convert", SRC, f"s3://{BUCKET}/never"),
        ("inspect", DATA),
        ("train", "RECIPE", f"data={DATA}", f"output=s3://{BUCKET}/runs/never"),
        ("evaluate", RUN, DATA),
        ("predict", RUN, DATA, f"s3://{BUCKET}/never"),
        ("export", RUN, f"s3://{BUCKET}/never"),
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
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret-77c1")
    assert main([recipe if word == "RECIPE" else word for word in arguments]) == 1
    said = capsys.readouterr().err
    assert "refuses the credentials" in said and "AWS_SECRET_ACCESS_KEY" in said
    assert said.count("\n") == 1
    assert "wrong-secret" not in said and SECRET_KEY not in said
    assert not ray.is_initialized(), "a refused key is found before Ray is started"


# Ray is started here, by the first fixture that needs it.


@contextmanager
def outage(until: Callable[[], bool], gateway: Gateway) -> Iterator[None]:
    """The gateway goes away as soon as `until()`, which must be before the body has ended."""
    ended = Event()

    def cut() -> None:
        while not until():
            assert not ended.is_set(), "it ended before it was interrupted"
            time.sleep(0.05)
        gateway.away(OUTAGE_S)

    with ThreadPoolExecutor(1) as pool:
        cutting = pool.submit(cut)
        try:
            yield
        finally:
            ended.set()
        cutting.result()


def begun(gateway: Gateway, path: str, name: str) -> Callable[[], bool]:
    """Whether something whose name begins so is somewhere in a directory by now."""
    files = gateway.filesystem()
    selector = pafs.FileSelector(f"{BUCKET}/{path}", allow_not_found=True, recursive=True)
    return lambda: any(info.base_name.startswith(name) for info in files.get_file_info(selector))


def working() -> Callable[[], bool]:
    """Whether workers of a job have been started since."""

    def workers() -> set[int]:
        return {pid for pid, args in descendants(os.getpid()).items() if "RayTrainWorker" in args}

    before = workers()
    return lambda: bool(workers() - before)


@pytest.fixture(scope="module")
def dataset_on_s3(gateway: Gateway, source: Path, local_ray: None) -> str:
    remote = gateway.filesystem()
    pafs.copy_files(str(source), f"{BUCKET}/source", pafs.LocalFileSystem(), remote)
    with outage(begun(gateway, "dataset/_scratch", "write_pieces-0.json"), gateway):
        assert main(["convert", SRC, DATA, "validation=0.1", "part_rows=64"]) == 0
    return DATA


def test_the_parts_are_those_of_a_local_conversion(
    dataset_on_s3: str, dataset: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert Dataset.open(dataset_on_s3).manifest == Dataset.open(dataset).manifest
    assert json.loads(said_by(capsys, "inspect", dataset_on_s3, "--verify"))["problems"] == []


def said_by(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command prints with --json."""
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    said = capsys.readouterr()
    assert SECRET_KEY not in said.out + said.err
    return said.out


@dataclass(frozen=True)
class RemoteRun:
    """What a run on the gateway printed, and its losses by step."""

    result: dict[str, Any]
    losses: dict[int, float]
    log: str


@pytest.fixture(scope="module")
def trained_on_s3(gateway: Gateway, dataset_on_s3: str, recipe: str) -> RemoteRun:
    out, log = io.StringIO(), io.StringIO()
    written = begun(gateway, "runs/one/checkpoints", "step-000000005-")
    with redirect_stdout(out), redirect_stderr(log), outage(written, gateway):
        assert main(["train", recipe, f"data={dataset_on_s3}", f"output={RUN}", "--json"]) == 0
    with gateway.filesystem().open_input_file(f"{BUCKET}/runs/one/history.json") as file:
        history = json.loads(file.read())
    losses = {each["step"]: each["loss"] for each in history["steps"]}
    return RemoteRun(json.loads(out.getvalue()), losses, log.getvalue())


def test_training_equals_a_local_run(trained_on_s3: RemoteRun, trained: Run) -> None:
    assert trained_on_s3.result["step"] == trained.result["step"]
    validation = pytest.approx(trained.result["validation"], abs=1e-3)
    assert trained_on_s3.result["validation"] == validation
    local = {each["step"]: each["loss"] for each in trained.history["steps"]}
    assert trained_on_s3.losses == pytest.approx(local, rel=1e-4)
    said = re.findall(r"trying again for|storage is slow or away", trained_on_s3.log)
    assert len(said) <= 6, trained_on_s3.log  # once an operation, not once an attempt


@pytest.mark.usefixtures("trained_on_s3")
def test_evaluation_is_that_of_local_predictions(
    gateway: Gateway,
    raw_predictions: Path,
    dataset: str,
    source: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """These are of the texts alone, so filter labels are among them."""
    with outage(working(), gateway):
        remote = json.loads(said_by(capsys, "evaluate", RUN, DATA, "num_workers=1"))
    assert remote["points"] == TESTS
    rows = Dataset.open(dataset).read_rows("test", 0, TESTS).to_pylist()
    local = pads.dataset(raw_predictions).to_table().to_pylist()
    for point, row in zip(rows, local, strict=True):
        row["point_id"] = point["point_id"]
        row["label_ids"] = [i for i in row["label_ids"] if i not in point["filter_labels"]]
    wanted = brute_force(local, {row["point_id"]: row for row in rows}, source)
    found = {name: remote["metrics"][name] for name in wanted}
    assert found == pytest.approx(wanted, abs=1e-3)


@pytest.mark.usefixtures("trained_on_s3")
def test_predictions_are_those_of_a_local_run(
    gateway: Gateway, raw_predictions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    remote, to = gateway.filesystem(), f"{BUCKET}/predictions"
    texts = raw_predictions.parent / "texts"
    pafs.copy_files(str(texts), f"{BUCKET}/texts", pafs.LocalFileSystem(), remote)
    command = "predict", RUN, f"s3://{BUCKET}/texts", f"s3://{to}", f"k={RAW_K}", "texts=true"
    with outage(working(), gateway):
        said_by(capsys, *command, "num_workers=1")
    names = [info.path for info in remote.get_file_info(pafs.FileSelector(to))]
    parts = sorted(name for name in names if name.endswith(".parquet"))
    found = pads.dataset(parts, filesystem=remote).to_table().to_pylist()
    expected = pads.dataset(raw_predictions).to_table().to_pylist()
    assert len(found) == len(expected) == TESTS
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["point_id"] == theirs["point_id"]
        assert ours["scores"] == pytest.approx(theirs["scores"], abs=1e-3)
        assert len(ours["label_texts"]) == RAW_K


@pytest.mark.usefixtures("trained_on_s3")
def test_an_export_is_that_to_a_local_directory(
    gateway: Gateway, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said_by(capsys, "export", RUN, str(tmp_path / "model"))
    with outage(begun(gateway, "model/encoder", "config"), gateway):
        said_by(capsys, "export", RUN, f"s3://{BUCKET}/model")
    here, remote = (
        files_of(pafs.LocalFileSystem(), str(tmp_path / "model")),
        files_of(gateway.filesystem(), f"{BUCKET}/model"),
    )
    assert here == remote
    assert {"export.json", "head.safetensors", "encoder/model.safetensors"} <= set(here)


def files_of(filesystem: pafs.FileSystem, root: str) -> dict[str, bytes]:
    """Contents by path of all files."""
    found = {}
    for info in filesystem.get_file_info(pafs.FileSelector(root, recursive=True)):
        if info.type == pafs.FileType.File:
            with filesystem.open_input_file(info.path) as file:
                found[info.path.removeprefix(f"{root}/")] = file.read()
    return found
