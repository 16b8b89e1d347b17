"""Texts to predict for: from every kind of file, each with its id."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from renee_ray.data import tokenizer
from renee_ray.data.dataset import Dataset
from renee_ray.errors import ReneeError
from renee_ray.service.score import texts as service

from ..data.sources import KINDS, LATIN, READABLE, TEXTS, files, hub, not_utf8, rows
from .test_convert_parquet import in_this_process, shuffled
from .test_convert_sources import convert

__all__ = ["in_this_process"]
Write = Callable[[Path], object]


@pytest.fixture
def like(tmp_path: Path, in_this_process: None, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    monkeypatch.setattr(service, "stream", shuffled)
    return convert(KINDS["two-widths"], tmp_path / "like")


def with_ids(ids: pa.Array | list[int]) -> Write:
    return files(a=pa.table({"text": TEXTS[: len(ids)], "point_id": ids}))


def lines(data: bytes) -> Write:
    return files(**{"a.txt": data})


BYTES = pa.table({"text": not_utf8(LATIN)})
FOUND: dict[str, tuple[Write, list[str], list[int]]] = {
    "spark": (KINDS["spark"].write, TEXTS, [*range(6)]),
    "hive": (KINDS["hive"].write, TEXTS * 2, [*range(12)]),
    "hub": (hub("test-00000-of-00001"), TEXTS, [*range(6)]),
    "appledouble": (KINDS["appledouble"].write, TEXTS, [*range(6)]),
    "two-widths": (files(a=rows(), b=rows(pa.large_string())), TEXTS * 2, [*range(12)]),
    "view": (files(a=rows(pa.string_view())), TEXTS, [*range(6)]),
    "bytes": (files(a=BYTES), READABLE, [*range(6)]),
    "null": (files(a=pa.table({"text": ["a", None]})), ["a", ""], [0, 1]),
    "tokens-too": (files(a=rows(input_ids=[[1]] * 6)), TEXTS, [*range(6)]),
    "int32": (with_ids(pa.array([7, -3, 7], pa.int32())), TEXTS[:3], [7, -3, 7]),
    "uint64": (with_ids(pa.array([2**63 - 1, 0], pa.uint64())), TEXTS[:2], [2**63 - 1, 0]),
    "dictionary": (with_ids(pa.array([5, 4]).dictionary_encode()), TEXTS[:2], [5, 4]),
    "blank-lines": (lines(b"red lamp\n\nblue chair\n\n"), ["red lamp", "", "blue chair", ""],
                    [0, 1, 2, 3]),
    "named-as-pecos": (files(**{"X.tst.txt": b"red lamp\n"}), ["red lamp"], [0]),
    "return-in-line": (lines(b"red\rlamp\r\nblue chair\r\n"), ["red\rlamp", "blue chair"], [0, 1]),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_texts_and_their_ids(tmp_path: Path, like: Dataset, name: str) -> None:
    write, texts, ids = FOUND[name]
    write(tmp_path / "src")
    source = next((tmp_path / "src").glob("*.txt"), tmp_path / "src")
    made, replaced = service.tokenise_texts(str(source), str(tmp_path / "scratch"), like)
    points = made.read_rows("test", 0, len(ids))
    vocabulary = tokenizer.load(like.manifest.tokenizer).serialised
    assert points["point_id"].to_pylist() == ids
    wanted = tokenizer.encode(vocabulary, texts, 16).to_pylist()
    assert points["input_ids"].to_pylist() == wanted
    assert replaced == (1 if name == "bytes" else 0)


REFUSED = {
    "string-ids": (with_ids(pa.array(["a"])), r"'point_id' of type string.*leave it out"),
    "float-ids": (with_ids(pa.array([0.5])), r"'point_id' of type double.*leave it out"),
    "null-id": (with_ids(pa.array([1, None])), r"a\.parquet: row 1 .* has no point_id"),
    "beyond": (with_ids(pa.array([1, 2**63], pa.uint64())), "row 1 .* has 9223372036854775808"),
    "no-texts": (files(a=pa.table({"title": ["a"]})), r"the columns \['title'\]"),
    "returns": (lines(b"a\rb\rc\n"), "1 line feeds and 2 carriage returns"),
    "empty": (lambda path: path.mkdir(), "neither a dataset directory nor texts"),
    "hidden": (files(**{"_a": rows()}), "neither a dataset directory nor texts"),
    "nothing": (lambda path: None, "does not exist"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_texts_that_are_refused(tmp_path: Path, like: Dataset, name: str) -> None:
    write, sentence = REFUSED[name]
    write(tmp_path / "src")
    source = tmp_path / "src" / ("a.txt" if name == "returns" else "")
    with pytest.raises(ReneeError, match=sentence) as caught:
        service.tokenise_texts(str(source), str(tmp_path / "scratch"), like)
    assert "DataType" not in str(caught.value)


def test_returns_in_lines_are_said(
    tmp_path: Path, like: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.txt").write_bytes(b"red\rlamp\nblue chair\n")
    service.tokenise_texts(str(tmp_path / "a.txt"), str(tmp_path / "scratch"), like)
    assert "1 carriage returns end no line" in caplog.text
