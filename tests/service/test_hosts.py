"""A host is drained and cut off, and another comes; the run goes on with the same figures."""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from renee_ray.service.run.directory import RunDirectory
from renee_ray.xfc.labels import split_range

from .conftest import LONGER, Command, Run, end, run_so_far, until
from .hosts import Hosts, needs_hosts
from .test_train import (
    OTHER_ORDER,
    assert_same_course,
    committed_by,
    newest_commit,
    ranges_of,
)

pytestmark = [pytest.mark.slow, needs_hosts]


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    # Paths of Ray's sockets must be short.
    with tempfile.TemporaryDirectory(prefix="rr", ignore_cleanup_errors=True) as directory:
        made = Hosts(Path(directory))
        try:
            made.start(2)
            yield made
        finally:
            made.stop()


def test_a_host_is_drained_and_cut_off_and_another_comes(
    trained_longer: Run,
    hosts: Hosts,
    dataset: str,
    recipe: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two workers, one, two. An autoscaler drains a spot node before it is taken away."""
    path, log = str(tmp_path / "run"), tmp_path / "log"
    env = {"RAY_ADDRESS": hosts.address, "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20"}
    process = hosts.head.run(
        sys.executable, "-m", "renee_ray", "train", recipe, f"data={dataset}", f"output={path}",
        *LONGER, "num_workers=[1,2]", "cpus_per_worker=2", "regroup_s=1", "timeout_s=10",
        "checkpoint.keep=1000", "checkpoint.every_steps=20", env=env, out=log,
    )  # fmt: skip
    try:
        until(lambda: committed_by(path) == 2, process, "a checkpoint of two workers")
        drained = newest_commit(path)
        drain = hosts.head.run(
            sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", hosts.address,
            "--node-id", hosts.hosts[2].node_id(), "--reason", "DRAIN_NODE_REASON_PREEMPTION",
            "--reason-message", "spot", "--deadline-remaining-seconds", "300", env=env,
        )  # fmt: skip
        assert drain.wait(300) == 0, drain.communicate()
        warning = "are to be taken away: a checkpoint is written"
        until(lambda: warning in log.read_text(), process, "the drain is noticed")
        until(lambda: newest_commit(path) > drained, process, "a checkpoint because of it")
        hosts.hosts[2].cut()
        cut = time.monotonic()
        until(lambda: committed_by(path) == 1, process, "a checkpoint of one worker")
        took = time.monotonic() - cut
        hosts.add()
        until(lambda: committed_by(path) == 2, process, "a checkpoint of two workers again")
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 130, log.read_text()
    finally:
        end(process)
    with capsys.disabled():
        print(f"\nfrom the cut to a checkpoint of the other worker: {took:.0f} s")

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
    assert_same_course(run_so_far(path, Command(130, "", "")), trained_longer, OTHER_ORDER)
