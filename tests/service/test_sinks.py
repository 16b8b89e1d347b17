"""TensorBoard, MLflow and Weights & Biases, really written and read again."""

from __future__ import annotations

import importlib.util
import json
import logging
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from renee_ray.config.overrides import make_config
from renee_ray.config.schema import RunConfig
from renee_ray.errors import ReneeError
from renee_ray.service.observe import sinks
from renee_ray.service.observe.sinks import CURVES, Sinks, check_sinks


def config(output: str, *names: str, **observe: Any) -> RunConfig:
    return make_config(
        RunConfig, {"data": "d", "output": output, "observe": {"log_to": names, **observe}}
    )


def record(step: int, loss: float) -> dict[str, float]:
    return dict.fromkeys(CURVES, 1.0) | {"step": step, "loss": loss}


def written(made: RunConfig, first: int, losses: list[float]) -> None:
    """A run, or the rest of one, whose records are of steps first + 1, ..."""
    opened = Sinks(made, first)
    for step, loss in enumerate(losses, start=first + 1):
        opened.record(record(step, loss), {"classifier": 0.25})
    opened.validation(first + len(losses), {"P@1": 40.0})
    opened.close()


def test_tensorboard_of_a_run_that_was_cut_off_and_resumed(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    made = config(str(tmp_path), "tensorboard")
    written(made, 0, [5.0, 4.0, 3.0])
    written(made, 2, [2.0, 1.0])  # from the checkpoint of step 2
    events = EventAccumulator(f"{tmp_path}/tensorboard", {"scalars": 0})
    events.Reload()
    losses = [(each.step, each.value) for each in events.Scalars("train/loss")]
    assert losses == [(1, 5.0), (2, 4.0), (3, 2.0), (4, 1.0)]
    assert [each.value for each in events.Scalars("seconds/classifier")][-1] == 0.25
    assert events.Scalars("validation/P@1")[-1].value == 40.0


def test_mlflow_of_a_run_that_was_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # spares the test a server
    made = config(f"{tmp_path}/o'neil", "mlflow")
    written(made, 0, [5.0, 4.0])
    written(made, 2, [3.0])
    client = MlflowClient()
    experiment = client.get_experiment_by_name("renee_ray")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["classifier.momentum"] == "0.9"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(each.step, each.value) for each in history] == [(1, 5.0), (2, 4.0), (3, 3.0)]
    assert run.data.metrics["validation/P_at_1"] == 40.0


def records(log: bytes) -> Iterator[bytes]:
    """The records of a log as LevelDB writes it, after the 7 bytes of wandb's own header."""
    at, whole = 7, b""
    while at + 7 <= len(log):
        if 32768 - at % 32768 < 7:  # the rest of a block has no room for a header
            at += 32768 - at % 32768
        length, kind = struct.unpack_from("<HB", log, at + 4)
        whole += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole record, or its last piece
            yield whole
            whole = b""


def history_of(run: Path) -> tuple[list[dict[str, Any]], set[str]]:
    """(what wandb wrote of a run, row by row, its ids of the run)"""
    from wandb.proto.wandb_internal_pb2 import Record

    rows, ids = [], set()
    for path in sorted((run / "wandb").glob("offline-run-*/*.wandb")):
        for data in records(path.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                ids.add(record.run.run_id)
            if record.HasField("history"):
                items = record.history.item
                rows.append(
                    {each.key or each.nested_key[0]: json.loads(each.value_json) for each in items}
                )
    return rows, ids


def test_wandb_offline_of_a_run_that_was_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "0123456789abcdef" * 4
    monkeypatch.setattr(sinks, "CLOSE_S", 120)  # of a machine with much else to do
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", secret)
    made = config(str(tmp_path / "run"), "wandb")
    (tmp_path / "run").mkdir()
    written(made, 0, [5.0, 4.0])
    time.sleep(1)  # a directory of wandb's is named by the second
    written(made, 1, [3.0])
    wanted = [(1, 5.0), (2, 4.0), (2, 3.0)]
    for _ in range(60):  # its own process may still write
        rows, ids = history_of(tmp_path / "run")
        losses = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
        if losses == wanted:
            break
        time.sleep(1)
    assert losses == wanted
    assert [row["validation/P@1"] for row in rows if "validation/P@1" in row] == [40.0, 40.0]
    assert len(ids) == 1
    kept = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(kept) > 2 and not any(secret.encode() in content for content in kept)


def test_a_sink_that_fails_is_said_once_and_dropped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("no directory")
    with caplog.at_level(logging.WARNING):
        written(config(str(tmp_path), "tensorboard", tensorboard_dir=str(blocked)), 0, [1.0] * 5)
    assert len(caplog.records) == 1 and "nothing more is written there" in caplog.text


def test_what_cannot_be_had_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ReneeError, match=r"set observe\.tensorboard_dir"):
        check_sinks(config("s3://bucket/run", "tensorboard"))
    check_sinks(config("s3://bucket/run", "tensorboard", tensorboard_dir=str(tmp_path)))
    check_sinks(config("s3://bucket/run"))
    with pytest.raises(ReneeError, match="needs MLFLOW_TRACKING_URI"):
        check_sinks(config(str(tmp_path), "mlflow"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(ReneeError, match="needs WANDB_API_KEY"):
        check_sinks(config(str(tmp_path), "wandb"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_sinks(config(str(tmp_path), "wandb"))
    with pytest.raises(ReneeError, match="set WANDB_DIR"):
        check_sinks(config("s3://bucket/run", "wandb"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ReneeError, match=r"pip install 'renee_ray\[mlflow\]'"):
        check_sinks(config(str(tmp_path), "mlflow"))
