"""Workers come and go: 3, then 2, then 4 in one run; SIGTERM; a stopped driver."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.cluster_utils import Cluster

from renee_ray.service.run.directory import RunDirectory
from renee_ray.xfc.labels import split_range

from .conftest import HEALTH, LONGER, Run, descendants, end, finish, renee_ray, run_of, start
from .test_train import (
    OTHER_ORDER,
    assert_same_outcome,
    losses,
    newest_commit,
    wait_for_commit,
    workers,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def until(condition: Callable[[], Any], process: subprocess.Popen[str], what: str) -> Any:
    """What `condition` gives once it is true, while the process lives."""
    limit = time.monotonic() + 300
    while not (found := condition()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit, f"{what}: nothing after 300 s"
        time.sleep(0.2)
    return found


def ranges_of(run: str) -> dict[int, list[tuple[int, int]]]:
    """By step of a committed checkpoint: the label ranges of its files."""
    return {
        found.step: [(start, stop) for _, start, stop in found.checkpoint.manifest.shards()]
        for found in RunDirectory(run).checkpoints().found()
        if found.checkpoint is not None
    }


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head that can hold no worker, since each takes two CPUs, and reads the data."""
    for name, value in HEALTH.items():
        monkeypatch.setenv(name, value)
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        yield made
    finally:
        made.shutdown()


@pytest.mark.alone
def test_three_workers_then_two_then_four(
    cluster: Cluster, trained_longer: Run, dataset: str, recipe: str, tmp_path: Path
) -> None:
    path, nodes = str(tmp_path / "run"), [cluster.add_node(num_cpus=2) for _ in range(3)]
    process = start(
        "train", recipe, f"data={dataset}", f"output={path}", *LONGER, "num_workers=[2,4]",
        "cpus_per_worker=2", "regroup_s=3", "checkpoint.keep=100", "--json",
        env={"RAY_ADDRESS": cluster.address, "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20"},
    )  # fmt: skip

    def group_of(size: int) -> Callable[[], bool]:
        return lambda: any(len(each) == size for each in ranges_of(path).values())

    try:
        until(group_of(3), process, "a checkpoint of three workers")
        cluster.remove_node(nodes[0], allow_graceful=False)
        until(group_of(2), process, "a checkpoint of two workers")
        for _ in range(2):
            cluster.add_node(num_cpus=2)
        until(group_of(4), process, "a checkpoint of four workers")
        run = run_of(path, finish(process))
    finally:
        end(process)

    steps = [record["step"] for record in run.history["steps"]]
    assert steps == list(range(1, run.result["step"] + 1)), "a step was lost or repeated"
    found = ranges_of(path)
    num_labels = found[0][-1][1]
    sizes = [len(found[step]) for step in sorted(found)]
    groups = [size for i, size in enumerate(sizes) if i == 0 or size != sizes[i - 1]]
    assert groups in ([3, 2, 4], [3, 2, 3, 4]), "the two nodes may come one after the other"
    for ranges in found.values():
        expected = [split_range(num_labels, len(ranges), rank) for rank in range(len(ranges))]
        assert ranges == expected
    for each in RunDirectory(path).checkpoints().found():
        assert each.checkpoint is not None
        each.checkpoint.verify()
    assert_same_outcome(run, trained_longer, points=2.0, rtol=OTHER_ORDER)


def test_a_worker_that_is_told_to_end_leaves_a_checkpoint(
    trained: Run, dataset: str, recipe: str, tmp_path: Path
) -> None:
    """SIGTERM, as a spot node sends: nothing is redone, since a checkpoint is taken at once."""
    path = str(tmp_path / "run")
    process = start(
        "train", recipe, f"data={dataset}", f"output={path}", "evaluation.every=0",
        "checkpoint.keep=100", "--json",
    )  # fmt: skip
    try:
        wait_for_commit(process, path, 5)
        os.kill(max(workers(process)), signal.SIGTERM)
        run = run_of(path, finish(process))
    finally:
        end(process)
    said = re.search(r"ended by SIGTERM after the checkpoint of step (\d+)", run.command.stderr)
    assert said is not None, run.command.stderr
    last = int(said[1])
    assert 5 <= last < run.result["step"] and last in ranges_of(path)
    np.testing.assert_allclose(losses(run), losses(trained), rtol=1e-3)
    times = [record["time_s"] for record in run.history["steps"]]
    assert max(np.diff(times)) == times[last] - times[last - 1], "steps were redone"


@pytest.mark.alone
def test_a_node_that_is_drained_leaves_a_checkpoint(
    cluster: Cluster, trained: Run, dataset: str, recipe: str, tmp_path: Path
) -> None:
    """As an autoscaler does before a spot node is taken away; then it goes, another comes."""
    path, nodes = str(tmp_path / "run"), [cluster.add_node(num_cpus=2) for _ in range(2)]
    process = start(
        "train", recipe, f"data={dataset}", f"output={path}", "cpus_per_worker=2",
        "checkpoint.every_steps=0", "evaluation.every=0", "checkpoint.keep=100", "--json",
        env={"RAY_ADDRESS": cluster.address},
    )  # fmt: skip
    try:
        wait_for_commit(process, path, 0)
        drain = (
            "drain-node", "--address", cluster.address, "--node-id", nodes[0].node_id, "--reason",
            "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot",
            "--deadline-remaining-seconds", "300",
        )  # fmt: skip
        subprocess.run([sys.executable, "-m", "ray.scripts.scripts", *drain], check=True)
        until(lambda: newest_commit(path) > 0, process, "a checkpoint")
        cluster.add_node(num_cpus=2)
        cluster.remove_node(nodes[0], allow_graceful=False)
        run = run_of(path, finish(process))
    finally:
        end(process)
    between = [step for step in ranges_of(path) if 0 < step < run.result["step"]]
    assert len(between) == 1, "not one checkpoint because of the drain"
    assert "are to be taken away: a checkpoint is written" in run.command.stderr
    steps = [record["step"] for record in run.history["steps"]]
    assert steps == list(range(1, trained.result["step"] + 1))
    np.testing.assert_allclose(losses(run), losses(trained), rtol=1e-3)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_driver_that_is_told_to_end_stops_after_a_checkpoint(
    trained: Run, dataset: str, recipe: str, tmp_path: Path, number: signal.Signals
) -> None:
    path = str(tmp_path / "run")
    arguments = ["train", recipe, f"data={dataset}", f"output={path}", "--json"]
    process = start(*arguments, "evaluation.every=0", "checkpoint.grace_s=120")
    try:
        wait_for_commit(process, path, 5)
        below = " ".join(descendants(process.pid).values())
        process.send_signal(number)
        stopped = finish(process)
    finally:
        end(process)
    assert "ray::TrainController" in below and "ray::_ChannelActor" in below
    assert not re.search("PlacementGroupCleaner|DatasetManager|_QueueActor", below), below
    assert stopped.status == 130, stopped.stderr
    assert stopped.stdout == ""
    assert "Traceback" not in stopped.stderr
    step = newest_commit(path)
    assert f"stopped after step {step}" in stopped.stderr
    assert 5 <= step < trained.result["step"]
    assert json.loads(Path(path, "status.json").read_text())["state"] == "stopped"
    if number == signal.SIGTERM:
        assert_same_outcome(run_of(path, renee_ray(*arguments)), trained, points=1e-3)
