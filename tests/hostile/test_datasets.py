"""Hostile datasets: the manifest and the parts."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from renee_ray.data import dataset as layout
from renee_ray.errors import ReneeError

from .parts import column, first_part, parquet, replaced, tiny
from .place import Canary, Case, Made, Place, refused


def manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Place], Made]:
    """A dataset whose manifest `change` has changed, to be inspected."""

    def make(place: Place) -> Made:
        path = tiny(place)
        raw = json.loads((path / layout.MANIFEST).read_text())
        change(raw)
        (path / layout.MANIFEST).write_text(json.dumps(raw))
        return ["inspect", str(path)]

    return make


def part(**values: Any) -> Callable[[Place], Made]:
    return manifest(lambda raw: raw["splits"]["train"][0].update(values))


def top(**values: Any) -> Callable[[Place], Made]:
    return manifest(lambda raw: raw.update(values))


def text(content: str) -> Callable[[Place], Made]:
    """A dataset whose manifest is `content`."""

    def make(place: Place) -> Made:
        (tiny(place) / layout.MANIFEST).write_text(content)
        return ["inspect", str(place.given / "set")]

    return make


def more_rows(rows: int) -> Callable[[dict[str, Any]], None]:
    """Says so many rows of the last part of labels."""

    def change(raw: dict[str, Any]) -> None:
        labels = raw["splits"]["labels"]
        labels[-1]["rows"] = rows
        raw["num_labels"] = labels[-1]["first"] + rows

    return change


def pipe(place: Place) -> Made:
    path = tiny(place) / layout.MANIFEST
    path.unlink()
    os.mkfifo(path)
    return ["inspect", str(place.given / "set")]


TRAIN = "train/part-00000.parquet"
DATASETS = [
    Case("part-outside", part(path="train/../../../outside/x.parquet"), "outside the dataset"),
    Case("part-absolute", part(path="/etc/passwd"), "outside the dataset"),
    Case("part-url", part(path="s3://bucket/part-00000.parquet"), "outside the dataset"),
    Case("part-file-url", part(path="file:///etc/passwd"), "outside the dataset"),
    Case("part-unprintable", part(path="train/part-0\0\n\x1b[2J.parquet"), "outside the dataset"),
    Case("part-of-another-split", part(path="test/part-00000.parquet"), "or not named train/part"),
    Case(
        "part-twice",
        manifest(lambda raw: raw["splits"]["train"][2].update(path=TRAIN)),
        f"has the part {TRAIN} twice",
    ),
    Case("manifest-nested", text("[" * 10**6), "is not JSON .nested too deeply"),
    Case("manifest-many-digits", text('{"a": ' + "9" * 10**5 + "}"), "is not JSON"),
    Case("count-huge", part(rows=10**30), r"splits\.train\.0\.rows=1000"),
    Case("count-negative", part(rows=-1), r"splits\.train\.0\.rows=-1: "),
    Case("count-float", part(rows=6.0), r"splits\.train\.0\.rows=6\.0: "),
    Case("count-boolean", part(first=False), r"splits\.train\.0\.first=False: "),
    Case("labels-huge", top(num_labels=2**62), "num_labels=4611686018427387904: input "),
    Case("rows-that-lie", manifest(more_rows(5)), "has 4 rows and dataset.json says 5"),
    Case("length-huge", top(max_length=10**12), "max_length=1000000000000: input should be less"),
    Case("padding-negative", top(pad_id=-5), "pad_id=-5: input should be greater"),
    Case("propensity-negative", top(propensity_a=-1.0), "propensity_a=-1.0: input should "),
    Case("value-long", top(num_labels="9" * 10**6), "num_labels='9+: input should be"),
    Case("manifest-pipe", pipe, "is not a renee_ray dataset"),
]


def rewritten(
    split: str, change: Callable[[pa.Table], pa.Table], **options: Any
) -> Callable[..., Made]:
    """A dataset with a first part that `change` has changed, to be read."""

    def make(place: Place) -> Made:
        path = tiny(place)
        dataset = replaced(path, split, parquet(change(first_part(path, split)), **options))
        return lambda: dataset.read_part(dataset.manifest.splits[split][0])

    return make


def zeros(table: pa.Table) -> pa.Table:
    """30 million tokens a row."""
    size = 6 * 10**6
    offsets = pa.array(np.arange(7, dtype=np.int32) * size)
    lists = pa.ListArray.from_arrays(offsets, pa.array(np.zeros(6 * size, np.int32)))
    return column("input_ids", lists)(table)


def footer_lies(place: Place) -> Made:
    path = tiny(place)
    content = bytearray((path / TRAIN).read_bytes())
    content[-8:-4] = b"\xff\xff\xff\x7f"
    dataset = replaced(path, "train", bytes(content))
    return lambda: dataset.read_part(dataset.manifest.splits["train"][0])


def twice(table: pa.Table) -> pa.Table:
    return table.append_column("labels", table["labels"])


PARTS = [
    Case("part-of-zeros", rewritten("train", zeros), "would decode to"),
    Case(
        "part-other-type",
        rewritten("train", column("labels", ["a"] * 6)),
        "has string as column 'labels'",
    ),
    Case("part-column-twice", rewritten("train", twice), "list.* and list.* as column 'labels'"),
    Case(
        "part-column-missing",
        rewritten("train", lambda t: t.drop_columns(["labels"])),
        "nothing as column 'labels'",
    ),
    Case(
        "part-nulls",
        rewritten("train", column("labels", [[None]] * 6, pa.list_(pa.int64()))),
        "nulls in labels",
    ),
    Case(
        "label-beyond",
        rewritten("train", column("labels", [[11]] * 6, pa.list_(pa.int64()))),
        r"11 in labels, which is not in \[0, 11\)",
    ),
    Case(
        "label-negative",
        rewritten("train", column("filter_labels", [[-1]] * 6, pa.list_(pa.int64()))),
        "-1 in filter_labels",
    ),
    Case(
        "token-negative",
        rewritten("train", column("input_ids", [[-7]] * 6, pa.list_(pa.int32()))),
        "-7 in input_ids",
    ),
    Case(
        "label-ids-disordered",
        rewritten("labels", column("label_id", [0, 2, 1, 3, 4, 5, 6])),
        "not in the order of their ids",
    ),
    Case("footer-that-lies", footer_lies, "cannot be read"),
]


def test_pickled_extension_type(place: Place) -> None:
    """pyarrow once unpickled a column type of this name; it is read as what it is stored as."""
    path = tiny(place)
    table = first_part(path, "train")
    field = table.schema.field("point_id").with_metadata(
        {
            "ARROW:extension:name": "arrow.py_extension_type",
            "ARROW:extension:metadata": pickle.dumps(Canary(place.command())),
        }
    )
    content = parquet(table.cast(table.schema.set(0, field)))
    dataset = replaced(path, "train", content)
    read = dataset.read_part(dataset.manifest.splits["train"][0])
    assert read["point_id"].to_pylist() == table["point_id"].to_pylist()


def test_flipped_bytes(place: Place) -> None:
    """Whatever bytes of a part without checksums are flipped, it reads or is refused."""
    path = tiny(place)
    whole = parquet(first_part(path, "train"))
    rng, outcomes = np.random.default_rng(0), set()
    for _ in range(150):
        content = bytearray(whole)
        for at in rng.integers(0, len(content), 3):
            content[at] ^= 1 << rng.integers(8)
        dataset = replaced(path, "train", bytes(content))
        try:
            dataset.read_part(dataset.manifest.splits["train"][0])
            outcomes.add("read")
        except ReneeError as error:
            assert "\n" not in str(error)
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


CASES = [*DATASETS, *PARTS]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused(case: Case, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    refused(case, place, capsys)
