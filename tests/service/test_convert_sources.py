"""Sources of every kind: read to the same dataset, or refused with a sentence and nothing left."""

from __future__ import annotations

from pathlib import Path

import pytest

from renee_ray.config.schema import ConvertConfig
from renee_ray.data import tokenizer
from renee_ray.data.dataset import Dataset
from renee_ray.data.inspection import inspect
from renee_ray.data.sources import lines, row_groups
from renee_ray.errors import ReneeError
from renee_ray.service.convert import convert as service
from renee_ray.service.convert import own_data

from ..data import sources
from ..data.own import OWN
from ..data.own_refused import OWN_REFUSED
from ..data.sources import WORDS, Kind, write_tokenizer
from .test_convert_parquet import in_this_process

__all__ = ["in_this_process"]
KINDS = sources.KINDS | OWN
REFUSED = sources.REFUSED | OWN_REFUSED


def convert(kind: Kind, path: Path, source: str = "src") -> Dataset:
    kind.write(path / "src")
    fixed = {"tokenizer": write_tokenizer(path / "model", WORDS), "max_length": 16}
    fixed |= {"validation": 0, "test": 0}
    config = ConvertConfig.model_validate({**fixed, **kind.settings})
    service.convert(str(path / source), str(path / "dst"), config)
    return Dataset.open(str(path / "dst"))


def check(kind: Kind, made: Dataset) -> None:
    """Texts, labels and label texts are those that the kind says."""
    points = made.read_rows("train", 0, len(kind.labels)).sort_by("point_id")
    vocabulary = tokenizer.load(made.manifest.tokenizer).serialised
    assert made.manifest.num_points("train") == len(kind.labels)
    assert points["labels"].to_pylist() == kind.labels
    wanted = tokenizer.encode(vocabulary, kind.texts, 16)
    assert points["input_ids"].to_pylist() == wanted.to_pylist()
    labels = made.read_rows("labels", 0, made.manifest.num_labels)
    number = max(max(row, default=0) for row in kind.labels) + 1
    assert labels["text"].to_pylist() == (kind.names or [""] * number)
    assert made.manifest.has_label_texts == bool(kind.names and any(kind.names))


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("name", KINDS)
def test_kinds_that_are_read(tmp_path: Path, name: str) -> None:
    check(KINDS[name], convert(KINDS[name], tmp_path))


def refuse(kind: Kind, sentence: str, path: Path) -> None:
    with pytest.raises(ReneeError, match=sentence) as caught:
        convert(kind, path)
    text = str(caught.value)
    assert "\n" not in text and "DataType" not in text and len(text) < 600
    assert not (path / "dst" / "_scratch").exists() and not list(path.glob("dst/**/*.*"))


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("name", REFUSED)
def test_kinds_that_are_refused(tmp_path: Path, name: str) -> None:
    refuse(*REFUSED[name], tmp_path)


@pytest.mark.usefixtures("in_this_process")
def test_what_was_odd_is_counted_and_what_is_not_read_is_said(tmp_path: Path) -> None:
    made = convert(KINDS["not-utf8"], tmp_path)
    counts = made.manifest.statistics["train"]
    assert (counts["replaced_lines"], counts["replaced_bytes"], counts["empty_texts"]) == (1, 1, 0)
    null = convert(KINDS["null-text"], tmp_path / "null").manifest.statistics["train"]
    assert (null["empty_texts"], null["without_labels"]) == (1, 0)
    none = convert(KINDS["null-rows"], tmp_path / "none").manifest.statistics["train"]
    assert (none["without_labels"], none["filter_pairs"]) == (1, 1)
    KINDS["hub"].write(tmp_path / "hub")
    said: list[str] = []
    config = ConvertConfig(tokenizer=made.manifest.tokenizer, validation=0, test=0)
    service.convert(str(tmp_path / "hub"), str(tmp_path / "d"), config, said.append)
    assert any("validation-00000-of-00001.parquet is not read" in text for text in said)


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize(
    ("name", "file"), [("csv-pairs", "train.csv"), ("parquet-dictionary", "train.parquet")]
)
def test_a_source_may_be_a_single_file(tmp_path: Path, name: str, file: str) -> None:
    check(KINDS[name], convert(KINDS[name], tmp_path, f"src/{file}"))


@pytest.mark.usefixtures("in_this_process")
def test_a_test_split_is_held_out_where_there_is_none(tmp_path: Path) -> None:
    """Every row is in one split; labels are counted without the test split's."""
    rows = [f"w{i},{'|'.join({f'L{i % 7}', f'L{i % 3}'})}" for i in range(400)]
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "mine.csv").write_text("title,tags\n" + "\n".join(rows))
    words = [f"w{i}" for i in range(400)]
    model, said = write_tokenizer(tmp_path / "model", words), list[str]()
    config = ConvertConfig(tokenizer=model, validation=0.2, part_rows=16)
    service.convert(str(tmp_path / "src"), str(tmp_path / "dst"), config, said.append)
    made = Dataset.open(str(tmp_path / "dst"))
    assert not inspect(made, verify=True).get("problems")
    points = {
        split: made.read_rows(split, 0, made.manifest.num_points(split)).to_pylist()
        for split in ("train", "validation", "test")
    }
    ids = sorted(row["point_id"] for rows in points.values() for row in rows)
    assert ids == list(range(400)) and 20 <= len(points["test"]) <= 60 < len(points["validation"])
    counts = [0] * 7
    for row in [*points["train"], *points["validation"]]:
        for label in row["labels"]:
            counts[label] += 1
    labels = made.read_rows("labels", 0, 7)
    assert labels["train_count"].to_pylist() == counts and labels["text"][6].as_py() == "L6"
    note = "took title as text, tags, separated by '|', as labels: 1.8"
    read = next(i for i, each in enumerate(said) if "files read" in each)
    assert any(note in each for each in said[:read])
    assert any("test=0.1 of the points" in each for each in said)


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize(
    "files",
    [
        {"tst_X.txt": b"", "tst_X_Y.txt": b"0 4\n"},
        {"tst_X.txt": b"", "tst_X_Y.txt": b"", "tst_filter_labels.txt": b""},
    ],
)
def test_an_empty_test_split_of_text_files(tmp_path: Path, files: dict[str, bytes]) -> None:
    made = convert(Kind(sources.files(**sources.TEXT | files)), tmp_path)
    points = [made.manifest.num_points(split) for split in ("train", "validation", "test")]
    assert points == [len(sources.TEXTS), 0, 0]


@pytest.mark.usefixtures("in_this_process")
def test_a_bad_row_of_own_data_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second row group of the second piece, too."""
    for module in (row_groups, own_data):
        monkeypatch.setattr(module, "SLICE_ROWS", 2)
    monkeypatch.setattr(lines, "PIECE_ROWS", 5)
    rows = [f'{{"text": "a", "labels": [{0 if row != 8 else -1}]}}\n' for row in range(10)]
    write = sources.files(**{"train.jsonl": "".join(rows).encode()})
    refuse(Kind(write), r"train\.jsonl: row 8 has -1 in labels", tmp_path)


@pytest.mark.usefixtures("in_this_process")
def test_each_row_without_a_text_is_counted(tmp_path: Path) -> None:
    counts = convert(KINDS["csv-pairs-without-text"], tmp_path).manifest.statistics["train"]
    assert (counts["points"], counts["empty_texts"]) == (4, 3)
