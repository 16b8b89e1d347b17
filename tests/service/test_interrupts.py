"""Ctrl-C and SIGTERM at random moments of a command's life: imports, Ray's start, work, the end.

RENEE_RAY_INTERRUPTS: how many a command, of all five. Without it `predict` is interrupted once, as
soon as its workers are there: test_lease.py interrupts training, test_convert_interrupted.py a
conversion. RENEE_RAY_SEED: of the moments.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from .conftest import Command, Run, descendants, end, finish, renee_ray, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

TIMES = int(os.environ.get("RENEE_RAY_INTERRUPTS", "0"))
COMMANDS = ["predict"] + ["convert", "train", "evaluate", "export"] * bool(TIMES)
SEED = int(os.environ.get("RENEE_RAY_SEED", "0"))
EARLIEST_S, LIMIT_S = 0.3, 60.0
CRASH = re.compile(r"Traceback|Exception ignored|Segmentation fault|Fatal Python error|\*\*\* SIG")
NOISE = re.compile(r"it/s|Warning|WARNING|INFO|RAY_|\bray\.|\bRay\b")
"""Of Ray and torch, which a user can do nothing about."""
BY_KEYBOARD, TO_PROCESS, TERM = "the process group gets SIGINT", "SIGINT", "SIGTERM"


def alive(family: dict[int, str]) -> dict[int, str]:
    """Those of the processes that have not ended."""
    found = {}
    for pid, what in family.items():
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found[pid] = what
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def interrupt(
    process: subprocess.Popen[str], due: Callable[[], bool], how: str
) -> tuple[Command, float, dict[int, str]] | None:
    """Sends a signal once it is due.

    Returns:
        (how it ended, seconds that it took, what is left of its family); None: it was sooner.
    """
    while not due():
        if process.poll() is not None:
            return None
        time.sleep(0.05)
    family = descendants(process.pid)
    sent = time.monotonic()
    if how == BY_KEYBOARD:
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGINT if how == TO_PROCESS else signal.SIGTERM)
    ended = finish(process, timeout=60)
    seconds = time.monotonic() - sent
    while alive(family) and time.monotonic() - sent < LIMIT_S:
        time.sleep(0.1)
    return ended, seconds, alive(family)


@pytest.fixture
def commands(source: Path, recipe: str, trained: Run, dataset: str, tmp_path: Path) -> Callable:
    def command(name: str, number: int) -> list[str]:
        to = str(tmp_path / f"{name}-{number}")
        return {
            "convert": ["convert", str(source), to, "part_rows=64"],
            "train": ["train", recipe, f"data={dataset}", f"output={to}", "epochs=16"],
            "evaluate": ["evaluate", trained.path, dataset],
            "predict": ["predict", trained.path, dataset, to, "num_workers=1"],
            "export": ["export", trained.path, to],
        }[name]

    return command


def duration_of(command: list[str]) -> float:
    """Seconds of a command that nothing interrupts."""
    began = time.monotonic()
    whole = renee_ray(*command)
    assert whole.status == 0, whole.stderr
    assert not NOISE.search(whole.stderr), whole.stderr
    return time.monotonic() - began


def later(moment: float) -> bool:
    return time.monotonic() > moment


def at_work(process: subprocess.Popen[str]) -> bool:
    """Whether a training worker has been started."""
    return any("RayTrainWorker" in line for line in descendants(process.pid).values())


NOTEBOOK = """
import sys, psutil, renee_ray
try:
    renee_ray.predict(*sys.argv[1:], renee_ray.ScoreConfig(num_workers=1))
except KeyboardInterrupt:
    below = [each.cmdline() for each in psutil.Process().children(recursive=True)]
    print("interrupted,", sum("RayTrainWorker" in "".join(each) for each in below), "workers left")
"""


def test_an_interrupt_in_a_notebook_ends_the_workers(
    trained: Run, dataset: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", NOTEBOOK, trained.path, dataset, str(tmp_path / "predicted")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        found = interrupt(process, partial(at_work, process), TO_PROCESS)
    finally:
        end(process)
    assert found is not None, "it ended before its workers were seen"
    assert found[0].stdout == "interrupted, 0 workers left\n", found


@pytest.mark.parametrize("name", COMMANDS)
def test_an_interrupt_ends_a_command_soon_and_it_can_be_given_again(
    name: str, commands: Callable[[str, int], list[str]], tmp_path: Path
) -> None:
    """One that is done when the signal comes ends with its result and 0."""
    duration = duration_of(commands(name, 0)) if TIMES else 0.0
    choose = random.Random(f"{SEED} {name}")
    for number in range(TIMES or 1):
        how = choose.choice([BY_KEYBOARD, TO_PROCESS, TERM]) if TIMES else BY_KEYBOARD
        process = start(*commands(name, 1))
        began, after = time.monotonic(), choose.uniform(EARLIEST_S, duration)
        due = partial(later, began + after) if TIMES else partial(at_work, process)
        what = f"{name} {number}: {how} after {after:.2f} of {duration:.1f} s"
        try:
            found = interrupt(process, due, how)
        finally:
            end(process)
        if found is None:
            assert TIMES, "it ended before its workers were seen"
            print(f"{what}: it had ended")
            shutil.rmtree(tmp_path / f"{name}-1", ignore_errors=True)
            continue
        ended, seconds, left = found
        print(f"{what}: {ended.status} in {seconds:.1f} s: {ended.stderr.splitlines()[-1:]}")
        assert ended.status in (0, 130), (what, ended)
        assert seconds < LIMIT_S, (what, ended)
        assert not CRASH.search(ended.stderr), (what, ended)
        assert not left, (what, left)
        if ended.status == 0:
            assert ended.stdout, what
            shutil.rmtree(tmp_path / f"{name}-1", ignore_errors=True)
            continue
        assert re.search(r"^renee-ray: (interrupted|stopped after step)", ended.stderr, re.M), what
    if TIMES:
        duration_of(commands(name, 1))
    else:  # what test_predict.py's test of more labels goes on from
        assert {path.name for path in (tmp_path / f"{name}-1").glob("*")} <= {"_claim.json"}
