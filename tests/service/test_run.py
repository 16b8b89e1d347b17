"""The run directory: what is there, and what is said where it is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from renee_ray.config.schema import RunConfig
from renee_ray.config.score import ScoreConfig
from renee_ray.errors import ReneeError
from renee_ray.rank.collectives import Ranks
from renee_ray.service.run.directory import RUN_FILE, RunDirectory
from renee_ray.service.score.job import scoring_config
from renee_ray.service.train.resuming import located

from ..training.test_checkpoint_writer import METRIC, Worker, writer_of


def run_at(path: Path) -> RunDirectory:
    path.mkdir(exist_ok=True)
    config = {"data": "d", "output": str(path), "evaluation": {"metric": METRIC}}
    (path / RUN_FILE).write_text(json.dumps({"config": config, "dataset": {}}))
    return RunDirectory(str(path))


def test_workers_find_the_paths_of_a_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have another working directory; what the user has not set stays unset."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "none").mkdir()
    keys = {"data": "s3://b/d/", "output": "o", "encoder": {"name": "model"}}
    found = located(RunConfig.model_validate(keys))
    assert (found.data, found.output) == ("s3://b/d", f"{tmp_path}/o")
    assert found.encoder.name == f"{tmp_path}/model" and found.start == ""
    assert not {"feed", "observe"} & found.model_fields_set
    keys["encoder"] = {"name": "none", "bag": {"dim": 4}}
    assert located(RunConfig.model_validate(keys)).encoder.name == "none"
    assert RunDirectory("s3://b/run/").path == "s3://b/run"


def test_best_and_last(tmp_path: Path) -> None:
    run, writer, worker = run_at(tmp_path), writer_of(tmp_path), Worker(Ranks())
    for step, score in (1, 5.0), (2, 9.0), (3, 4.0), (4, 3.0):
        worker.at(step).save(writer, {METRIC: score})
    assert writer.wait()
    assert run.checkpoint("best").state.step == 2
    assert run.checkpoint("last").state.step == 4


def test_nothing_committed(tmp_path: Path) -> None:
    with pytest.raises(ReneeError, match=r"is not a run of renee_ray"):
        RunDirectory(str(tmp_path)).checkpoint("best")
    run = run_at(tmp_path)
    for which in "best", "last":
        with pytest.raises(ReneeError, match="no committed checkpoint yet"):
            run.checkpoint(which)


def test_a_directory_that_nothing_committed_is_no_checkpoint(tmp_path: Path) -> None:
    run = run_at(tmp_path)
    (tmp_path / "checkpoints" / "step-000000007-0123abcd").mkdir(parents=True)
    with pytest.raises(ReneeError, match="no committed checkpoint yet"):
        run.checkpoint("last")
    with pytest.raises(ReneeError, match="no name of a checkpoint"):
        run.checkpoints().at("../other")


def test_more_workers_may_score_than_a_batch_of_training_has_rows(tmp_path: Path) -> None:
    config = scoring_config(run_at(tmp_path).config(), ScoreConfig(), 300)
    assert config.batch_size >= 300, "as each worker makes it of what it is sent"
    assert RunConfig.model_validate(config.model_dump()).num_workers == 300
