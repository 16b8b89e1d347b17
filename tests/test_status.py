"""`renee-ray status`: what the files of a run say, and what their age says."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from renee_ray.cli import main as cli
from renee_ray.errors import ReneeError, reason
from renee_ray.report.status import (
    GPU_MEMORY,
    described,
    duration,
    read_status,
    state_of,
    status_text,
)

RECORD = {
    "step": 500, "total_steps": 2000, "epoch": 1.25, "loss": 12.5, "rows_per_second": 3210.0,
    "padding": 0.05, "seconds_left": 3725.0, "time_s": 995.0, "skipped": 2,
}  # fmt: skip
CONTENT: dict[str, Any] = {
    "format_version": 1, "state": "running", "reason": "", "time_s": 1000.0, "launched_s": 1.0,
    "step": 500, "record": RECORD, "phase": "classifier", "phase_s": 0.1, "epochs": 5, "skipped": 2,
    "restarts": 1, "metric": "P@1",
    "evaluation": {"step": 400, "metrics": {"P@1": 40.0, "P@5": 20.0}},
    "best": {"step": 200, "metrics": {"P@1": 41.0, "P@5": 20.5}},
    "checkpoint": {"step": 400, "time_s": 900.0, "seconds": 3.0},
    "ranks": [
        {"rank": 0, "node": "alpha", "step_s": 0.5, "own_s": 0.2, "data_s": 0.01, "slow": False},
        {"rank": 1, "node": "beta", "step_s": 0.5, "own_s": 0.49, "data_s": 0.02, "slow": True},
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "age", "state", "words"),
    [
        ({}, 5, "running", "phase `classifier`"),
        ({"phase": "start", "doing": "texts embedded: 5"}, 5, "running", "texts embedded: 5"),
        ({}, 61, "unknown", "nothing was heard for 1:01; it was in phase `classifier`"),
        ({"phase": "data", "phase_s": 20.0}, 5, "waiting", "for data, for 0:25"),
        ({"phase": "data", "phase_s": 2.0}, 5, "running", "data"),
        ({"phase": "gather", "phase_s": 20.0}, 5, "waiting", "for other workers, for 0:25"),
        ({"phase": "encoder_forward", "phase_s": 20.0}, 5, "running", "encoder_forward"),
        ({"state": "waiting", "reason": "for the workers"}, 70, "waiting", "for the workers"),
        ({"state": "waiting", "reason": "for the workers"}, 700, "unknown", "waiting for the"),
        ({"state": "finished"}, 1e6, "finished", ""),
        ({"state": "failed", "reason": "disk full"}, 1e6, "failed", "disk full"),
    ],
)
def test_the_state(changed: dict[str, Any], age: float, state: str, words: str) -> None:
    found, why = state_of(CONTENT | changed, age)
    assert found == state and words in why


def shown(status: dict[str, Any]) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(status_text(status | {"run": "runs/a"}), highlight=False)
    return capture.get()


def test_the_table_says_all_of_it() -> None:
    text = shown(described(CONTENT, now=1005.0))
    for words in (
        "runs/a: running", "0:05 ago", "500 of 2,000", "1.25 of 5", "12.500", "3,210 rows/s",
        "5% padding", "1:02:05", "P@1 40.00  P@5 20.00  (step 400)", "P@1 41.00", "(step 200)",
        "step 400, 1:45 ago", "alpha", "490.0", "straggler",
    ):  # fmt: skip
        assert words in text, words
    assert text.count("straggler") == 1 and "GPU" not in text and "started at" not in text
    starts = [{"step": 0, "workers": 2}, {"step": 1650, "workers": 1}]
    again = shown(described(CONTENT | {"starts": starts, "state": "stopped"}, now=1005.0))
    assert "0 (2), 1,650 (1); workers in brackets" in again and "time left" not in again
    lines = {line.split("  ")[0]: line.split()[-1] for line in text.splitlines() if line}
    assert (lines["skipped steps"], lines["restarts after failures"]) == ("2", "1")


def test_memory_of_a_gpu_is_shown_where_there_is_one() -> None:
    gib = dict(zip(GPU_MEMORY, (6.25, 7.5, 79.0), strict=True))
    text = shown(described(CONTENT | {"record": RECORD | gib}, 1005.0))
    assert "peak 6.2 GiB, 7.5 reserved, of 79.0" in text


def test_of_many_workers_the_slowest_are_shown() -> None:
    ranks = [CONTENT["ranks"][0] | {"rank": r, "own_s": r / 100} for r in range(40)]
    text = shown(described(CONTENT | {"ranks": ranks}, 1005.0))
    assert "16 slowest of 40" in text and "390.0" in text and "230.0" not in text


def test_before_the_first_record() -> None:
    waiting = {"format_version": 1, "state": "waiting", "reason": "for the workers", "time_s": 1.0}
    status = described(waiting, 4.0)
    assert status["step"] is None and status["ranks"] == []
    assert "step  7\n" in re.sub(" +\n", "\n", re.sub("  +", "  ", shown(status | {"step": 7})))
    assert "waiting, for the workers" in shown(status) and "0:03 ago" in shown(status)


def run_at(folder: Path, **files: Any) -> str:
    for name, content in {"run": {}, **files}.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{name}.json").write_text(text)
    return str(folder)


def test_the_command_for_machines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_at(tmp_path, status=CONTENT | {"time_s": time.time()})
    assert cli.main(["status", run + "/", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["state"] == "running" and found["step"] == 500 and found["run"] == run
    assert [each["slow"] for each in found["ranks"]] == [False, True]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "status.json is damaged"),
        ("[]", "damaged"),
        ({"format_version": 99}, "version 99"),
        ({"format_version": 1}, "damaged"),
        (CONTENT | {"time_s": "now"}, "damaged"),
    ],
)
def test_a_status_file_that_is_of_no_use(tmp_path: Path, content: Any, words: str) -> None:
    with pytest.raises(ReneeError, match=words):
        read_status(run_at(tmp_path, status=content), 0.0)


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(ReneeError, match="is not a run of renee_ray"):
        read_status(str(tmp_path), 0.0)
    with pytest.raises(ReneeError, match="has not been trained yet"):
        read_status(run_at(tmp_path), 0.0)


def test_durations() -> None:
    assert [duration(s) for s in (0, 59.9, 61, 3600)] == ["0:00", "0:59", "1:01", "1:00:00"]


def test_why_a_run_has_failed_is_in_its_reason() -> None:
    told = "Training failed due to controller error:\nTraceback\n  File x\nImportError: no peft"
    assert reason(ValueError(told)) == (
        "Training failed due to controller error: ImportError: no peft"
    )
    assert reason(ValueError("one\ntwo")) == "one" and reason(ValueError()) == "ValueError"
