"""The random dataset that benchmarks train on is one that a run takes."""

from __future__ import annotations

from pathlib import Path

from renee_ray.benchmarks.sample import MOST_LABELS, VOCABULARY, write_sample
from renee_ray.config.overrides import make_config
from renee_ray.config.schema import RunConfig
from renee_ray.data.dataset import Dataset
from renee_ray.service.train.train import check

LABELS, POINTS = 20_000, 40_000


def test_a_run_takes_a_sample(tmp_path: Path) -> None:
    write_sample(str(tmp_path), LABELS, POINTS, 16, 1)
    dataset = Dataset.open(f"{tmp_path}/data")
    own = {"data": "unused", "output": "unused", "encoder": {"name": f"{tmp_path}/encoder"}}
    check(make_config(RunConfig, own), dataset)
    assert dataset.manifest.num_points("train") == POINTS
    assert dataset.manifest.num_labels == LABELS and len(dataset.manifest.splits["train"]) > 1
    rows = dataset.read_rows("train", 0, POINTS)
    lengths, seen = set(), set()
    for labels, tokens in zip(rows["labels"].to_pylist(), rows["input_ids"], strict=True):
        assert labels == sorted(set(labels)) and 1 <= len(labels) <= MOST_LABELS
        lengths.add(len(labels))
        seen.update(labels)
        assert 5 <= len(tokens) <= 18
    assert lengths == set(range(1, MOST_LABELS + 1)) and len(seen) > 0.9 * LABELS
    assert max(rows["input_ids"].combine_chunks().flatten().to_pylist()) < VOCABULARY
