from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from renee_ray.data import dataset as layout
from renee_ray.data import split
from renee_ray.data.dataset import Dataset, DatasetError, Manifest, Part, writer
from renee_ray.data.split import Shuffle, splitmix64

from .tiny import make_splits

TRAIN = Part("train/part-00000.parquet", 3, 0, 100, "0" * 64)


def manifest(**splits: tuple[Part, ...]) -> Manifest:
    all_splits = {split: splits.get(split, ()) for split in layout.SPLITS}
    labels = all_splits["labels"]
    return Manifest(
        format_version=layout.FORMAT_VERSION,
        tokenizer="a/b",
        vocabulary_hash="00",
        max_length=128,
        pad_id=0,
        num_labels=sum(part.rows for part in labels),
        has_label_texts=True,
        propensity_a=0.55,
        propensity_b=1.5,
        splits=all_splits,
        other_texts=tuple(part.rows for part in labels),
        statistics={"train": {"tokens_max": 3}},
        labels_hash="0" * 64,
    )


def label_table(start: int, stop: int) -> pa.Table:
    ids = np.arange(start, stop)
    columns = {
        "label_id": ids,
        "text": [f"label {i}" for i in ids],
        "input_ids": [[int(i)] * int(i % 3) for i in ids],
        "train_count": ids * 2,
        "is_point": ids % 2 == 0,
    }
    return pa.table(columns, schema=layout.LABELS)


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """2,500 labels in parts of 2000 (two row groups), 0 and 500."""
    monkeypatch.setattr(writer, "ROW_GROUP_ROWS", 1024)
    path = str(tmp_path / "set")
    make_splits(path)
    parts = []
    for index, (start, stop) in enumerate([(0, 2000), (2000, 2000), (2000, 2500)]):
        relative = layout.part_path("labels", index)
        parts.append(layout.write_part(path, relative, start, label_table(start, stop)))
        assert parts[-1].rows == stop - start
    layout.write_manifest(path, manifest(labels=tuple(parts)))
    return Dataset.open(path)


@pytest.mark.parametrize(
    ("start", "stop"),
    [
        (0, 2500),
        (0, 0),
        (2500, 2500),
        (3, 5),
        (1023, 1025),
        (1999, 2001),
        (2000, 2500),
        (1500, 1500),
    ],
)
def test_rows_by_position(written: Dataset, start: int, stop: int) -> None:
    assert written.read_rows("labels", start, stop).equals(label_table(start, stop))
    ids = written.read_rows("labels", start, stop, ["label_id"])
    assert ids.column_names == ["label_id"]
    assert ids["label_id"].to_pylist() == list(range(start, stop))


def test_whole_part(written: Dataset) -> None:
    part = written.manifest.splits["labels"][2]
    assert written.read_part(part).equals(label_table(2000, 2500))
    assert written.read_part(part, ["text"])["text"][0].as_py() == "label 2000"


def test_rows_outside(written: Dataset) -> None:
    with pytest.raises(IndexError, match="2500"):
        written.read_rows("labels", 0, 2501)
    assert written.read_rows("train", 0, 0).schema == layout.POINTS


def test_pickles_with_its_filesystem_opened(written: Dataset) -> None:
    written.read_rows("labels", 0, 1)
    other = pickle.loads(pickle.dumps(written))
    assert other.manifest == written.manifest
    assert other.read_rows("labels", 7, 9).equals(label_table(7, 9))


