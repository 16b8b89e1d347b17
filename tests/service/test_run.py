"""The run directory: which checkpoint is the best, whatever a killed run left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from renee_ray.config import ReneeError
from renee_ray.service.run import BEST_FILE, RunDirectory, beats, best_name
from renee_ray.training.checkpoint import STATE

P1 = "P@1"


def best_of(step: int, **metrics: float) -> dict[str, Any]:
    return {"directory": best_name(step), "step": step, "metrics": metrics}


@pytest.mark.parametrize(
    ("best", "step", "metrics", "expected"),
    [
        (None, 5, {P1: 1.0}, True),
        (None, 5, {}, False),
        (best_of(3, **{P1: 2.0}), 5, {P1: 2.1}, True),
        (best_of(3, **{P1: 2.0}), 5, {P1: 2.0}, False),
        (best_of(3, **{P1: 2.0}), 5, {}, False),
        (best_of(5, **{P1: 2.0}), 5, {P1: 2.1}, False),
        (best_of(3, **{"P@5": 9.0}), 5, {P1: 0.0}, True),
        (best_of(3, **{"P@5": 9.0, P1: 1.0}), 5, {P1: 0.5, "P@5": 10.0}, False),
    ],
)
def test_beats(
    best: dict[str, Any] | None, step: int, metrics: dict[str, float], expected: bool
) -> None:
    assert beats(best, step, P1, metrics) == expected


def copied(run: RunDirectory, folder: Path, step: int) -> None:
    """Every rank has copied its files of a checkpoint; nothing names them yet."""
    local = folder / f"local-{step}"
    local.mkdir()
    (local / STATE).write_text("{}")
    (local / f"classifier-{step}").write_text("rows")
    run.copy_to_best(str(local), step)


def directories(path: Path) -> list[str]:
    return sorted(child.name for child in path.glob("best-*"))


def test_publishing_deletes_what_was_the_best_and_what_nobody_named(tmp_path: Path) -> None:
    path = tmp_path / "run"
    run = RunDirectory(str(path))
    assert run.best() is None
    for step in (3, 4, 7):
        copied(run, tmp_path, step)
    run.publish_best(3, {P1: 1.0})
    assert directories(path) == [best_name(3)]
    copied(run, tmp_path / "run", 8)
    run.publish_best(8, {P1: 2.0})
    assert directories(path) == [best_name(8)]
    assert (path / best_name(8) / "classifier-8").read_text() == "rows"
    assert run.best() == best_of(8, **{P1: 2.0})


@pytest.mark.parametrize(
    ("step", "value", "copy", "published"),
    [(5, 3.0, True, True), (5, 3.0, False, False), (5, 1.0, True, False), (6, 3.0, True, False)],
)
def test_a_run_killed_between_commit_and_publication(
    tmp_path: Path, step: int, value: float, copy: bool, published: bool
) -> None:
    """`step` is that of the committed checkpoint; the last evaluation was after step 5."""
    path = tmp_path / "run"
    run = RunDirectory(str(path))
    copied(run, tmp_path, 2)
    run.publish_best(2, {P1: 2.0})
    if copy:
        copied(run, tmp_path, 5)
    evals = [{"step": 2, "metrics": {P1: 2.0}}, {"step": 5, "metrics": {P1: value}}]
    run.settle_best(P1, evals, step)
    best = run.best()
    assert best is not None and best["step"] == (5 if published else 2)
    run.settle_best(P1, [], 0)
    assert run.best() == best


@pytest.mark.parametrize(
    "text",
    [
        "{", "[]", "{}", '{"directory": "best-000000003"}',
        json.dumps({**best_of(3), "directory": "../elsewhere"}),
        json.dumps({**best_of(3), "metrics": {"P@1": "high"}}),
        json.dumps({**best_of(3), "metrics": []}),
        json.dumps({**best_of(3), "step": "3"}),
    ],
)  # fmt: skip
def test_a_damaged_file(tmp_path: Path, text: str) -> None:
    (tmp_path / BEST_FILE).write_text(text)
    run = RunDirectory(str(tmp_path))
    with pytest.raises(ReneeError, match=r"best\.json is damaged; .*checkpoint=last"):
        run.checkpoint("best")
    with pytest.raises(ReneeError, match="no committed checkpoint"):
        run.checkpoint("last")
