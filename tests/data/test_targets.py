"""A teacher's predictions, read along with training points."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from renee_ray.data.dataset import Dataset
from renee_ray.data.order import training_order
from renee_ray.data.rows import BATCH, Window
from renee_ray.data.targets import Targets, part_name
from renee_ray.errors import ReneeError
from renee_ray.rank.batch import Position, cut_batches
from tests.data.tiny import PAD, write_tiny

ROWS, LABELS = 20, 11


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


def predictions(dataset: Dataset) -> list[dict[str, Any]]:
    """Up to five labels for each training point, some points none."""
    rng = np.random.default_rng(4)
    points = dataset.read_rows("train", 0, ROWS, ["point_id"])["point_id"].to_pylist()
    found = []
    for point in points:
        labels = rng.choice(LABELS, rng.integers(0, 6), replace=False).tolist()
        scores = np.sort(rng.random(len(labels)).astype(np.float32))[::-1].tolist()
        found.append({"point_id": point, "label_ids": labels, "scores": scores})
    return found


def write(
    path: Path, rows: list[dict[str, Any]], cuts: tuple[int, ...] = (0, 13), **facts: Any
) -> str:
    path.mkdir()
    schema = pa.schema({
        "point_id": pa.int64(), "label_ids": pa.list_(pa.int64()), "scores": pa.list_(pa.float32()),
    })  # fmt: skip
    for first, stop in zip(cuts, (*cuts[1:], len(rows)), strict=True):
        table = pa.Table.from_pylist(rows[first:stop], schema)
        pq.write_table(table, path / part_name(first), row_group_size=3)
    manifest = {"split": "train", "points": ROWS, "k": 5, "step": 1, **facts}
    (path / "_predictions.json").write_text(json.dumps(manifest))
    return str(path)


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_each_row_comes_with_its_predictions_and_texts_with_none(
    dataset: Dataset, tmp_path: Path, num_ranks: int
) -> None:
    wanted = {row["point_id"]: row for row in predictions(dataset)}
    targets = Targets.of(write(tmp_path / "p", predictions(dataset)), dataset)
    rows = {n: [part.rows for part in dataset.manifest.splits[n]] for n in ("train", "labels")}
    order = training_order(
        rows["train"], rows["labels"], augment=1.0, seed=0, epoch=0, batch_size=6, streams=3,
        window=2,
    )  # fmt: skip
    seen = []
    for rank in range(num_ranks):
        tables = []
        for number in range(order.num_windows):
            slots = order.slots_of(rank, num_ranks)
            table = Window.of(dataset, order, slots, number, targets).read()
            assert (np.diff(table[BATCH].to_numpy()) >= 0).all()
            tables.append(table.append_column("epoch", pa.array(np.zeros(len(table), np.int64))))
        positions = [Position(0, number) for number in range(order.num_batches)]
        for batch in cut_batches(tables, positions, PAD, 9):
            if batch.predicted is None:
                assert (batch.points < 0).all()
                continue
            labels, probabilities = batch.predicted
            assert len(labels) == len(batch)
            for i, point in enumerate(batch.points.tolist()):
                at = slice(labels.offsets[i], labels.offsets[i + 1])
                row = wanted.get(point, {"label_ids": [], "scores": []})
                assert labels.values[at].tolist() == row["label_ids"]
                assert probabilities[at].tolist() == row["scores"]
                seen.append(point)
    assert set(wanted) <= set(seen) and len(seen) == len(set(seen))


def test_a_window_carries_and_reads_the_parts_of_its_rows_alone(
    dataset: Dataset, tmp_path: Path
) -> None:
    targets = Targets.of(write(tmp_path / "p", predictions(dataset), (0, 5, 9, 16)), dataset)
    assert targets is not None
    assert targets.within(5, 9).bounds == (5, 9)
    assert targets.within(4, 10).bounds == (0, 5, 9, 16)
    assert targets.within(17, 20).bounds == (16, 20)
    (tmp_path / "p" / part_name(9)).unlink()
    points = dataset.read_rows("train", 3, 8, ["point_id"])["point_id"].to_numpy()
    found = targets.within(3, 8).read(3, points)
    assert found["predicted"].to_pylist() == [r["label_ids"] for r in predictions(dataset)[3:8]]


def changed(row: int, **values: Any) -> Callable[[list[dict[str, Any]]], None]:
    return lambda rows: rows[row].update(values)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (changed(0, label_ids=[3], scores=[1.5]), "score 1.5 of point .* no probability"),
        (changed(0, label_ids=[3], scores=[-0.1]), "score -0.1"),
        (changed(0, label_ids=[3], scores=[float("nan")]), "score nan"),
        (
            changed(19, label_ids=[LABELS], scores=[0.5]),
            rf"label {LABELS} of point .*\[0, {LABELS}\)",
        ),
        (changed(19, label_ids=[-1], scores=[0.5]), "label -1"),
        (changed(0, label_ids=[3], scores=[]), "differ in length"),
        (changed(0, label_ids=[None], scores=[0.5]), "null"),
        (changed(0, point_id=999), "point 999 where the dataset has point"),
        (lambda rows: rows.pop(), "cannot be read .*6 rows in place of 7"),
    ],
)
def test_what_cannot_be_used_is_refused_when_opened(
    dataset: Dataset, tmp_path: Path, change: Callable[[Any], object], words: str
) -> None:
    rows = predictions(dataset)
    change(rows)
    with pytest.raises(ReneeError, match=words):
        Targets.of(write(tmp_path / "p", rows), dataset)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"split": "test"}, "split='test'"),
        ({"points": 21}, "for the 20 training .* 21 points"),
        ({"num_labels": LABELS, "labels_hash": "0" * 64}, "for other labels than those of"),
    ],
)
def test_those_of_another_split_or_of_other_labels_are_refused(
    dataset: Dataset, tmp_path: Path, facts: dict[str, Any], words: str
) -> None:
    with pytest.raises(ReneeError, match=words):
        Targets.of(write(tmp_path / "p", predictions(dataset), **facts), dataset)
    own = {"num_labels": LABELS, "labels_hash": dataset.manifest.labels_hash}
    fewer = {"num_labels": LABELS - 1, "labels_hash": "0" * 64}
    for i, allowed in enumerate((own, fewer)):
        assert Targets.of(write(tmp_path / str(i), predictions(dataset), **allowed), dataset)


def test_other_directories_are_refused(dataset: Dataset, tmp_path: Path) -> None:
    assert Targets.of("", dataset) is None
    path = Path(write(tmp_path / "p", predictions(dataset)))
    with pytest.raises(ReneeError, match=r"no complete predictions.*split=train"):
        Targets.of(str(tmp_path), dataset)
    pq.write_table(pq.read_table(path / part_name(0)).drop(["scores"]), path / part_name(0))
    with pytest.raises(ReneeError, match=r"cannot be read .*scores"):
        Targets.of(str(path), dataset)
    (path / part_name(0)).unlink()
    with pytest.raises(ReneeError, match="in 1 parts"):
        Targets.of(str(path), dataset)
