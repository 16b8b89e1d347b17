"""What is read of a Parquet source before any row is, and of damaged files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from renee_ray.data.sources.columns import common_kind, kind_of
from renee_ray.data.sources.parquet import index_parquet, table_of
from renee_ray.data.sources.records import SourceError, num_rows
from renee_ray.service.cluster.tasks import _attempt

from .sources import rows


@pytest.mark.parametrize(
    ("first", "second", "common"),
    [
        ("string", "string", "string"),
        ("nothing", "list of string", "list of string"),
        ("nothing", "list of nothing", "list of nothing"),
        ("list of nothing", "list of integer", "list of integer"),
        ("list of nothing", "string", None),
        ("list of integer", "list of number", "list of number"),
        ("list of integer", "list of string", None),
        ("string", "list of string", None),
    ],
)
def test_common_kinds(first: str, second: str, common: str | None) -> None:
    assert common_kind(first, second) == common_kind(second, first) == common


def test_kinds_of_types() -> None:
    string = pa.dictionary(pa.int8(), pa.string_view())
    assert kind_of(string) == "string" and kind_of(pa.list_view(string)) == "list of string"
    assert (
        kind_of(pa.bool8()) == "integer" and kind_of(pa.list_(pa.float16(), 3)) == "list of number"
    )
    for other in (pa.list_(pa.list_(pa.int8())), pa.struct([]), pa.decimal128(5), pa.date32()):
        assert kind_of(other) == ""


def test_a_damaged_page_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    pq.write_table(rows(), path, compression="zstd", use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[60:90] = bytes(30)
    path.write_bytes(data)
    origins = {str(path): ("/src/a.csv", ": row ", 7)}
    train = index_parquet(str(tmp_path), origins=origins).train
    with pytest.raises(SourceError, match=r"^/src/a\.csv: row 7 and below cannot be read"):
        next(train.read(train.blocks[0], ["text"]))
    train = index_parquet(str(tmp_path)).train
    with pytest.raises(SourceError, match=r"train\.parquet cannot be read .* in row group 0"):
        next(train.read(train.blocks[0], ["text"]))


def test_any_error_in_a_task_comes_out_as_a_sentence() -> None:
    """It is no interruption: the same command would fail again, so nothing is kept for it."""

    def work(plan: Any, i: int) -> dict[str, Any]:
        raise UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "unexpected end of data")

    result = json.loads(_attempt(work, None, 0, None))
    assert result["interrupted"] is False
    assert "UnicodeDecodeError" in result["error"] and "unexpected end" in result["error"]


def test_what_nobody_reads_refuses_nothing(tmp_path: Path) -> None:
    """A column of another kind, and files of a validation split, however many are there."""
    vectors = pa.array(
        [{"vec": [1.0, 2.0]}] * len(rows()), pa.struct({"vec": pa.list_(pa.float32(), 2)})
    )
    pq.write_table(rows().append_column("meta", vectors), tmp_path / "train.parquet")
    pq.write_table(rows(), tmp_path / "validation-00000-of-00002.parquet")
    pq.write_table(rows(), tmp_path / "validation.parquet")
    source = index_parquet(str(tmp_path))
    assert len(next(source.train.read(source.train.blocks[0], ["text"]))) == len(rows())
    assert "is not read" in source.notes[0]


def test_directories_that_stand_for_columns_are_told_of(tmp_path: Path) -> None:
    (tmp_path / "train" / "lang=de").mkdir(parents=True)
    pq.write_table(rows(), tmp_path / "train" / "lang=de" / "a=b.parquet")
    (note,) = index_parquet(str(tmp_path)).notes
    assert "lang=de" in note and "not read" in note


def test_texts_to_predict_for_have_no_class_names(tmp_path: Path) -> None:
    paths = []
    for name, content in (("a", b"{"), ("b", b'{"info": {"features": {}}}')):
        paths.append(str(tmp_path / f"{name}.parquet"))
        table = rows().select(["text"]).replace_schema_metadata({b"huggingface": content})
        pq.write_table(table, paths[-1])
    assert num_rows(table_of(paths, ("text",), ("point_id",))) == 2 * len(rows())
