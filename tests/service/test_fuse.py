"""Fusion of predictions equals a loop over points; weights are found on validation points."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest

from renee_ray.cli.main import main
from renee_ray.service.score import fuse as module
from renee_ray.service.score import predictions as predicted

from ..data.tiny import write_tiny

Rows = list[tuple[int, dict[int, float]]]
K = 4


def predictions(seed: int, points: int) -> Rows:
    """Random lists of different lengths, an empty one among them; scores are multiples of 1/8."""
    drawn = np.random.default_rng(seed)
    rows = []
    for point in range(points):
        labels = drawn.choice(9, drawn.integers(0, 7) if point else 0, replace=False)
        rows.append((100 + point, {int(each): int(drawn.integers(0, 9)) / 8 for each in labels}))
    return rows


def write(path: Path, rows: Rows, parts: int, *, logits: bool = False) -> str:
    path.mkdir()
    for part in range(parts):
        some = rows[part * len(rows) // parts : (part + 1) * len(rows) // parts]
        lists = [sorted(row.items(), key=lambda each: -each[1]) for _, row in some]
        columns = {
            "point_id": pa.array([point for point, _ in some], pa.int64()),
            "label_ids": pa.array([[label for label, _ in each] for each in lists]),
            "scores": pa.array([[score for _, score in each] for each in lists]),
        }
        pq.write_table(pa.table(columns), path / f"part-{part:012d}.parquet")
    if logits:
        (path / "_predictions.json").write_text(json.dumps({"k": 9, "step": 3}))
    return str(path)


def fused(models: list[Rows], weights: list[float], logits: list[bool]) -> list[list[Any]]:
    expected = []
    for rows in zip(*models, strict=True):
        sums: dict[int, float] = defaultdict(float)
        for (_, row), weight, is_logit in zip(rows, weights, logits, strict=True):
            for label, score in row.items():
                sums[label] += weight * (1 / (1 + math.exp(-score)) if is_logit else score)
        expected.append(sorted(sums.items(), key=lambda each: (-each[1], each[0]))[:K])
    return expected


@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.25, 0.75], [1.0, 0.0]])
def test_rows_are_weighted_sums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: list[float]
) -> None:
    for reader_or_writer in (predicted, module):
        monkeypatch.setattr(reader_or_writer, "PART_ROWS", 7)
    models = [predictions(1, 30), predictions(2, 30)]
    paths = [
        write(tmp_path / "a", models[0], 3, logits=True),
        write(tmp_path / "b", models[1], 2),
    ]
    given = f"weights=[{2 * weights[0]}, {2 * weights[1]}]"
    assert main(["fuse", *paths, str(tmp_path / "c"), given, f"k={K}"]) == 0
    parts = sorted(map(str, (tmp_path / "c").glob("part-*.parquet")))
    assert len(parts) == 5
    found = pads.dataset(parts).to_table().to_pylist()
    assert [row["point_id"] for row in found] == [point for point, _ in models[0]]
    expected = fused(models, weights, [True, False])
    for row, best in zip(found, expected, strict=True):
        assert row["scores"] == pytest.approx([score for _, score in best], abs=1e-6)
        assert row["label_ids"] == [label for label, _ in best]
    # What it wrote it reads as probabilities.
    again = [str(tmp_path / "c"), str(tmp_path / "c"), str(tmp_path / "d"), f"k={K}"]
    assert main(["fuse", *again]) == 0
    parts = sorted(map(str, (tmp_path / "d").glob("part-*.parquet")))
    assert pads.dataset(parts).to_table().to_pylist() == found


def test_logits_of_a_softmax_and_other_labels_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [write(tmp_path / name, predictions(1, 3), 1, logits=True) for name in "ab"]
    (tmp_path / "b/_predictions.json").write_text(json.dumps({"k": 9, "objective": "softmax"}))
    assert main(["fuse", *paths, str(tmp_path / "c")]) == 1
    assert f"{paths[1]} has logits of a run trained by softmax" in capsys.readouterr().err
    for name in "ab":
        facts = {"k": 9, "labels_hash": name}
        (tmp_path / name / "_predictions.json").write_text(json.dumps(facts))
    assert main(["fuse", *paths, str(tmp_path / "c")]) == 1
    assert f"{paths[0]} and {paths[1]} are predictions of different" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_weights_are_tuned_on_validation_points(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = write_tiny(tmp_path / "set", validation=(20, 13))
    true = dataset.read_rows("validation", 0, 33).to_pylist()
    drawn = np.random.default_rng(0)
    models: list[Rows] = [[], []]
    for row in true:
        for rows, right in zip(models, (0.7, 0.3), strict=True):
            scores = {int(each): float(drawn.random()) for each in drawn.choice(11, 4, False)}
            for label in row["labels"]:
                scores[label] = max(scores.get(label, 0.0), right * float(drawn.random()) + 0.3)
            rows.append((row["point_id"], scores))

    def quality(share: float) -> float:
        best = fused(models, [share, 1 - share], [False, False])
        hits = [len(b) > 0 and b[0][0] in row["labels"] for row, b in zip(true, best, strict=True)]
        return 100 * float(np.mean(hits))

    paths = [write(tmp_path / name, rows, 2) for name, rows in zip("ab", models, strict=True)]
    to = [str(tmp_path / "to"), f"tune=[{paths[0]}, {paths[1]}]", f"data={tmp_path}/set"]
    assert main(["fuse", *paths, *to, "metric=P@1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    best = max(quality(step / 20) for step in range(21))
    assert best > quality(0.5)
    assert found["validation P@1"] == pytest.approx(best)
    assert quality(found["weights"][0]) == pytest.approx(best)
    assert main(["fuse", *paths, *to, f"tune=[{paths[0]}, {paths[0]}]", "overwrite=true"]) == 0
    before = {each: each.read_bytes() for each in (tmp_path / "to").iterdir()}
    other = write(tmp_path / "other", models[0][1:], 1)
    assert main(["fuse", paths[0], other, str(tmp_path / "to"), "overwrite=true"]) == 1
    assert {each: each.read_bytes() for each in (tmp_path / "to").iterdir()} == before
    assert main(["fuse", *paths, *to, f"tune=[{other}, {other}]", "overwrite=true"]) == 1
    assert "split=validation" in capsys.readouterr().err


def test_lists_of_a_fixed_size_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels, scores = np.arange(12).reshape(4, 3), np.linspace(0.9, 0.1, 12).reshape(4, 3)
    fixed = pa.FixedSizeListArray.from_arrays
    for name, columns in (
        (
            "fixed",
            [fixed(each.ravel(), 3) for each in (labels, scores)],
        ),
        ("lists", [pa.array(each.tolist()) for each in (labels, scores)]),
        ("flat", [pa.array(each[:, 0]) for each in (labels, scores)]),
        ("fractions", [pa.array((labels + 0.5).tolist()), pa.array(scores.tolist())]),
    ):
        (tmp_path / name).mkdir()
        table = pa.table([pa.array(range(4)), *columns], names=["point_id", "label_ids", "scores"])
        pq.write_table(table, tmp_path / name / "part-000000000000.parquet")
    paths = [str(tmp_path / name) for name in ("fixed", "lists")]
    assert main(["fuse", *paths, str(tmp_path / "to"), "k=3"]) == 0
    found = pads.dataset(sorted(map(str, (tmp_path / "to").glob("part-*")))).to_table()
    assert found["label_ids"].to_pylist() == labels.tolist()
    for name in ("flat", "fractions"):
        assert main(["fuse", paths[0], str(tmp_path / name), str(tmp_path / "no")]) == 1
        assert f"{name} holds no lists of labels and scores" in capsys.readouterr().err


def test_rows_are_read_best_first(tmp_path: Path) -> None:
    """Also logits whose probabilities are equal by rounding; equal ones stay in their order."""
    (tmp_path / "a").mkdir()
    columns = {
        "point_id": pa.array([7, 8, 9]),
        "label_ids": pa.array([[1, 2, 3], [], [4, 5, 6, 7]]),
        "scores": pa.array([[40.0, 60.0, 50.0], [], [0.0, 1.0, 1.0, 2.0]]),
    }
    pq.write_table(pa.table(columns), tmp_path / "a" / "part-0.parquet")
    (tmp_path / "a" / "_predictions.json").write_text(json.dumps({"k": 4, "step": 3}))
    ((_, labels, scores),) = predicted.Predicted(str(tmp_path / "a")).blocks()
    assert labels.values.tolist() == [2, 3, 1, 7, 5, 6, 4]
    assert labels.offsets.tolist() == [0, 3, 3, 7]
    logits = [60, 50, 40, 2, 1, 1, 0]
    assert scores.tolist() == pytest.approx([1 / (1 + math.exp(-logit)) for logit in logits])


def test_predictions_that_are_being_written_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [write(tmp_path / name, predictions(1, 10), 2) for name in "ab"]
    claim = tmp_path / "b" / "_claim.json"
    claim.write_text("")
    assert main(["fuse", *paths, str(tmp_path / "to")]) == 1
    said = capsys.readouterr().err
    assert f"{paths[1]} is not complete" in said and said.count("\n") == 1
    claim.unlink()
    assert main(["fuse", *paths, str(tmp_path / "to")]) == 0


def test_predictions_that_do_not_fit_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = predictions(1, 10)
    a = write(tmp_path / "a", rows, 1)
    shorter = write(tmp_path / "shorter", rows[:-1], 1)
    turned = write(tmp_path / "turned", rows[::-1], 1)
    scores = write(tmp_path / "scores", [(point, {1: 1.5}) for point, _ in rows], 1)
    for arguments, says in (
        ([a, shorter], "predicts other points than"),
        ([a, turned], "predicts other points than"),
        ([a, scores], "gives point 100 the score 1.5"),
        ([a], "needs two directories"),
        ([a, a, "weights=[1]"], "do not fit 2 directories"),
        ([a, a, "weights=[0, 0]"], "do not fit 2 directories"),
        ([a, a, "weights=[1, 1]", f"tune=[{a}, {a}]"], "exclude each other"),
        ([a, a, f"tune=[{a}, {a}]"], "data= their dataset"),
        ([a, str(tmp_path)], "one is in the other"),
    ):
        options = [each for each in arguments if "=" in each]
        paths = [each for each in arguments if each not in options]
        assert main(["fuse", *paths, str(tmp_path / "to"), *options]) == 1
        assert says in capsys.readouterr().err
        assert not list(tmp_path.glob("to/part-*"))
