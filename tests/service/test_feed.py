"""The feed through Ray Data: the same global batches for any number of ranks, from any position."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import ray

from renee_ray.data.dataset import Dataset, write_manifest, write_part
from renee_ray.data.order import Order, training_order
from renee_ray.rank import threads
from renee_ray.rank.batch import Batch, Position
from renee_ray.service.cluster.feed import feed

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]

MAX_LENGTH = 12


def epochs(dataset: Dataset, augment: float = 0.0, count: int = 2) -> list[Order]:
    splits = dataset.manifest.splits
    return [
        training_order(
            [part.rows for part in splits["train"]],
            [part.rows for part in splits["labels"]],
            augment=augment,
            seed=3,
            epoch=epoch,
            batch_size=32,
            streams=4,
            window=4,
        )
        for epoch in range(count)
    ]


def batches(
    dataset: Dataset,
    orders: Sequence[Order],
    num_ranks: int,
    start: Position = Position(),  # noqa: B008
) -> list[list[Batch]]:
    """The batches of each rank."""
    return [
        list(feed(dataset, orders, rank, num_ranks, start=start, max_length=MAX_LENGTH))
        for rank in range(num_ranks)
    ]


def together(ranks: list[list[Batch]]) -> list[tuple[Position, list[int]]]:
    """(position, ids of the points of all ranks, in rank order) of each global batch."""
    for at_once in zip(*ranks, strict=True):
        assert len({batch.position for batch in at_once}) == 1
    return [
        (at_once[0].position, [int(i) for batch in at_once for i in batch.points])
        for at_once in zip(*ranks, strict=True)
    ]


@pytest.fixture(scope="module")
def opened(dataset: str) -> Dataset:
    return Dataset.open(dataset)


@pytest.fixture(scope="module")
def alone(opened: Dataset) -> list[tuple[Position, list[int]]]:
    """The global batches of two epochs as one rank sees them."""
    return together(batches(opened, epochs(opened), 1))


def test_every_row_once_an_epoch(opened: Dataset, alone: list[tuple[Position, list[int]]]) -> None:
    rows = opened.read_rows("train", 0, opened.manifest.num_points("train"), ["point_id"])
    expected = sorted(rows["point_id"].to_pylist())
    orders = epochs(opened)
    for epoch, order in enumerate(orders):
        own = [(position, ids) for position, ids in alone if position.epoch == epoch]
        assert [position.batch for position, _ in own] == list(range(order.num_batches))
        assert sorted(i for _, ids in own for i in ids) == expected
        assert {len(ids) for _, ids in own[:-4]} == {32}
    assert [ids for position, ids in alone if position.epoch == 0] != [
        ids for position, ids in alone if position.epoch == 1
    ]


@pytest.mark.parametrize("num_ranks", [3, 8])
def test_any_number_of_ranks_sees_the_same_batches(
    opened: Dataset, alone: list[tuple[Position, list[int]]], num_ranks: int
) -> None:
    assert together(batches(opened, epochs(opened), num_ranks)) == alone


def test_data_that_does_not_come_is_not_waited_for_without_end(
    opened: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that hangs holds the CPUs of its reading tasks."""
    monkeypatch.setattr(threads, "PATIENT_S", 0.2)
    cpus = ray.cluster_resources()["CPU"]
    hung = ray.remote(num_cpus=cpus)(lambda: time.sleep(60)).remote()  # type: ignore[call-overload]
    try:
        limit = time.monotonic() + 60
        while ray.available_resources().get("CPU", 0):
            assert time.monotonic() < limit
            time.sleep(0.1)
        batches = feed(
            opened, epochs(opened), 0, 1, start=Position(), max_length=MAX_LENGTH, wait_s=1
        )
        with pytest.raises(TimeoutError, match=r"no data for [1-9]"):
            next(batches)
    finally:
        ray.cancel(hung, force=True)


@pytest.mark.parametrize(("num_ranks", "start"), [(2, Position(0, 6)), (1, Position(1, 4))])
def test_a_start_in_mid_epoch_gives_the_remainder(
    opened: Dataset,
    alone: list[tuple[Position, list[int]]],
    num_ranks: int,
    start: Position,
) -> None:
    rest = [
        (position, ids)
        for position, ids in alone
        if (position.epoch, position.batch) >= (start.epoch, start.batch)
    ]
    assert len(rest) < len(alone)
    assert together(batches(opened, epochs(opened), num_ranks, start)) == rest


def test_a_start_at_the_end_gives_nothing(opened: Dataset) -> None:
    orders = epochs(opened)
    end = Position(len(orders), 0)
    assert list(feed(opened, orders, 0, 1, start=end, max_length=MAX_LENGTH)) == []


