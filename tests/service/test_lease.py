"""One writer of a run: the lease on a local disk, in object storage, and between real commands."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from renee_ray.cli.main import main
from renee_ray.data.storage import replace_file
from renee_ray.errors import LeaseLost
from renee_ray.service.run.directory import RUN_FILE, RunDirectory
from renee_ray.service.run.lease import (
    LEASE_FILE,
    Lease,
    LeaseHeld,
    machine,
    started_s,
)

from .conftest import (
    LONGER,
    PROCESSES,
    Run,
    descendants,
    end,
    finish,
    paused,
    run_so_far,
    start,
    status_of,
)
from .gateway import BUCKET, Gateway
from .test_train import (
    OTHER_ORDER,
    assert_same_course,
    newest_commit,
    wait_for_commit,
)

BEAT_S, DEAD_S, PATIENT_S = 0.1, 3.0, 60.0
ELSEWHERE: dict[str, Any] = {
    "host": "elsewhere", "pid": 7, "machine": "another-boot pid:[1]", "started_s": 5.0,
    "beats": 3,
}  # fmt: skip


def lease(run: str, **settings: Any) -> Lease:
    return Lease(run, **{"beat_s": BEAT_S, "dead_s": DEAD_S, **settings})


def until(true: Callable[[], Any]) -> None:
    limit = time.monotonic() + PATIENT_S
    while not true():
        assert time.monotonic() < limit
        time.sleep(BEAT_S / 5)


def told(held: Lease) -> str:
    """What a driver is told if it has lost its lease, else nothing."""
    try:
        held.check()
    except LeaseLost as error:
        return str(error)
    return ""


def lost(held: Lease) -> str:
    """What a driver is told, once it has lost its lease."""
    until(lambda: told(held))
    return told(held)


def claimed(run: str) -> bool:
    return Path(run, LEASE_FILE).exists()


def read_claim(run: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(run, LEASE_FILE).read_text())
    return found


def write_claim(run: str, **changed: Any) -> None:
    replace_file(f"{run}/{LEASE_FILE}", json.dumps(ELSEWHERE | changed).encode())


@pytest.fixture
def run(tmp_path: Path) -> str:
    (tmp_path / RUN_FILE).write_text("{}")
    return str(tmp_path)


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def anywhere(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """A run on a local disk, and in object storage."""
    if request.param == "local":
        yield str(tmp_path / "run")
        return
    gateway = Gateway(tmp_path)
    try:
        gateway.start()
        for name, value in gateway.env.items():
            monkeypatch.setenv(name, value)
        yield f"s3://{BUCKET}/run"
    finally:
        gateway.kill()


def test_a_second_driver_is_refused_while_the_first_lives(run: str) -> None:
    with lease(run):
        claim = f"{run}/{LEASE_FILE}"
        with pytest.raises(LeaseHeld, match=f"process {os.getpid()}.*delete {claim}"):
            lease(run).__enter__()
        assert claimed(run)
    assert not claimed(run), "released"
    with lease(run) as second:
        second.check()


def test_an_error_releases_it(run: str) -> None:
    with pytest.raises(KeyboardInterrupt), lease(run):
        raise KeyboardInterrupt
    assert not claimed(run)


@pytest.fixture(scope="module")
def gone() -> dict[str, Any]:
    """What the claim of a process of this host says that has ended."""
    process = subprocess.Popen(["sleep", "600"])
    started = started_s(process.pid)
    process.kill()
    process.wait()
    return ELSEWHERE | {"pid": process.pid, "machine": machine(), "started_s": started}


@pytest.mark.slow
@pytest.mark.parametrize("taken_over", [False, True])
def test_of_two_that_race_one_goes_on(
    anywhere: str, gone: dict[str, Any], taken_over: bool
) -> None:
    """Many times, also for the lease of a driver that is dead."""
    replace_file(f"{anywhere}/{RUN_FILE}", b"{}") if "://" in anywhere else Path(anywhere).mkdir()
    Path(anywhere, RUN_FILE).write_text("{}") if "://" not in anywhere else None
    for number in range(4 if "://" in anywhere else 10):
        if taken_over:
            write_claim(anywhere, **gone)
        gate, settled = threading.Barrier(2, timeout=PATIENT_S), threading.Barrier(2)
        both: list[Lease] = []

        def race(gate: threading.Barrier, settled: threading.Barrier, both: list[Lease]) -> int:
            gate.wait()
            try:
                with lease(anywhere) as mine:
                    both.append(mine)
                    settled.wait(PATIENT_S)  # until the other is refused, or holds it too
                    until(lambda: len(both) < 2 or any(told(each) for each in both))
                    time.sleep(10 * BEAT_S)  # the one that is left finds its own claim
                    mine.check()
                    settled.wait(PATIENT_S)
                    return 1
            except LeaseHeld:
                settled.wait(PATIENT_S)
            except LeaseLost:
                pass
            settled.wait(PATIENT_S)
            return 0

        with ThreadPoolExecutor(2) as pool:
            raced = [pool.submit(race, gate, settled, both) for _ in range(2)]
            assert sum(each.result() for each in raced) == 1, f"round {number}"


def test_a_driver_of_this_host_that_is_gone_is_taken_over_at_once(
    run: str, gone: dict[str, Any]
) -> None:
    write_claim(run, **gone)
    with lease(run, dead_s=1e6):
        assert read_claim(run)["pid"] == os.getpid()
    write_claim(
        run, **gone | {"pid": os.getpid(), "started_s": 1.0}
    )  # its number is another process's now
    with lease(run, dead_s=1e6):
        pass


@pytest.mark.slow
def test_a_driver_elsewhere_is_dead_once_it_is_silent(run: str) -> None:
    for content, who in ((json.dumps(ELSEWHERE), r"elsewhere \(process 7\)"), ("damaged", r"\?")):
        Path(run, LEASE_FILE).write_text(content)
        said: list[str] = []
        with lease(run, say=said.append):
            assert read_claim(run)["pid"] == os.getpid()
        assert len(said) == 1 and re.search(f"{who}.*3 s at most", said[0])


def test_a_driver_elsewhere_that_beats_is_alive(run: str) -> None:
    over = threading.Event()

    def beat() -> None:
        count = 0
        while not over.wait(BEAT_S):
            count += 1
            write_claim(run, beats=count)

    write_claim(run)
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(LeaseHeld, match=r"elsewhere \(process 7\).*delete"):
            lease(run, dead_s=PATIENT_S).__enter__()
    finally:
        over.set()
        thread.join()


def beats(run: str) -> int:
    return int(read_claim(run)["beats"])


@pytest.mark.parametrize("writes", [False, True])
def test_a_driver_that_was_held_up_finds_its_lease_taken(run: str, writes: bool) -> None:
    """As after SIGSTOP: it is silent, and then looks, or even writes its claim."""
    with lease(run, beat_s=1e6) as first:
        before = Path(run, LEASE_FILE).read_text()
        with lease(run, beat_s=1e6) as second:  # that long a silence is a death at the first look
            assert Path(run, LEASE_FILE).read_text() != before
            if writes:
                Path(run, LEASE_FILE).write_text(before)
            first._beat()
            second._beat()
            loser, winner = (second, first) if writes else (first, second)
            assert "taken over by the driver on" in lost(loser)
            winner.check()
    assert not claimed(run)


def test_who_deletes_the_claim_takes_over(run: str) -> None:
    with lease(run) as first:
        now = beats(run)
        until(lambda: beats(run) > now)
        Path(run, LEASE_FILE).unlink()
        with lease(run) as second:
            assert "was taken over by" in lost(first)
            second.check()
    assert not claimed(run)


def test_storage_that_is_away_takes_no_lease(run: str, caplog: pytest.LogCaptureFixture) -> None:
    """The directory is gone, as with a disk that is unmounted, and comes back."""
    with lease(run) as held:
        os.rename(run, run + ".away")
        until(lambda: "is not renewed" in caplog.text)
        os.mkdir(run)
        time.sleep(5 * BEAT_S)
        held.check()
        os.rmdir(run)
        os.rename(run + ".away", run)
        before = beats(run)
        until(lambda: beats(run) != before)
        held.check()
    assert caplog.text.count("is not renewed") == 1


@pytest.mark.slow
def test_an_object_store_that_is_away_takes_no_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gateway, run = Gateway(tmp_path), f"s3://{BUCKET}/run"
    try:
        gateway.start()
        for name, value in gateway.env.items():
            monkeypatch.setenv(name, value)
        with lease(run) as held:
            replace_file(f"{run}/{RUN_FILE}", b"{}")
            gateway.kill()
            until(lambda: "is not renewed" in caplog.text)
            held.check()
            gateway.start()
            with pytest.raises(LeaseHeld):
                lease(run, dead_s=PATIENT_S).__enter__()
            held.check()
        with lease(run):
            pass
    finally:
        gateway.kill()


def alive(pid: int) -> str:
    """The command line of a process; empty where it has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    return ""


