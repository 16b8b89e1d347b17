"""Predictions and metrics of a trained run, against a brute force over the written files."""

from __future__ import annotations

import gzip
import io
import json
import math
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from renee_ray.cli.main import main
from renee_ray.data import dataset as layout
from renee_ray.data.dataset import Dataset
from renee_ray.data.targets import part_name
from renee_ray.report.plan import expectation_text

from .conftest import LABELS, RAW_IDS, RAW_K, TESTS, Run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]

K = RAW_K - 1


@pytest.fixture(scope="module")
def predicted(
    trained: Run, dataset: str, predictions: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, pa.Table]:
    """Predictions by one worker, with texts, and by three, of a run that two trained."""
    paths = {1: predictions, 3: tmp_path_factory.mktemp("predictions") / "test"}
    arguments = [trained.path, dataset, str(paths[3]), f"k={K}", "num_workers=3", "--json"]
    assert main(["predict", *arguments]) == 0
    tables = {}
    for num_workers, path in paths.items():
        found = json.loads((path / "_predictions.json").read_text())
        assert (found["split"], found["points"], found["k"]) == ("test", TESTS, K)
        assert found["files"] == sorted(each.name for each in path.glob("*.parquet"))
        tables[num_workers] = pads.dataset(path).to_table()
        assert pd.read_parquet(path)["point_id"].tolist() == list(range(TESTS))
    return tables


@pytest.fixture(scope="module")
def rows(dataset: str) -> dict[int, dict[str, list[int]]]:
    """The test split by point."""
    table = Dataset.open(dataset).read_rows("test", 0, TESTS).to_pylist()
    return {row["point_id"]: row for row in table}


def test_conversion_hashes_the_labels(dataset: str) -> None:
    """Part by part, as they are hashed in one go."""
    manifest = Dataset.open(dataset).manifest
    assert len(manifest.splits["labels"]) > 1
    texts = Dataset.open(dataset).read_rows("labels", 0, manifest.num_labels)["text"]
    assert layout.hash_labels(0, texts) == manifest.labels_hash


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
    assert [row["point_id"] for row in found] == list(rows)
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


@pytest.fixture(scope="module")
def evaluated(trained: Run) -> dict[str, Any]:
    """What `expect` says: what `evaluate` does, beside a recipe."""
    arguments = "num_workers=1", "checkpoint=best", "--recipe", "debian-bag", "--json"
    with redirect_stdout(io.StringIO()) as out:
        assert main(["expect", trained.path, *arguments]) == 0
    return dict(json.loads(out.getvalue()))


def test_evaluate_equals_a_brute_force_over_the_predictions(
    evaluated: dict[str, Any],
    predicted: dict[int, pa.Table],
    rows: dict[int, dict[str, list[int]]],
    source: Path,
) -> None:
    assert (evaluated["split"], evaluated["points"]) == ("test", TESTS)
    expected = brute_force(predicted[1].to_pylist(), rows, source)
    for name, value in expected.items():
        assert evaluated["metrics"][name] == pytest.approx(value, abs=1e-6), name


def test_a_run_is_compared_with_a_recipe(evaluated: dict[str, Any]) -> None:
    """A real run beside what was published for a recipe."""
    assert set(evaluated["expected"]) <= set(evaluated["metrics"])
    unlike = {what: (own, theirs) for what, own, theirs in evaluated["differences"]}
    assert unlike["labels"] == (LABELS, 40398)
    shown = io.StringIO()
    Console(file=shown, width=100).print(expectation_text(evaluated))
    assert f"step {evaluated['step']} " in shown.getvalue()
    for metric, published in evaluated["expected"].items():
        rows = [line for line in shown.getvalue().splitlines() if f" {metric} " in line]
        gap = evaluated["metrics"][metric] - published
        assert any(f"{published:.2f}" in row and f"{gap:+.2f}" in row for row in rows)


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


def test_raw_texts(
    raw_predictions: Path, predicted: dict[int, pa.Table], rows: dict[int, dict[str, list[int]]]
) -> None:
    """As for the points of the dataset, but that no filter label is known."""
    # A point has at most one filter label, which stands among the best of its own text.
    assert max(len(row["filter_labels"]) for row in rows.values()) == 1
    assert [p.name for p in raw_predictions.iterdir() if p.suffix != ".parquet"] == [
        "_predictions.json"
    ]
    found = pads.dataset(raw_predictions).to_table()
    assert found["point_id"].to_pylist() == RAW_IDS, "the order of the input"
    for got, expected in zip(found.to_pylist(), sorted_rows(predicted[1]), strict=True):
        assert len(got["label_texts"]) == len(got["label_ids"]) == RAW_K
        filtered = set(rows[expected["point_id"]]["filter_labels"])
        scores = {
            label: score
            for label, score in zip(got["label_ids"], got["scores"], strict=True)
            if label not in filtered
        }
        for label, score in zip(expected["label_ids"], expected["scores"], strict=True):
            # A batch of other texts sums in another order: the last labels may change places.
            assert scores.get(label, min(got["scores"])) == pytest.approx(score, abs=1e-3)