def test_a_relative_path_is_the_same_elsewhere(
    written: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    relative = Dataset.open("set")
    monkeypatch.chdir("/")
    assert relative.read_rows("labels", 0, 3).num_rows == 3


def test_manifest_survives_its_json() -> None:
    before = manifest(train=(TRAIN,))
    assert Manifest.from_json(before.to_json(), "x") == before
    assert before.num_points("train") == 3 and before.num_points("test") == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 1}, "format version 1 and this renee_ray reads version 3; convert"),
        ({"format_version": None}, "format version None"),
        ({"max_length": "128"}, "max_length='128': input should be a valid integer; convert"),
        ({"max_length": True}, "max_length=True"),
        ({"tokenizer": None}, "tokenizer=None: input should be a valid string"),
        ({"num_labels": -1}, "num_labels=-1"),
        ({"other_texts": None}, "other_texts=None"),
        ({"other_texts": [3]}, r"other_texts=\[3\]"),
        (
            {"num_labels": 2**62},
            "num_labels=4611686018427387904: .* less than",
        ),
        ({"propensity_a": -1}, "propensity_a=-1: .* greater than 0"),
        ({"propensity_b": "1"}, "propensity_b='1': "),
        ({"has_label_texts": 1}, "has_label_texts=1: "),
        ({"labels_hash": "0"}, "labels_hash='0': "),
        ({"labels_hash": ""}, "labels_hash='': .*; convert the source again"),
        ({"num_labels": 5}, "num_labels=5 but 0 rows in its labels parts"),
        ({"splits": []}, r"splits=\[\]"),
        ({"splits": {}}, r"splits\.train=None"),
        ({"path": "/etc/part.parquet"}, "outside the dataset's directory, '/etc/part.parquet'"),
        ({"path": "train/../../x"}, "outside the dataset's directory, 'train/../../x'"),
        ({"path": "s3://bucket/x"}, "outside the dataset's directory"),
        ({"rows": -3}, r"splits\.train\.0\.rows=-3: "),
        ({"rows": 1.5}, r"splits\.train\.0\.rows=1\.5: "),
        ({"size": -1}, r"splits\.train\.0\.size=-1: "),
        ({"sha256": "../x"}, r"splits\.train\.0\.sha256='\.\./x': "),
        ({"first": 2}, "at row 2 instead of 0"),
    ],
)
def test_bad_manifests(change: dict[str, Any], message: str) -> None:
    raw = json.loads(manifest(train=(TRAIN,)).to_json())
    part = raw["splits"]["train"][0]
    for name, value in change.items():
        (part if name in part else raw)[name] = value
    with pytest.raises(DatasetError, match=message) as caught:
        Manifest.from_json(json.dumps(raw), "/d/dataset.json")
    assert str(caught.value).startswith("/d/dataset.json ")


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_a_manifest_that_is_no_object(text: str) -> None:
    with pytest.raises(DatasetError, match=r"^/d/dataset\.json (is not JSON|holds a)"):
        Manifest.from_json(text, "/d/dataset.json")


def test_no_dataset(tmp_path: Path) -> None:
    message = r"is not a renee_ray dataset: no dataset\.json; run `renee-ray convert SRC"
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DatasetError, match=message):
            Dataset.open(str(path))


def test_damaged_parts(written: Dataset) -> None:
    first, _, last = written.manifest.splits["labels"]
    Path(written.path, last.path).unlink()
    with pytest.raises(DatasetError, match=r"part-00002\.parquet cannot be read.*convert"):
        written.read_rows("labels", 2400, 2401)
    Path(written.path, last.path).write_bytes(b"PAR1")
    with pytest.raises(DatasetError, match=r"part-00002\.parquet cannot be read"):
        written.read_part(last)
    layout.write_part(written.path, first.path, 0, label_table(0, 10))
    with pytest.raises(DatasetError, match=r"has 10 rows and dataset\.json says 2000"):
        written.read_part(first)


def test_a_flipped_byte_is_noticed_where_it_is_read(written: Dataset) -> None:
    first = written.manifest.splits["labels"][0]
    flip(Path(written.path, first.path), 100)
    with pytest.raises(DatasetError, match=r"part-00000\.parquet cannot be read .*CRC"):
        written.read_part(first)


