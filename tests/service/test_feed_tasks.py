"""What the tasks that read for a worker carry."""

from __future__ import annotations

import hashlib

from ray import cloudpickle

from renee_ray.data.dataset import FORMAT_VERSION, Dataset, Manifest, Part, part_path
from renee_ray.data.order import OTHER_TEXTS, training_order
from renee_ray.data.rows import Window
from renee_ray.rank.batch import Position
from renee_ray.service.cluster.feed import reading


def test_a_task_carries_its_window_and_not_the_dataset() -> None:
    """49,000 parts, and label texts as points: their manifest has 6 MB."""
    parts, labels = many_parts("train", 49_000), many_parts("labels", 1000)
    manifest = Manifest(
        FORMAT_VERSION, "t", "h", 32, 0, 2048 * len(labels), True, 0.5, 0.5,
        {"train": parts, "validation": (), "test": (), "labels": labels}, (1024,) * len(labels), {},
        "0" * 64,
    )  # fmt: skip
    order = training_order(
        [part.rows for part in parts], list(manifest.other_texts), augment=0.5, texts=OTHER_TEXTS,
        seed=0, epoch=1, batch_size=1024, streams=8, window=64,
    )  # fmt: skip
    windows = [
        Window.of(Dataset("/data", manifest), order, order.slots_of(0, 2), number)
        for number in (5, 6)
    ]
    assert sum(len(pieces) for window in windows for pieces in window.pieces.values()) > 20
    assert len(cloudpickle.dumps(reading(windows, Position(1, 3)))) < 30_000
    assert len(cloudpickle.dumps(manifest)) > 5_000_000


def many_parts(split: str, count: int) -> tuple[Part, ...]:
    names = (part_path(split, number) for number in range(count))
    return tuple(
        Part(name, 2048, 2048 * number, 400_000, hashlib.sha256(name.encode()).hexdigest())
        for number, name in enumerate(names)
    )
