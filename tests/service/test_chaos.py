"""Random faults, seeded, over one run: it ends, and it is the run that nothing disturbed.

    worker      SIGKILL of a training worker
    sigterm     SIGTERM of one
    node        SIGKILL of a raylet with all that is below it; another node comes
    away        the object store that the data is on is killed, and is back after some seconds
    slow        it stops answering for some seconds (SIGSTOP)
    full        the disk that checkpoints are written to has no room for some seconds
    truncated   the newest checkpoint loses its end, and a worker is killed so that it is looked at

RENEE_RAY_CHAOS_FAULTS sets how many; without it there is one of each kind.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.fs as pafs
import pytest
from ray.cluster_utils import Cluster

from renee_ray.service.run.directory import RunDirectory

from .conftest import HEALTH, Run, descendants, end, finish, renee_ray, run_of, start
from .gateway import BUCKET, Gateway
from .test_train import OTHER_ORDER, assert_same_outcome, newest_commit

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(3600)]
KINDS = ("worker", "sigterm", "node", "away", "slow", "full", "truncated")
FAULTS = int(os.environ.get("RENEE_RAY_CHAOS_FAULTS", len(KINDS)))
EPOCHS = 4 + 2 * FAULTS


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
def cluster(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    for name, value in (HEALTH | gateway.env).items():
        monkeypatch.setenv(name, value)
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    for _ in range(2):
        made.add_node(num_cpus=2)
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
        ballast = self.run.parent / "ballast"
        try:
            with ballast.open("wb") as file:
                while True:
                    file.write(bytes(1 << 20))
                    file.flush()
        except OSError:
            time.sleep(self.random.uniform(2, 6))
        finally:
            ballast.unlink(missing_ok=True)

    def truncated(self) -> None:
        newest = RunDirectory(str(self.run)).checkpoints().newest()
        if newest is not None:
            file = self.random.choice(sorted(Path(newest.path).glob("*.safetensors")))
            os.truncate(file, file.stat().st_size - 100)
        self.worker()


def test_faults_at_random(
    gateway: Gateway,
    cluster: Cluster,
    disk: Path,
    dataset: str,
    recipe: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    remote = gateway.filesystem()
    pafs.copy_files(dataset, f"{BUCKET}/dataset", pafs.LocalFileSystem(), remote)
    path = disk / "run"
    settings = [f"epochs={EPOCHS}", "evaluation.every=0", "--json"]
    process = start(
        "train", recipe, f"data=s3://{BUCKET}/dataset", f"output={path}", *settings,
        "num_workers=[1,2]", "cpus_per_worker=2", "regroup_s=5", "timeout_s=20",
        "checkpoint.max_failures=-1", "checkpoint.keep=3",
        env={"RAY_ADDRESS": cluster.address, "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20"},
    )  # fmt: skip
    chaos = Chaos(path, cluster, gateway, random.Random(0))
    order = [KINDS[i % len(KINDS)] for i in range(FAULTS)]
    chaos.random.shuffle(order)
    try:
        for kind in order:
            at, limit = newest_commit(str(path)), time.monotonic() + 240
            while newest_commit(str(path)) <= at:
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < limit, f"no new checkpoint after {dict(chaos.done)}"
                time.sleep(0.2)
            time.sleep(chaos.random.uniform(0, 2))
            chaos.inject(kind)
        run = run_of(str(path), finish(process, timeout=900))
    finally:
        end(process)

    injected = sum(chaos.done.values())
    with capsys.disabled():
        print(f"\nfaults injected and survived: {injected} ({dict(chaos.done)})")
    assert injected == FAULTS
    steps = [record["step"] for record in run.history["steps"]]
    assert steps == list(range(1, run.result["step"] + 1)), "a step was lost or repeated"
    for each in RunDirectory(str(path)).checkpoints().found():
        assert each.problem is None
    reference = str(tmp_path / "undisturbed")
    done = renee_ray(
        "train", recipe, f"data={dataset}", f"output={reference}", "checkpoint.every_steps=0",
        *settings,
    )  # fmt: skip
    undisturbed: Run = run_of(reference, done)
    # Each step's loss is that of the same global batch: no row of any epoch lost or repeated.
    assert_same_outcome(run, undisturbed, points=2.0, rtol=OTHER_ORDER)
