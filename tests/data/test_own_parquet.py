"""Own data in Parquet: what is read of a large file, and in which pieces."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from renee_ray.data import untrusted
from renee_ray.data.sources import own
from renee_ray.data.sources.own import read_own
from renee_ray.data.sources.records import SourceError

ROWS = 40


def written(path: Path, **columns: pa.Array) -> dict[str, list[str]]:
    made = {"title": [f"text {i}" for i in range(ROWS)], "tags": [[i] for i in range(ROWS)]}
    pq.write_table(pa.table(made | columns), path, row_group_size=30)
    return {"train": [str(path)]}


@pytest.mark.parametrize("text", ["title", ""])
def test_a_large_column_that_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """A row group with its vectors is above the limit, and its texts and labels are not."""
    monkeypatch.setattr(untrusted, "MAX_LIMIT", 1 << 16)
    vectors = pa.array([[0.5] * 1000] * ROWS, pa.list_(pa.float32()))
    found = read_own(written(tmp_path / "a.parquet", vector=vectors), text, "tags", "")
    assert found.fields is not None and found.fields.text == ("title",)
    pieces = list(found.pieces("train", found.splits["train"]))
    assert [piece.number for piece in pieces] == [0, 30]
    assert pieces[1].table["text"].to_pylist()[-1] == b"text 39"


def test_a_row_group_is_read_in_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = read_own(written(tmp_path / "a.parquet"), "title", "tags", "")
    for name, value, sizes in (("SLICE_ROWS", 20, [20, 10, 10]), ("SLICE_BYTES", 300, None)):
        with monkeypatch.context() as patch:
            patch.setattr(own, name, value)
            pieces = list(found.pieces("train", found.splits["train"]))
        texts = [text for piece in pieces for text in piece.table["text"].to_pylist()]
        assert texts == [b"text %d" % i for i in range(ROWS)]
        assert len(pieces) > 3 if sizes is None else [len(p.table) for p in pieces] == sizes


def test_the_first_rows_of_types_that_are_not_read(tmp_path: Path) -> None:
    """They are null in the sample, and an error still names all columns."""
    other = {
        "fixed": pa.array([[1.0, 2.0]] * ROWS, pa.list_(pa.float64(), 2)),
        "category": pa.array(["a"] * ROWS).dictionary_encode(),
        "nested": pa.array([{"a": {"b": 1}}] * ROWS),
    }
    splits = written(tmp_path / "a.parquet", **other)
    assert read_own(splits, "title", "tags", "").notes[0].endswith("of the first 40")
    with pytest.raises(SourceError, match=r"no column 'x'; it has .*'fixed', .*'nested\.a\.b'"):
        read_own(splits, "x", "tags", "")