def sorted_rows(table: pa.Table) -> list[dict[str, list[int]]]:
    return table.sort_by("point_id").to_pylist()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: None, ["does not exist", "text"]),
        (lambda p: p.mkdir(), ["neither a dataset directory nor texts"]),
        (lambda p: p.write_text(""), ["no texts"]),
        (lambda p: p.write_bytes(b"PAR1 not"), ["not Parquet"]),
        (lambda p: p.write_bytes(b"PAR1 no thrift \x08\0\0\0PAR1"), ["not Parquet"]),
        (lambda p: pq.write_table(pa.table({"title": ["a"]}), p), ["'text'", "title"]),
        (lambda p: pq.write_table(pa.table({"text": [1]}), p), ["'text'", "int64", "string"]),
        (
            lambda p: pq.write_table(pa.table({"text": ["a"], "point_id": ["b"]}), p),
            ["'point_id'", "int64", "leave it out"],
        ),
        (
            lambda p: pq.write_table(
                pa.table({"text": ["a", "b"], "point_id": pa.array([1, 2**63], pa.uint64())}), p
            ),
            ["row 1", "9223372036854775808", "point_id"],
        ),
        (
            lambda p: pq.write_table(pa.table({"text": ["a", "b"], "point_id": [1, None]}), p),
            ["row 1", "no point_id"],
        ),
        (lambda p: p.write_bytes(b"a\rb\r"), ["carriage returns", "line feed"]),
    ],
    ids=[
        *["none", "empty", "blank", "damaged", "footer", "column", "type", "id"],
        *["beyond", "null", "returns"],
    ],
)
def test_raw_texts_that_cannot_be_read(
    trained: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    make: Callable[[Path], object],
    words: list[str],
) -> None:
    name = "raw.txt" if words[0] in ("no texts", "carriage returns") else "raw.parquet"
    raw = tmp_path / ("raw" if "neither" in words[0] else name)
    make(raw)
    assert main(["predict", trained.path, str(raw), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert all(word in error for word in [*words, str(raw)]) and error.count("\n") == 1
    assert not list(tmp_path.glob("out/*"))


def test_a_taken_destination_is_refused(
    trained: Run,
    dataset: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    destination = tmp_path / "taken"
    destination.mkdir()
    name = part_name(0)
    made = {"k": 5, "step": 3, "files": [name]}
    (destination / "_predictions.json").write_text(json.dumps(made))
    (destination / name).write_text("precious")
    assert main(["predict", trained.path, dataset, str(destination)]) == 1
    error = capsys.readouterr().err
    assert "overwrite=true" in error and error.count("\n") == 1

    # A mistyped run must not cost the predictions that are there.
    run = str(tmp_path / "norun")
    assert main(["predict", run, dataset, str(destination), "overwrite=true"]) == 1
    assert "norun" in capsys.readouterr().err
    assert (destination / name).read_text() == "precious"


def test_more_labels_than_there_are(
    trained: Run, dataset: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """k is cut to their number, which is said."""
    labels, out = Dataset.open(dataset).manifest.num_labels, tmp_path / "out"
    raw = tmp_path / "raw.txt.gz"
    raw.write_bytes(gzip.compress(b"a much longer text comes first here\r\n\r\nshort\r\n"))
    arguments = ["predict", trained.path, str(raw), str(out)]
    assert main([*arguments, "k=10000000000", "num_workers=1"]) == 0
    assert caplog.text.count(f"k=10000000000 is cut to the {labels} labels") == 1
    found = pads.dataset(out).to_table()
    assert found["point_id"].to_pylist() == [0, 1, 2]
    for row in found["label_ids"].to_pylist():
        assert sorted(row) == list(range(labels))

    # What a killed command leaves is begun anew, and a file of somebody's is not touched.
    manifest = json.loads((out / "_predictions.json").read_text())
    (out / "_predictions.json").rename(out / "_claim.json")
    mine = out / "part-00000-00000.parquet"
    mine.write_text("mine")
    assert main([*arguments, "k=3", "overwrite=true"]) == 1
    assert mine.read_text() == "mine"
    mine.unlink()
    assert main([*arguments, "k=3", "num_workers=1"]) == 0
    assert not (out / "_claim.json").exists()
    found = pads.dataset(out).to_table()
    assert found["point_id"].to_pylist() == [0, 1, 2]
    assert {len(row) for row in found["label_ids"].to_pylist()} == {3}
    assert sorted(each.name for each in out.glob("*.parquet")) == manifest["files"]


def test_a_split_whose_points_have_no_label(
    trained: Run, dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Found while scoring, where the manifest has no counts."""
    opened, path = Dataset.open(dataset), tmp_path / "bare"
    shutil.copytree(dataset, path)
    parts = []
    for part in opened.manifest.splits["test"]:
        table = opened.read_part(part)
        at = table.column_names.index("labels")
        none = pa.array([[]] * len(table), table.schema.field(at).type)
        table = table.set_column(at, "labels", none)
        parts.append(layout.write_part(str(path), part.path, part.first, table))
    splits = {**opened.manifest.splits, "test": tuple(parts)}
    manifest = replace(opened.manifest, splits=splits, statistics={})
    layout.write_manifest(str(path), manifest)
    assert main(["evaluate", trained.path, str(path), "num_workers=1"]) == 1
    assert "no point of split=test" in capsys.readouterr().err


def test_another_vocabulary_is_refused(
    trained: Run, dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(dataset, other)
    manifest = json.loads((other / "dataset.json").read_text())
    manifest["vocabulary_hash"] = "other"
    (other / "dataset.json").write_text(json.dumps(manifest))
    assert main(["evaluate", trained.path, str(other)]) == 1
    error = capsys.readouterr().err
    assert "vocabulary_hash" in error and error.count("\n") == 1