def test_rows_are_what_the_dataset_holds_but_for_cut_texts(opened: Dataset) -> None:
    table = opened.read_rows("train", 0, opened.manifest.num_points("train")).to_pylist()
    stored = {row["point_id"]: row for row in table}
    assert any(len(row["input_ids"]) > MAX_LENGTH for row in table)
    seen = 0
    for batch in batches(opened, epochs(opened, count=1), 1)[0]:
        for i, point in enumerate(batch.points.tolist()):
            row = stored[point]
            ids, tokens = row["input_ids"], row_of(batch, "input_ids", i)
            cut = [*ids[: MAX_LENGTH - 1], ids[-1]] if len(ids) > MAX_LENGTH else ids
            assert tokens == cut
            assert row_of(batch, "labels", i) == row["labels"]
            assert row_of(batch, "filtered", i) == row["filter_labels"]
            seen += 1
    assert seen == len(table)


def row_of(batch: Batch, name: str, i: int) -> list[int]:
    rows = getattr(batch, name)
    return rows.values[rows.offsets[i] : rows.offsets[i + 1]].tolist()


def test_label_texts_come_as_points(opened: Dataset) -> None:
    orders = epochs(opened, augment=0.5)
    points = set(opened.read_rows("train", 0, opened.manifest.num_points("train"))["point_id"]
                 .to_pylist())  # fmt: skip
    texts = opened.read_rows("labels", 0, opened.manifest.num_labels)["input_ids"].to_pylist()
    seen: list[list[int]] = [[], []]
    for batch in batches(opened, orders, 1)[0]:
        for i, point in enumerate(batch.points.tolist()):
            if point >= 0:
                continue
            label = -1 - point
            seen[batch.position.epoch].append(label)
            assert row_of(batch, "labels", i) == [label]
            assert row_of(batch, "filtered", i) == []
            assert (
                row_of(batch, "input_ids", i)[:-1]
                == texts[label][: MAX_LENGTH - 1][: len(row_of(batch, "input_ids", i)) - 1]
            )
    assert points
    parts = len(opened.manifest.splits["labels"])
    for labels in seen:
        assert len(labels) == len(set(labels))
        assert abs(len(labels) - opened.manifest.num_labels / 2) <= 64
    # Two halves of an even number of parts make the whole.
    missing = opened.manifest.num_labels - len({*seen[0], *seen[1]})
    assert missing <= (64 if parts % 2 else 0)


MEASURE = """
import json, resource, sys
from renee_ray.data.dataset import Dataset
from renee_ray.data.order import training_order
from renee_ray.service.cluster.connect import ensure_ray
from renee_ray.service.cluster.feed import feed
from renee_ray.rank.batch import Position

def pass_over(path):
    dataset = Dataset.open(path)
    parts = [part.rows for part in dataset.manifest.splits["train"]]
    order = training_order(parts, [], augment=0, seed=0, epoch=0, batch_size=1024, streams=4,
                           window=8)
    rows = sum(len(b) for b in feed(dataset, [order], 0, 1, start=Position(), max_length=12))
    return rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

ensure_ray(2)
pass_over(sys.argv[1])
print(json.dumps([pass_over(path) for path in sys.argv[1:]]))
"""


def test_memory_does_not_grow_with_rows(opened: Dataset, tmp_path: Path) -> None:
    """The same part 4 and 120 times; all rows at once would take 5 times the bound."""
    once = opened.read_rows("train", 0, opened.manifest.num_points("train"))
    part = pa.concat_tables([once] * 24)
    paths = [tile(opened, part, times, tmp_path / str(times)) for times in (4, 120)]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *paths], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (few, before), (many, after) = json.loads(done.stdout.splitlines()[-1])
    assert (few, many) == (4 * len(part), 120 * len(part))
    bound = 0.2 * part.nbytes * (120 - 4) / 2**20
    assert after - before < bound, f"{before} MiB grew to {after} MiB"


def tile(like: Dataset, part: pa.Table, times: int, path: Path) -> str:
    """A dataset whose train split is one part file under `times` names."""
    (path / "train").mkdir(parents=True)
    written = write_part(str(path), "train/part-00000.parquet", 0, part)
    parts = tuple(
        replace(written, path=f"train/part-{i:05d}.parquet", first=i * len(part))
        for i in range(times)
    )
    for other in parts[1:]:
        os.link(path / written.path, path / other.path)
    shutil.copytree(Path(like.path) / "labels", path / "labels")
    labels = like.manifest.splits["labels"]
    splits = {"train": parts, "validation": (), "test": (), "labels": labels}
    write_manifest(str(path), replace(like.manifest, splits=splits))
    return str(path)
