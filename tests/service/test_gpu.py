"""Real commands on a GPU: a run that is killed there, goes on on a CPU, and is scored on both."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pyarrow.dataset as pads
import pytest
import torch

from .conftest import TESTS, Run, end, renee_ray, run_of, start, trained_once, until
from .test_train import (
    OTHER_ORDER,
    assert_continuous,
    assert_same_outcome,
    newest_commit,
    planned_steps,
    wait_for_commit,
    workers,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

LONG = ["num_workers=1", "epochs=20", "evaluation.every=10"]
"""Enough steps of a GPU for a test that kills between two checkpoints."""
ONE_POINT = 100 / TESTS


@pytest.fixture(scope="module")
def whole(dataset: str, recipe: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An undisturbed run on the GPU, in fp32."""
    return trained_once(tmp_path_factory, "gpu", [recipe, f"data={dataset}", *LONG])


def test_a_run_that_is_killed_goes_on_on_the_gpu_and_on_a_cpu(
    whole: Run, dataset: str, recipe: str, tmp_path: Path
) -> None:
    path, total = str(tmp_path / "run"), planned_steps(dataset, *LONG)
    command = ["train", recipe, f"data={dataset}", f"output={path}", *LONG]
    process = start(*command)
    try:
        wait_for_commit(process, path, 5)
        before = workers(process)
        os.kill(max(before), signal.SIGKILL)
        until(lambda: workers(process) - before, process, "a new worker")
        wait_for_commit(process, path, newest_commit(path) + 5)
    finally:
        end(process)
    there = newest_commit(path)
    process = start(*command, "use_gpu=no")
    try:
        wait_for_commit(process, path, there + 5)
    finally:
        end(process)
    assert there < newest_commit(path) < total
    run = run_of(path, renee_ray(*command, "--json"))
    assert "with 1 GPU workers" in whole.command.stderr and "1 GPU workers" in run.command.stderr
    assert_continuous(run, total)
    assert_same_outcome(run, whole, points=ONE_POINT, rtol=OTHER_ORDER)


def test_a_checkpoint_of_the_gpu_scores_the_same_on_a_cpu(
    whole: Run, dataset: str, tmp_path: Path
) -> None:
    metrics, predictions = {}, {}
    for use_gpu in ("auto", "no"):
        options = f"use_gpu={use_gpu}", "--json"
        done = renee_ray("evaluate", whole.path, dataset, *options)
        assert done.status == 0, done.stderr
        metrics[use_gpu] = json.loads(done.stdout)["metrics"]
        done = renee_ray("predict", whole.path, dataset, str(tmp_path / use_gpu), "k=5", *options)
        assert done.status == 0, done.stderr
        predictions[use_gpu] = pads.dataset(tmp_path / use_gpu).to_table().to_pylist()
    assert metrics["auto"] == pytest.approx(metrics["no"], abs=ONE_POINT)
    assert len(predictions["auto"]) == TESTS
    for found, wanted in zip(predictions["auto"], predictions["no"], strict=True):
        assert found["point_id"] == wanted["point_id"]
        assert found["scores"] == pytest.approx(wanted["scores"], abs=1e-3)
    same = sum(a["label_ids"] == b["label_ids"] for a, b in zip(*predictions.values(), strict=True))
    assert same >= 0.95 * TESTS