def assert_gone(processes: dict[int, str]) -> None:
    """Of a driver that has ended, all processes below it end too."""
    until(lambda: not any(line in alive(pid) for pid, line in processes.items()))


@pytest.mark.slow
def test_a_driver_that_is_told_to_end_stops_after_a_checkpoint(trained_longer: Run) -> None:
    """By SIGTERM, during training."""
    path, stopped = trained_longer.path, trained_longer.command
    below = Path(path).with_name(PROCESSES).read_text()
    assert "ray::RayTrainWorker" in below and "ray::_ChannelActor" in below
    for unused in (
        "PlacementGroupCleaner", "DatasetManager", "_QueueActor", "TrainController", "Preemption",
        "_Stats", "_Autoscaling", "SynchronizationActor",
    ):  # fmt: skip
        assert unused not in below, below
    assert stopped.stdout == "" and "Traceback" not in stopped.stderr
    assert f"stopped after step {newest_commit(path)}" in stopped.stderr
    assert len(trained_longer.history["steps"]) == newest_commit(path)
    assert status_of(path)["state"] == "stopped" and not claimed(path)
    assert '<p class="state">stopped;' in Path(path, "report.html").read_text()


@pytest.mark.slow
def test_two_drivers_on_one_run(
    trained_longer: Run,
    dataset: str,
    recipe: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One takes over from another that was killed, with other workers.

    A third is refused while it lives, until its claim is deleted.
    """
    path = str(tmp_path / "run")
    command = ["train", recipe, f"data={dataset}", f"output={path}", *LONGER]
    killed = start(*command)
    try:
        wait_for_commit(killed, path, 5)
        orphans = descendants(killed.pid)
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait()
        assert claimed(path)
        until(lambda: not any("RayTrainWorker" in alive(pid) for pid in orphans))
        step, killed_s = newest_commit(path), time.time()
    finally:
        end(killed)

    second = start(*command, "num_workers=1")
    try:
        wait_for_commit(second, path, step + 5)
        with paused(second.pid):
            capsys.readouterr()
            assert main(command) == 1
            said = capsys.readouterr()
            assert said.out == "" and "Traceback" not in said.err
            sentence = said.err.splitlines()[-1]
            assert f"is being trained by the driver on {socket.gethostname()}" in sentence
            claim = Path(path, LEASE_FILE)
            assert f"(process {second.pid})" in sentence and f"delete {claim}" in sentence
            assert second.poll() is None, second.communicate()

            family = descendants(second.pid)
            assert any("RayTrainWorker" in line for line in family.values())
            claim.unlink()
            ended = finish(second)
        assert ended.status == 1 and "was taken over by" in ended.stderr.splitlines()[-1]
        assert "Traceback" not in ended.stderr
        assert_gone(family | orphans)
        assert status_of(path)["state"] == "running", "not its own"
    finally:
        end(second)
    run = run_so_far(path, ended)
    assert run.history["steps"][step - 1]["time_s"] < killed_s, f"step {step} was done again"
    assert_same_course(run, trained_longer, OTHER_ORDER)
    assert RunDirectory(path).config().num_workers == 1
