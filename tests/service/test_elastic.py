"""Workers and nodes come and go; the driver is told to end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from renee_ray.service.observe.watch import beat_seconds
from renee_ray.service.run.directory import RunDirectory
from renee_ray.xfc.labels import split_range

from .conftest import (
    HEALTH,
    LONGER,
    Run,
    descendants,
    end,
    finish,
    paused,
    start,
    status_of,
    stop,
    until,
)
from .test_train import (
    OTHER_ORDER,
    assert_same_course,
    newest_commit,
    ranges_of,
    wait_for_commit,
)

pytestmark = pytest.mark.slow
TIMEOUT_S = 6
"""Of which a sixth is the time between two heartbeats; a lone worker waits for nobody."""


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


def said(cluster: Cluster) -> str:
    """What workers have written to their logs."""
    logs = Path(cluster.head_node.get_logs_dir_path()).glob("worker-*.err")
    return "".join(log.read_text() for log in logs)


def committed_by(path: str) -> int:
    """The number of workers that wrote the newest checkpoint."""
    found = RunDirectory(path).checkpoints().newest()
    return 0 if found is None else len(list(found.manifest.shards()))


def test_a_node_is_drained_and_goes_and_another_comes(
    cluster: Cluster, trained_longer: Run, dataset: str, recipe: str, tmp_path: Path
) -> None:
    """Two workers, one, two. An autoscaler drains a spot node before it is taken away."""
    path, nodes = str(tmp_path / "run"), [cluster.add_node(num_cpus=2) for _ in range(2)]
    process = start(
        "train", recipe, f"data={dataset}", f"output={path}", *LONGER, "num_workers=[1,2]",
        "cpus_per_worker=2", "regroup_s=1", "checkpoint.keep=1000", "checkpoint.every_steps=20",
        env={"RAY_ADDRESS": cluster.address, "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20"},
    )  # fmt: skip
    try:
        until(lambda: committed_by(path) == 2, process, "a checkpoint of two workers")
        drain = (
            "drain-node", "--address", cluster.address, "--node-id", nodes[0].node_id, "--reason",
            "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot",
            "--deadline-remaining-seconds", "300",
        )  # fmt: skip
        with paused(os.getpid()):
            subprocess.run([sys.executable, "-m", "ray.scripts.scripts", *drain], check=True)
            drained = newest_commit(path)
        warning = "are to be taken away: a checkpoint is written"
        until(lambda: warning in said(cluster), process, "the drain is noticed")
        until(lambda: newest_commit(path) > drained, process, "a checkpoint because of it")
        cluster.remove_node(nodes[0], allow_graceful=False)
        until(lambda: committed_by(path) == 1, process, "a checkpoint of one worker")
        with paused(os.getpid()):
            cluster.add_node(num_cpus=2)
        until(lambda: committed_by(path) == 2, process, "a checkpoint of two workers again")
        run = stop(process, path)
    finally:
        end(process)

    assert warning in run.command.stderr
    found = ranges_of(path)
    num_labels = found[0][-1][1]
    sizes = [len(found[step]) for step in sorted(found)]
    groups = [size for i, size in enumerate(sizes) if i == 0 or size != sizes[i - 1]]
    assert groups == [2, 1, 2]
    for ranges in found.values():
        expected = [split_range(num_labels, len(ranges), rank) for rank in range(len(ranges))]
        assert ranges == expected
    for each in RunDirectory(path).checkpoints().found():
        assert each.checkpoint is not None
        each.checkpoint.verify()
    assert_same_course(run, trained_longer, OTHER_ORDER)


def test_a_driver_that_is_told_to_end_stops_after_a_checkpoint(
    trained_longer: Run, dataset: str, recipe: str, tmp_path: Path
) -> None:
    """By SIGINT, and by SIGTERM once it has gone on from there."""
    path, step = str(tmp_path / "run"), 0
    for number in (signal.SIGINT, signal.SIGTERM):
        process = start(
            "train", recipe, f"data={dataset}", f"output={path}", *LONGER, "--json",
            "num_workers=1", "checkpoint.grace_s=120", f"timeout_s={TIMEOUT_S}",
        )  # fmt: skip
        try:
            wait_for_commit(process, path, step + 5)
            time.sleep(beat_seconds(TIMEOUT_S) + 0.5)  # the driver has heard of a step
            below = " ".join(descendants(process.pid).values())
            process.send_signal(number)
            stopped = finish(process)
        finally:
            end(process)
        assert "ray::TrainController" in below and "ray::_ChannelActor" in below
        assert not re.search("PlacementGroupCleaner|DatasetManager|_QueueActor", below), below
        assert stopped.status == 130, stopped.stderr
        assert stopped.stdout == "" and "Traceback" not in stopped.stderr
        before, step = step, newest_commit(path)
        assert f"stopped after step {step}" in stopped.stderr
        assert before + 5 <= step
        assert status_of(path)["state"] == "stopped"
    run = Run(path, stopped, {}, json.loads(Path(path, "history.json").read_text()))
    assert len(run.history["steps"]) == step
    assert_same_course(run, trained_longer, OTHER_ORDER)