def test_other_texts_are_read_with_the_row_groups_that_have_them(written: Dataset) -> None:
    part = written.manifest.splits["labels"][0]
    file = Path(written.path, part.path)
    groups = pq.read_metadata(file)
    (ids,) = [i for i in range(groups.num_columns) if "input_ids" in groups.schema.column(i).path]
    flip(file, groups.row_group(1).column(ids).data_page_offset + 60)
    found = written.read_other_texts(part, 1000, 10, 20)
    assert found["label_id"].to_pylist() == list(range(21, 41, 2))
    with pytest.raises(DatasetError, match="cannot be read"):
        written.read_other_texts(part, 1000, 500, 520)


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_open_refuses_what_the_manifest_does_not_say(written: Dataset) -> None:
    last = Path(written.path, written.manifest.splits["labels"][2].path)
    content = last.read_bytes()
    Path(written.path, "labels/part-00000.parquet.tmp").write_bytes(b"a partial upload")
    assert Dataset.open(written.path).manifest == written.manifest

    last.write_bytes(content[:-1])
    with pytest.raises(DatasetError, match=rf"^{last} has \d+ bytes and dataset\.json says"):
        Dataset.open(written.path)
    last.unlink()
    with pytest.raises(DatasetError, match=rf"^{last} is missing and dataset\.json names it; rest"):
        Dataset.open(written.path)
    last.write_bytes(content)
    added = Path(written.path, "test/part-00007.parquet")
    added.parent.mkdir(exist_ok=True)
    added.write_bytes(content)
    with pytest.raises(DatasetError, match=rf"^{added} is there and dataset\.json does not name"):
        Dataset.open(written.path)


def test_any_fsspec_filesystem() -> None:
    path = "memory://bucket/set"
    make_splits(path)
    part = layout.write_part(path, layout.part_path("labels", 0), 0, label_table(0, 5))
    layout.write_manifest(path, manifest(labels=(part,)))
    assert Dataset.open(path).read_rows("labels", 1, 3).equals(label_table(1, 3))


def test_splitmix64_is_the_published_one() -> None:
    """First outputs of the reference generator from state 1234567."""
    step = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + i * step) % 2**64 for i in range(3)], dtype=np.uint64)
    assert splitmix64(states).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


def naive(
    num_rows: int, validation: float, seed: int, test: float = 0.0
) -> tuple[list[int], list[int], list[int]]:
    """(train in its order, validation, test), by sorting all rows."""
    made, rows = Shuffle(seed, (validation, test), np.zeros(0, np.uint64)), np.arange(num_rows)
    splits = made.splits(rows)
    train = sorted(rows[splits == 2].tolist(), key=lambda row: int(made.keys(np.array([row]))[0]))
    return train, np.flatnonzero(splits == 0).tolist(), np.flatnonzero(splits == 1).tolist()


def test_the_shuffle_is_one() -> None:
    train, validation, _ = naive(20_000, 0.1, seed=3)
    assert sorted([*train, *validation]) == list(range(20_000))
    assert abs(len(validation) - 2000) < 4 * np.sqrt(20_000 * 0.1 * 0.9)
    assert abs(np.corrcoef(np.arange(len(train)), train)[0, 1]) < 0.05
    assert train != naive(20_000, 0.1, seed=4)[0]
    assert [row for row in validation if row < 900] == naive(900, 0.1, seed=3)[1]
    assert naive(100, 0.0, seed=3)[1] == []
    more, same, test = naive(20_000, 0.1, seed=3, test=0.2)
    assert same == validation and more == [row for row in train if row not in set(test)]
    assert abs(len(test) - 4000) < 4 * np.sqrt(20_000 * 0.2 * 0.8)


@pytest.mark.parametrize("bucket_rows", [1, 7, 100, 897, 2000])
@pytest.mark.parametrize("chunk_rows", [64, 1 << 18])
def test_buckets_are_cut_from_the_order(
    monkeypatch: pytest.MonkeyPatch, bucket_rows: int, chunk_rows: int
) -> None:
    """Though nobody sorts all rows; starts lie at and between the bounds of chunks."""
    monkeypatch.setattr(split, "CHUNK_ROWS", chunk_rows)
    monkeypatch.setattr(split, "BIN_BITS", 6)
    rows, starts = np.arange(1000), np.array([0, 1, 63, 64, 65, 500, 999])
    made, held = split.shuffle_of(1000, starts, bucket_rows, (0.1, 0.2), seed=3)
    train, *out = naive(1000, 0.1, seed=3, test=0.2)
    wanted = [[sum(row < start for row in rows) for rows in out] for start in [*starts, 1000]]
    assert held.tolist() == wanted
    buckets = made.buckets(made.keys(rows))
    for bucket in range(-(-len(train) // bucket_rows)):
        mine = rows[(buckets == bucket) & ~made.held_out(rows)]
        ours = train[bucket * bucket_rows : (bucket + 1) * bucket_rows]
        assert mine[np.argsort(made.keys(mine))].tolist() == ours
