"""Predictions and metrics of a trained run, against a brute force over the written files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as pads
import pytest

from renee_ray.cli import main
from renee_ray.data.dataset import Dataset

from .conftest import TESTS, Run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]

K = 120


@pytest.fixture(scope="module")
def predicted(
    trained: Run, dataset: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, pa.Table]:
    """Predictions by one worker, with texts, and by three, of a run that two trained."""
    tables = {}
    for num_workers in (1, 3):
        path = tmp_path_factory.mktemp("predictions") / "test"
        status = main(
            ["predict", trained.path, dataset, str(path), f"k={K}", f"num_workers={num_workers}",
             f"texts={str(num_workers == 1).lower()}", "--json"]
        )  # fmt: skip
        assert status == 0
        found = json.loads((path / "predictions.json").read_text())
        assert (found["split"], found["points"], found["k"]) == ("test", TESTS, K)
        tables[num_workers] = pads.dataset(sorted(map(str, path.glob("part-*.parquet")))).to_table()
    return tables


@pytest.fixture(scope="module")
def rows(dataset: str) -> dict[int, dict[str, list[int]]]:
    """The test split by point."""
    table = Dataset.open(dataset).read_rows("test", 0, TESTS).to_pylist()
    return {row["point_id"]: row for row in table}


def test_schema(predicted: dict[int, pa.Table]) -> None:
    schema = predicted[3].schema
    assert schema.names == ["point_id", "label_ids", "scores"]
    assert schema.field("point_id").type == pa.int64()
    assert schema.field("label_ids").type.value_type == pa.int64()
    assert schema.field("scores").type.value_type == pa.float32()
    assert predicted[1].schema.names == [*schema.names, "label_texts"]


@pytest.mark.parametrize("num_workers", [1, 3])
def test_each_point_once_and_best_first(
    predicted: dict[int, pa.Table], rows: dict[int, dict[str, list[int]]], num_workers: int
) -> None:
    found = predicted[num_workers].to_pylist()
    assert sorted(row["point_id"] for row in found) == sorted(rows)
    assert any(rows[i]["filter_labels"] for i in rows)
    for row in found:
        labels, scores = row["label_ids"], row["scores"]
        assert len(labels) == len(scores) == len(set(labels)) == K
        assert all(map(math.isfinite, scores))
        assert scores == sorted(scores, reverse=True)
        assert not set(labels) & set(rows[row["point_id"]]["filter_labels"])


def test_most_points_find_a_true_label(
    predicted: dict[int, pa.Table], rows: dict[int, dict[str, list[int]]]
) -> None:
    hits = sum(
        bool(set(row["label_ids"]) & set(rows[row["point_id"]]["labels"]))
        for row in predicted[3].to_pylist()
    )
    assert hits > len(rows) / 2


def test_any_number_of_workers_predicts_the_same(predicted: dict[int, pa.Table]) -> None:
    one, three = ({row["point_id"]: row for row in predicted[n].to_pylist()} for n in (1, 3))
    for point, row in one.items():
        other = three[point]
        assert row["scores"] == pytest.approx(other["scores"], abs=1e-3)
        # Labels may change places only where their scores are equal but for rounding.
        place = {label: score for label, score in zip(row["label_ids"], row["scores"], strict=True)}
        for label, score in zip(other["label_ids"], other["scores"], strict=True):
            assert place.get(label, row["scores"][-1]) == pytest.approx(score, abs=1e-3)
    same = sum(one[i]["label_ids"] == three[i]["label_ids"] for i in one)
    assert same >= 0.95 * len(one)


def test_texts_are_those_of_the_labels(predicted: dict[int, pa.Table], dataset: str) -> None:
    opened = Dataset.open(dataset)
    texts = opened.read_rows("labels", 0, opened.manifest.num_labels)["text"].to_pylist()
    for row in predicted[1].to_pylist():
        assert row["label_texts"] == [texts[label] for label in row["label_ids"]]


def test_evaluate_equals_a_brute_force_over_the_predictions(
    trained: Run,
    dataset: str,
    predicted: dict[int, pa.Table],
    rows: dict[int, dict[str, list[int]]],
    source: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    capsys.readouterr()
    assert main(["evaluate", trained.path, dataset, "num_workers=1", "--json"]) == 0
    out = capsys.readouterr().out
    found = json.loads(out)
    assert found["points"] == TESTS
    expected = brute_force(predicted[1].to_pylist(), rows, source)
    for name, value in expected.items():
        assert found["metrics"][name] == pytest.approx(value, abs=1e-6), name


def brute_force(
    predictions: list[dict[str, list[int]]], rows: dict[int, dict[str, list[int]]], source: Path
) -> dict[str, float]:
    """P, PSP and recall in percent; propensities from the source's own files."""
    lines = (source / "trn_X_Y.txt").read_text().splitlines()[1:]
    counts: dict[int, int] = {}
    for line in lines:
        for pair in line.split():
            label = int(pair.split(":")[0])
            counts[label] = counts.get(label, 0) + 1
    a, b = 0.55, 1.5
    c = (math.log(len(lines)) - 1) * (b + 1) ** a

    def weight(label: int) -> float:
        return 1 + c * (counts.get(label, 0) + b) ** -a

    metrics = {}
    for k in (1, 3, 5):
        hits = gained = best = 0.0
        for row in predictions:
            true = rows[row["point_id"]]["labels"]  # type: ignore[index]
            right = [label for label in row["label_ids"][:k] if label in true]
            hits += len(right) / k
            gained += sum(map(weight, right))
            best += sum(sorted(map(weight, true), reverse=True)[:k])
        metrics[f"P@{k}"] = 100 * hits / len(predictions)
        metrics[f"PSP@{k}"] = 100 * gained / best
    for k in (10, 100):
        shares = []
        for row in predictions:
            true = rows[row["point_id"]]["labels"]  # type: ignore[index]
            right = [label for label in row["label_ids"][:k] if label in true]
            shares.append(len(right) / len(true) if true else 0.0)
        metrics[f"recall@{k}"] = 100 * sum(shares) / len(predictions)
    return metrics


def test_a_taken_destination_is_refused(
    trained: Run,
    dataset: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    destination = tmp_path / "taken"
    destination.mkdir()
    (destination / "predictions.json").write_text("{}")
    (destination / "part-00000-00000.parquet").write_text("precious")
    assert main(["predict", trained.path, dataset, str(destination)]) == 1
    error = capsys.readouterr().err
    assert "overwrite=true" in error and error.count("\n") == 1

    # A mistyped run must not cost the predictions that are there.
    run = str(tmp_path / "norun")
    assert main(["predict", run, dataset, str(destination), "overwrite=true"]) == 1
    assert "norun" in capsys.readouterr().err
    assert (destination / "part-00000-00000.parquet").read_text() == "precious"


def test_another_vocabulary_is_refused(
    trained: Run, dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads(Path(dataset, "dataset.json").read_text())
    manifest["vocabulary_hash"] = "other"
    (tmp_path / "dataset.json").write_text(json.dumps(manifest))
    assert main(["evaluate", trained.path, str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "vocabulary_hash" in error and error.count("\n") == 1
