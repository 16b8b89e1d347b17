"""Sizes of parts, and hints on a source."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from renee_ray.config.schema import ConvertConfig
from renee_ray.service.convert.conversion import bucket_rows, part_rows
from renee_ray.service.convert.convert import hints

from ..data.test_dataset import manifest


@pytest.mark.parametrize(
    ("chosen", "rows", "size"),
    [
        (0, 1, 2048),
        (0, 2_000_000, 2048),
        (0, 100_000_000, 131_072),
        (0, 120_000_000, 131_072),
        (0, 10**9, 524_288),
        (64, 100_000_000, 64),
        (1_000_000, 100, 1_000_000),
    ],
)
def test_parts_are_few_and_divide_a_bucket(chosen: int, rows: int, size: int) -> None:
    bucket = bucket_rows(chosen)
    found = part_rows(chosen, rows, bucket)
    assert found == size and bucket % found == 0
    assert chosen or -(-rows // found) <= 2048


@pytest.mark.parametrize(
    ("least", "greatest", "unused", "texts", "hinted"),
    [
        (1, 4, 0.2, False, True),
        (0, 4, 0.0, False, False),
        (1, 3, 0.2, False, False),  # a label more than there are points: the header says so
        (1, 4, 0.8, False, False),
        (1, 4, 0.2, True, False),
    ],
)
def test_labels_that_count_from_one(
    least: int, greatest: int, unused: float, texts: bool, hinted: bool
) -> None:
    labels: dict[str, Any] = {"least_id": least, "greatest_id": greatest}
    labels["share_of_labels_by_train_count"] = {"0": unused}
    made = replace(manifest(), num_labels=5, has_label_texts=texts, statistics={"labels": labels})
    found = hints(made, ConvertConfig())
    assert bool(found) is hinted
    if hinted:
        assert "label 0" in found[0] and "subtract 1" in found[0]
    assert not hints(made, ConvertConfig(labels="multi-hot")), "places, not ids"
