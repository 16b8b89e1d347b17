"""Tuning through the real command: a search that is killed, and goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from renee_ray.cli.main import main
from renee_ray.config.overrides import make_config, read_yaml
from renee_ray.config.schema import RunConfig
from renee_ray.data.dataset import Dataset
from renee_ray.report.status import read_status
from renee_ray.service.run.directory import RunDirectory

from .conftest import end, finish, paused, start, until


def journal(output: Path) -> list[dict[str, Any]]:
    path = output / "tuning.json"
    return list(json.loads(path.read_text())["trials"]) if path.exists() else []


def trained_some(output: Path) -> bool:
    """Whether the first trial has a checkpoint to go on from."""
    newest = RunDirectory(str(output / "trial-000")).checkpoints().newest()
    return newest is not None and newest.state.step > 0


def assert_told_as_trained(trials: list[dict[str, Any]], output: Path) -> None:
    """Each trial is a run of one worker, with every batch once and the results that are told."""
    for i, trial in enumerate(trials):
        run = str(output / f"trial-{i:03d}")
        assert RunDirectory(run).config().num_workers == 1
        history = RunDirectory(run).read("history.json") or {}
        steps = [record["step"] for record in history["steps"]]
        assert steps == list(range(1, len(steps) + 1)), "a batch was left out or trained twice"
        values = [each["metrics"]["nDCG@5"] for each in history["evals"] if each["step"]]
        told = [each["value"] for each in trial["results"]]
        known = min(len(told), len(values))  # a run that is stopped may evaluate once more
        assert known and told[:known] == values[:known]
        # A run may end before it is told to.
        assert read_status(run, 0.0)["state"] in {trial["state"], "finished"}


@pytest.mark.slow
def test_a_search_that_is_killed_goes_on(
    dataset: str, bag_recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "tuned"
    command = [
        "tune", bag_recipe, f"data={dataset}", f"output={output}", "trials=2", "num_workers=1",
        "table=false", "space.classifier.learning_rate=1e-4..1e-2", "epochs=12",
        "evaluation.every=3", "evaluation.metric=nDCG@5", "checkpoint.every_steps=0",
    ]  # fmt: skip
    process = start(*command)
    try:
        until(lambda: trained_some(output), process, "a checkpoint")
        with paused(process.pid):  # so that the trial is still running when it is killed
            until(lambda: any(each["results"] for each in journal(output)), process, "a result")
            end(process)
    finally:
        end(process)
    before = journal(output)
    assert len(before) == 1 and before[0]["state"] == "running"

    done = finish(start(*command, "--json"))
    assert done.status == 0, done.stderr
    found = json.loads(done.stdout)
    trials = found["trials"]
    assert trials == journal(output) and len(trials) == 2
    assert trials[0]["settings"] == before[0]["settings"]
    assert trials[0]["results"][0] == before[0]["results"][0], "it began anew"
    assert trials[0]["state"] == "finished"
    assert {each["state"] for each in trials} <= {"finished", "stopped"}
    finished = [each["value"] for each in trials if each["state"] == "finished"]
    best, highest = trials[found["best"]], max(finished)
    error = math.sqrt(highest * (100 - highest) / found["points"])
    stays = highest - trials[0]["value"] <= error  # trial 0 is then the best
    assert best is trials[0] if stays else best["value"] == highest

    places = {"data": dataset, "output": "x"}
    chosen = make_config(RunConfig, places, read_yaml(str(output / "best.yaml")))
    rate = best["settings"]["classifier.learning_rate"]
    given = make_config(RunConfig, places, read_yaml(bag_recipe)).classifier.learning_rate
    assert chosen.classifier.learning_rate == rate and trials[0]["settings"] == {
        "classifier.learning_rate": given
    }
    assert_told_as_trained(trials, output)
    identity = json.loads((output / "tuning.json").read_text())
    assert identity["dataset"] == Dataset.open(dataset).manifest.hash
    assert "Trial" in (output / "tuning.html").read_text()

    capsys.readouterr()
    assert main([*command, "space.epochs=2..3"]) == 1
    assert "is a search with space=" in capsys.readouterr().err
    (output / "tuning.json").unlink()
    kept = (output / "best.yaml").read_bytes()
    assert main(command) == 1
    assert "best.yaml is not of a search" in capsys.readouterr().err
    assert (output / "best.yaml").read_bytes() == kept
