"""Scoring in passes by the real commands, killed and resumed; and calibrated probabilities."""

from __future__ import annotations

import contextlib
import json
import math
import random
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads
import pytest

import renee_ray
from renee_ray.cli.main import main

from .conftest import LABELS, TESTS, TINY_DIM, Run, end, start, until

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]

K, BATCH, PASSES = 40, 24, 4
SETTINGS = [f"k={K}", f"batch_size={BATCH}", "tail=0.3", "neighbours=5"]


def limit(workers: int) -> str:
    """Memory that forces four passes, beside the search for the 200 labels that votes can lift."""
    labels = -(-LABELS // workers) * (4 * TINY_DIM + 4)
    search = 12 * BATCH * 200 * (4 * 1 + 9)  # by one thread
    return f"memory_gib_per_worker={(search + labels / (PASSES - 0.3)) / 2**30:.12f}"


def predicted(path: Path) -> pa.Table:
    table = pads.dataset(path).to_table()
    assert table["point_id"].to_pylist() == list(range(TESTS)), "each row once, in order"
    return table


def same(one: pa.Table, other: pa.Table) -> None:
    """The same scores within rounding; labels may change places where theirs are that near."""
    for row, got in zip(one.to_pylist(), other.to_pylist(), strict=True):
        assert got["scores"] == pytest.approx(row["scores"], abs=1e-3)
        place = dict(zip(row["label_ids"], row["scores"], strict=True))
        for label, score in zip(got["label_ids"], got["scores"], strict=True):
            assert place.get(label, row["scores"][-1]) == pytest.approx(score, abs=1e-3)
    equal = sum(a == b for a, b in zip(one["label_ids"], other["label_ids"], strict=True))
    assert equal >= 0.95 * TESTS


def killed(command: list[str], out: Path, chance: random.Random) -> int:
    """Kills a prediction at random; the pass that it was in, or 0 if it had ended by then."""

    def done() -> list[int]:
        paths = out.glob("_scratch/passes/0000?.json")
        with contextlib.suppress(FileNotFoundError):  # at the end they are deleted
            return [json.loads(path.read_text())["done"] for path in paths]
        return []

    after, ended = chance.randint(1, PASSES - 1), out / "_predictions.json"

    def begun() -> bool:
        return ended.exists() or (len(done()) == 2 and min(done()) >= after)

    process = start(*command)
    until(begun, process, "blocks")
    time.sleep(chance.random())
    end(process)
    return 0 if ended.exists() else min(done(), default=-1) + 1


def test_four_passes_that_were_killed_predict_what_one_does(
    trained: Run, dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By two workers, killed in the second pass or later, at a random point."""
    out, chance = tmp_path / "p", random.Random(seed := time.time_ns())
    command = ["predict", trained.path, dataset, str(out), *SETTINGS, "num_workers=2", limit(2)]
    while not (begun := killed(command, out, chance)):
        shutil.rmtree(out)
    assert main(command) == 0
    told = capsys.readouterr().err
    assert f"{PASSES} passes, from pass {min(begun, PASSES)} on" in told, seed
    assert json.loads((out / "_predictions.json").read_text())["passes"] == PASSES
    assert len([*out.iterdir()]) == 3, "two parts and their manifest"
    whole = tmp_path / "whole"
    assert main(["predict", trained.path, dataset, str(whole), *SETTINGS, "num_workers=1"]) == 0
    assert "passes, from" not in capsys.readouterr().err
    same(predicted(whole), predicted(out))


def test_evaluate_in_passes_calibrates_what_predict_and_an_export_use(
    trained: Run, dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> dict[str, Any]:
        capsys.readouterr()
        assert main([*arguments, "num_workers=1", "tail=0", "--json"]) == 0
        return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]

    out, export = tmp_path / "p", tmp_path / "e"
    calibrated = ["predict", trained.path, dataset, str(out), "scores=calibrated", "threshold=0.1"]
    assert main(calibrated) == 1
    assert re.search("no calibration .* calibrate=true", capsys.readouterr().err)
    arguments = "evaluate", trained.path, dataset, "batch_size=24", "split=validation"
    found = run(*arguments, "calibrate=true", limit(1))
    later = [each for each in trained.history["evals"] if each["step"]]
    best = max(later, key=lambda each: each["metrics"]["P@1"])["metrics"]
    assert found["metrics"] == pytest.approx(best, abs=1e-3)
    assert 0 <= found["calibration"]["ECE calibrated"] <= 1
    held_out = found["points"] // 2
    assert found["calibration"]["labels"] == held_out * found["calibration"]["best_labels"]
    run(*calibrated)
    table = predicted(out)
    scores = [row["scores"] for row in table.to_pylist()]
    assert all(0.1 <= score <= 1 for row in scores for score in row)
    assert len({len(row) for row in scores}) > 1, "rows have as many labels as are likely"
    assert main(["export", trained.path, str(export)]) == 0
    assert "calibration" in (export / "README.md").read_text()
    model = renee_ray.load(str(export))
    numbers = json.loads((export / "export.json").read_text())["calibration"]
    (plain,), (likely,) = (model.predict(["perl"], 9, calibrated=each) for each in (False, True))
    for a, b in zip(plain, likely, strict=True):
        logit = numbers["slope"] * a.score + numbers["intercept"]
        assert a.id == b.id and b.score == pytest.approx(1 / (1 + math.exp(-logit)), abs=1e-6)
    Path(trained.path, "calibration.json").unlink()
