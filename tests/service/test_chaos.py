"""Random faults, seeded, over one run: it ends, and it is the run that nothing disturbed.

    worker      SIGKILL of a training worker
    sigterm     SIGTERM of one
    node        SIGKILL of a raylet with all that is below it; another node comes
    away        the object store that the data is on is killed, and is back after some seconds
    slow        it stops answering for some seconds (SIGSTOP)
    full        the disk that checkpoints are written to has no room for some seconds
    truncated   the newest checkpoint loses its end, and a worker is killed so that it is looked at

RENEE_RAY_CHAOS_FAULTS sets how many, of all kinds in turn. Without it there are those that no
other test has.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.fs as pafs
import pytest
from ray.cluster_utils import Cluster

from renee_ray.service.run.directory import HISTORY_FILE, RunDirectory

from .conftest import (
    HEALTH,
    LONGER,
    Run,
    descendants,
    end,
    finish,
    renee_ray,
    run_of,
    start,
    started,
    stop,
    until,
)
from .gateway import BUCKET, Gateway
from .test_train import (
    OTHER_ORDER,
    assert_continuous,
    assert_same_course,
    assert_same_outcome,
    newest_commit,
    wait_for_commit,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
ONLY_HERE = ("slow", "full", "sigterm")
KINDS = (*ONLY_HERE, "worker", "node", "away", "truncated")
FAULTS = int(os.environ.get("RENEE_RAY_CHAOS_FAULTS", "0"))
SETTINGS = [f"epochs={4 + 2 * FAULTS}", f"evaluation.every={2 + FAULTS}"] if FAULTS else LONGER
"""With many faults the run must come to its own end; else it is told to, once all have been."""
DISK = 400 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, so that it can be full."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs root and mounts")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    directory = tmp_path / "weed"
    directory.mkdir()
    server = Gateway(directory)
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture
def cluster(
    gateway: Gateway, compiled_loops: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Cluster]:
    for name, value in (HEALTH | gateway.env | compiled_loops).items():
        monkeypatch.setenv(name, value)
    made = started(lambda: Cluster(initialize_head=True, head_node_args={"num_cpus": 1}))
    for _ in range(2):
        started(lambda: made.add_node(num_cpus=2), lambda: None)
    try:
        yield made
    finally:
        made.shutdown()


def training_workers() -> list[int]:
    """Of this test: its cluster's processes are below it."""
    found = descendants(os.getpid()).items()
    return [pid for pid, line in found if line.startswith("ray::RayTrainWorker")]


@dataclass
class Chaos:
    """Injects faults into the run at `run`."""

    run: Path
    cluster: Cluster
    gateway: Gateway
    random: random.Random
    done: Counter[str] = field(default_factory=Counter)

    def inject(self, kind: str) -> None:
        getattr(self, kind)()
        self.done[kind] += 1

    def worker(self, number: signal.Signals = signal.SIGKILL) -> None:
        found = training_workers()
        if found:
            os.kill(self.random.choice(found), number)

    def sigterm(self) -> None:
        self.worker(signal.SIGTERM)

    def node(self) -> None:
        node = self.random.choice(list(self.cluster.worker_nodes))
        self.cluster.remove_node(node, allow_graceful=False)
        self.cluster.add_node(num_cpus=2)

    def away(self) -> None:
        self.gateway.kill()
        time.sleep(self.random.uniform(2, 8))
        self.gateway.start()

    def slow(self) -> None:
        process = self.gateway.process
        assert process is not None
        process.send_signal(signal.SIGSTOP)
        time.sleep(self.random.uniform(1, 5))
        process.send_signal(signal.SIGCONT)

    def full(self) -> None:
        """Until an attempt to write the curves has failed, which leaves an empty file."""
        ballast, attempt = self.run.parent / "ballast", self.run / f"{HISTORY_FILE}.tmp"
        limit = time.monotonic() + 240
        try:
            with ballast.open("wb", buffering=0) as file:
                while time.monotonic() < limit:
                    try:
                        file.write(bytes(1 << 20))
                    except OSError:
                        if attempt.exists() and attempt.stat().st_size == 0:
                            return
                        time.sleep(0.01)
            raise AssertionError("nothing was written to the full disk")
        finally:
            ballast.unlink()

    def truncated(self) -> None:
        newest = RunDirectory(str(self.run)).checkpoints().newest()
        if newest is not None:
            file = self.random.choice(sorted(Path(newest.path).glob("*.safetensors")))
            os.truncate(file, file.stat().st_size - 100)
        self.worker()


@pytest.fixture
def undisturbed(request: pytest.FixtureRequest, dataset: str, recipe: str, tmp_path: Path) -> Run:
    """The run that no fault hits."""
    if not FAULTS:
        found: Run = request.getfixturevalue("trained_longer")
        return found
    path = str(tmp_path / "undisturbed")
    where = f"data={dataset}", f"output={path}", "checkpoint.every_steps=0"
    return run_of(path, renee_ray("train", recipe, *where, *SETTINGS, "--json"))


def test_faults(
    gateway: Gateway,
    cluster: Cluster,
    disk: Path,
    dataset: str,
    recipe: str,
    undisturbed: Run,
    capsys: pytest.CaptureFixture[str],
) -> None:
    remote = gateway.filesystem()
    pafs.copy_files(dataset, f"{BUCKET}/dataset", pafs.LocalFileSystem(), remote)
    path = disk / "run"
    chaos = Chaos(path, cluster, gateway, random.Random(0))
    order = [KINDS[i % len(KINDS)] for i in range(FAULTS)]
    chaos.random.shuffle(order)
    order = order or list(ONLY_HERE)
    # Neither a slow store nor a full disk is a failure.
    failures = -1 if FAULTS else 1
    process = start(
        "train", recipe, f"data=s3://{BUCKET}/dataset", f"output={path}", *SETTINGS, "--json",
        "num_workers=[1,2]", "cpus_per_worker=2", "regroup_s=5", "timeout_s=60",
        f"checkpoint.max_failures={failures}", "checkpoint.keep=3",
        env={"RAY_ADDRESS": cluster.address, "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20"},
    )  # fmt: skip
    try:
        for kind in order:
            wait_for_commit(process, str(path), newest_commit(str(path)) + 1)
            before = {*training_workers()}
            chaos.inject(kind)
        if FAULTS:
            run = run_of(str(path), finish(process, timeout=900))
        else:
            until(lambda: {*training_workers()} - before, process, "new workers after SIGTERM")
            replaced = time.time()
            wait_for_commit(process, str(path), newest_commit(str(path)) + 1)
            run = stop(process, str(path))
    finally:
        end(process)

    with capsys.disabled():
        print(f"\nfaults injected and survived: {dict(chaos.done)}")
    assert chaos.done == Counter(order)
    for each in RunDirectory(str(path)).checkpoints().found():
        assert each.problem is None
    # Each step's loss is that of the same global batch: no row of any epoch lost or repeated.
    assert_same_course(run, undisturbed, OTHER_ORDER)
    if not FAULTS:  # SIGTERM, which a spot node sends, came last: a checkpoint is taken at once
        said = re.search(r"ended by SIGTERM after the checkpoint of step (\d+)", run.command.stderr)
        assert said is not None, run.command.stderr
        assert run.history["steps"][int(said[1]) - 1]["time_s"] < replaced, "steps were redone"
    else:
        assert_continuous(run, undisturbed.result["step"])
        assert_same_outcome(run, undisturbed, points=2.0, rtol=OTHER_ORDER)
