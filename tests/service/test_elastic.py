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

import numpy as np
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
    run_of,
    start,
    status_of,
    until,
)
from .test_train import (
    OTHER_ORDER,
    assert_continuous,
    assert_same_outcome,
    losses,
    newest_commit,
    planned_steps,
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


def test_a_node_is_drained_and_goes_and_another_comes(
    cluster: Cluster, trained_longer: Run, dataset: str, recipe: str, tmp_path: Path
) -> None:
    """Two workers, one, two. An autoscaler drains a spot node before it is taken away."""
    path, nodes = str(tmp_path / "run"), [cluster.add_node(num_cpus=2) for _ in range(2)]
    process = start(
        "train", recipe, f"data={dataset}", f"output={path}", *LONGER, "num_workers=[1,2]",
        "cpus_per_worker=2", "regroup_s=1", "checkpoint.keep=100", "checkpoint.every_steps=0",
        "--json",
        env={"RAY_ADDRESS": cluster.address, "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20"},
    )  # fmt: skip
    try:
        until(lambda: status_of(path).get("step"), process, "a step")
        drain = (
            "drain-node", "--address", cluster.address, "--node-id", nodes[0].node_id, "--reason",
            "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot",
            "--deadline-remaining-seconds", "300",
        )  # fmt: skip
        with paused(os.getpid()):
            subprocess.run([sys.executable, "-m", "ray.scripts.scripts", *drain], check=True)
        until(lambda: newest_commit(path) > 0, process, "a checkpoint because of the drain")
        cluster.remove_node(nodes[0], allow_graceful=False)
        until(lambda: status_of(path).get("num_workers") == 1, process, "one worker")
        with paused(os.getpid()):
            cluster.add_node(num_cpus=2)
        run = run_of(path, finish(process))
    finally:
        end(process)

    assert "are to be taken away: a checkpoint is written" in run.command.stderr
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
    assert_continuous(run, planned_steps(dataset, *LONGER))
    assert_same_outcome(run, trained_longer, points=2.0, rtol=OTHER_ORDER)


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
        assert before + 5 <= step < trained_longer.result["step"]
        assert status_of(path)["state"] == "stopped"
    steps = json.loads(Path(path, "history.json").read_text())["steps"]
    assert [record["step"] for record in steps] == list(range(1, step + 1))
    found = [record["loss"] for record in steps]
    np.testing.assert_allclose(found, losses(trained_longer)[:step], rtol=OTHER_ORDER)
