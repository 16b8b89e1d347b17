"""Predictions in passes by the real command: of any number of workers, killed and resumed."""

from __future__ import annotations

import json
import random
import re
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as pads
import pytest

from renee_ray.cli.main import main

from .conftest import LABELS, TESTS, TINY_DIM, Run, end, renee_ray, start, until

pytestmark = pytest.mark.slow

K, BATCH, PASSES = 40, 24, 4
SETTINGS = [f"k={K}", f"batch_size={BATCH}", "tail=0.3", "neighbours=5"]
SEARCH = 12 * BATCH * 200 * (4 * 1 + 9)
"""Bytes of the search for the best 200 labels, those that votes can lift, by one thread."""


def limit(workers: int) -> str:
    """Memory that forces four passes."""
    labels = -(-LABELS // workers) * (4 * TINY_DIM + 4)
    search = 12 * BATCH * min(200, -(-LABELS // workers)) * (4 * 1 + 9)
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


@pytest.fixture(scope="module")
def whole(trained: Run, dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "out"
    done = renee_ray("predict", trained.path, dataset, str(path), *SETTINGS, "num_workers=1")
    assert done.status == 0, done.stderr
    assert "passes" not in done.stderr
    return path


@pytest.mark.parametrize("workers", [1, 3])
def test_four_passes_predict_what_one_does(
    trained: Run, dataset: str, whole: Path, tmp_path: Path, workers: int
) -> None:
    more = f"num_workers={workers}", limit(workers)
    done = renee_ray("predict", trained.path, dataset, str(tmp_path / "p"), *SETTINGS, *more)
    assert done.status == 0, done.stderr
    assert re.search(f"the memory of {workers} workers .* {PASSES} passes", done.stderr)
    assert json.loads((tmp_path / "p" / "_predictions.json").read_text())["passes"] == PASSES
    assert sorted(p.name for p in (tmp_path / "p").iterdir() if p.suffix != ".parquet") == [
        "_predictions.json"
    ]
    same(predicted(whole), predicted(tmp_path / "p"))


def test_what_was_killed_goes_on(trained: Run, dataset: str, whole: Path, tmp_path: Path) -> None:
    """By two workers, at a random point after the first block; with the files of the first try."""
    out, seed = tmp_path / "p", time.time_ns()
    chance = random.Random(seed)
    command = ["predict", trained.path, dataset, str(out), *SETTINGS, "num_workers=2", limit(2)]
    process = start(*command)

    def done() -> list[int]:
        found = []
        for path in out.glob("_scratch/*/passes/0000?.json"):
            found.append(json.loads(path.read_text())["done"])
        return found

    after = chance.randint(1, PASSES)
    until(lambda: len(done()) == 2 and min(done()) >= after, process, "blocks")
    end(process)
    before = min(done())
    again = renee_ray(*command)
    assert again.status == 0, again.stderr
    assert "going on with the predictions" in again.stderr, seed
    assert f"from pass {before + 1} on" in again.stderr or before == PASSES, (seed, after)
    same(predicted(whole), predicted(out))
    assert len(list(out.glob("*.parquet"))) == 2
    assert not (out / "_scratch").exists() and not (out / "_claim.json").exists()


def test_evaluate_in_passes(trained: Run, dataset: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The metrics and calibration errors are those of one pass."""
    found = []
    for more in ([], [limit(1)]):
        settings = ["batch_size=24", "tail=0.3", "neighbours=5", "num_workers=1", *more]
        done = renee_ray("evaluate", trained.path, dataset, *settings, "--json")
        assert done.status == 0, done.stderr
        assert ("passes" in done.stderr) is bool(more)
        found.append(json.loads(done.stdout))
    assert found[0] == found[1]
    assert 0 < found[0]["calibration"]["ECE of sigmoids"] < 1
