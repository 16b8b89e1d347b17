"""The curves of a run, and writing them while the disk is full or storage does not answer."""

from __future__ import annotations

import json
import logging
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from renee_ray.checkpoint.state import State
from renee_ray.rank.batch import Position
from renee_ray.service.run import history as module
from renee_ray.service.run.directory import HISTORY_FILE, RunDirectory
from renee_ray.service.run.history import MOST_STEPS, BackgroundWriter, History

from .gateway import BUCKET, Gateway

PATIENT_S = 60


def evaluation(step: int, score: float = 1.0) -> dict[str, Any]:
    return {"step": step, "epoch": 0.5, "metrics": {"P@1": score}}


def content(steps: int, *evals: int) -> dict[str, Any]:
    return {
        "steps": [{"step": step, "loss": 0.5} for step in range(1, steps + 1)],
        "evals": [evaluation(step) for step in evals],
    }


def state(step: int, evaluated: int | None) -> State:
    return State(
        Position(0, step), step, evaluation=None if evaluated is None else evaluation(evaluated)
    )


def test_a_resumed_run_keeps_the_curves_up_to_its_step(tmp_path: Path) -> None:
    directory = RunDirectory(str(tmp_path))
    directory.write(HISTORY_FILE, content(9, 0, 4, 8))
    found = History.read(directory, state(6, 4))
    assert found.content() == content(6, 0, 4)
    assert History.read(directory, state(0, None)).content() == content(0), "begins anew"
    # A worker that was killed between a commit and the file: the checkpoint knows its evaluation.
    directory.write(HISTORY_FILE, content(3, 0))
    assert History.read(directory, state(6, 4)).content() == content(3, 0, 4)


@pytest.mark.parametrize(
    "text", [None, "{", "[]", '{"steps": 3, "evals": []}', '{"steps": [{}], "evals": []}']
)
def test_a_lost_history_costs_the_curves_alone(
    tmp_path: Path, text: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    if text is not None:
        (tmp_path / HISTORY_FILE).write_text(text)
    found = History.read(RunDirectory(str(tmp_path)), state(6, 4))
    assert found.content() == {"steps": [], "evals": [evaluation(4)]}
    assert "the curves begin anew after step 6" in caplog.text and HISTORY_FILE in caplog.text


def test_a_long_history_is_bounded_and_keeps_its_ends() -> None:
    history = History([], [])
    for step in range(1, 10 * MOST_STEPS):
        history.add({"step": step})
    steps = [each["step"] for each in history.steps]
    assert MOST_STEPS // 2 < len(steps) <= MOST_STEPS
    assert steps == sorted(set(steps))
    assert steps[0] == 1 and steps[-1000:] == list(range(10 * MOST_STEPS - 1000, 10 * MOST_STEPS))


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENT_S
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """Limits the size of files that this process writes, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_costs_one_warning(
    tmp_path: Path,
    small_files: Callable[[int], None],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.05)
    caplog.set_level(logging.WARNING)
    writer = BackgroundWriter(RunDirectory(str(tmp_path)))
    writer.start()
    small_files(4096)
    for steps in range(500, 510):
        writer.put(HISTORY_FILE, content(steps))
        time.sleep(0.1)
    until(lambda: len(caplog.records) > 0)
    small_files(1 << 24)
    writer.put("status.json", {"small": True})
    assert writer.close(PATIENT_S)
    assert json.loads((tmp_path / HISTORY_FILE).read_text()) == content(509), "the latest"
    assert json.loads((tmp_path / "status.json").read_text()) == {"small": True}
    assert [each.message.count("history.json is not written") for each in caplog.records] == [1]


def test_what_can_never_be_written_does_not_keep_the_end_waiting(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("no directory")
    writer = BackgroundWriter(RunDirectory(str(tmp_path / "run")))
    writer.start()
    writer.put(HISTORY_FILE, content(1))
    assert not writer.close(0.5)


@pytest.mark.slow
def test_storage_that_is_away_makes_nobody_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It hangs, and is then dead; what was given meanwhile is there when it is back."""
    gateway = Gateway(tmp_path)
    try:
        gateway.start()
        for name, value in gateway.env.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(module, "RETRY_S", 0.5)
        writer = BackgroundWriter(RunDirectory(f"s3://{BUCKET}/run"))
        writer.start()
        assert gateway.process is not None
        gateway.process.send_signal(signal.SIGSTOP)
        for steps in range(1, 50):
            writer.put(HISTORY_FILE, content(steps))  # would hang for 30 s, were it to wait
        gateway.kill()
        until(lambda: "is not written" in caplog.text)
        writer.put(HISTORY_FILE, content(50))
        gateway.start()
        assert writer.close(PATIENT_S)
        with gateway.filesystem().open_input_file(f"{BUCKET}/run/{HISTORY_FILE}") as file:
            assert json.loads(file.read()) == content(50)
        assert caplog.text.count("is not written") == 1
    finally:
        gateway.kill()
