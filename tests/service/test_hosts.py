"""Several hosts: one is cut off, another killed; the run ends by itself with the same figures."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import LONGER, Run, end, status_of, stop, until
from .hosts import Hosts, needs_hosts
from .test_train import (
    OTHER_ORDER,
    assert_same_course,
    newest_commit,
)

pytestmark = [pytest.mark.slow, needs_hosts]


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    # Paths of Ray's sockets must be short.
    with tempfile.TemporaryDirectory(prefix="rr", ignore_cleanup_errors=True) as directory:
        made = Hosts(Path(directory))
        try:
            made.start(3)
            yield made
        finally:
            made.stop()


def test_a_host_is_cut_off_and_another_killed(
    trained_longer: Run,
    hosts: Hosts,
    dataset: str,
    recipe: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = str(tmp_path / "run")
    settings = [f"data={dataset}", *LONGER]
    process = hosts.head.run(
        sys.executable, "-m", "renee_ray", "train", recipe, *settings, f"output={path}",
        "num_workers=[1,3]", "cpus_per_worker=2", "regroup_s=5", "timeout_s=10",
        env={"RAY_ADDRESS": hosts.address, "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20"},
    )  # fmt: skip
    took: dict[str, float] = {}
    try:
        until(lambda: status_of(path).get("num_workers") == 3, process, "three workers")
        for what, fault, left in (
            ("cut off", hosts.hosts[2].cut, 2), ("killed", hosts.hosts[3].kill, 1),
        ):  # fmt: skip
            at = newest_commit(path)
            until(lambda at=at: newest_commit(path) > at, process, "a checkpoint")
            fault()
            started = time.monotonic()
            until(
                lambda left=left: status_of(path).get("num_workers") == left,
                process,
                f"{left} workers",
            )
            took[what] = time.monotonic() - started
        at = newest_commit(path)
        until(lambda: newest_commit(path) > at, process, "a checkpoint of one worker")
        run = stop(process, path)
    finally:
        end(process)
    with capsys.disabled():
        found = ", ".join(f"{what}: {seconds:.0f} s" for what, seconds in took.items())
        print(f"\nfrom the fault to a new group of workers: {found}")
    assert_same_course(run, trained_longer, OTHER_ORDER)
