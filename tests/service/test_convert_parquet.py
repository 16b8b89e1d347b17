"""Parquet sources: the same dataset as from text files, whatever the labels are written as."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from renee_ray.config.schema import ConvertConfig
from renee_ray.data.dataset import Dataset
from renee_ray.data.sources import lines
from renee_ray.errors import ReneeError
from renee_ray.service.cluster.tasks import Interrupted, attempt
from renee_ray.service.convert import conversion
from renee_ray.service.convert import convert as service

from ..data.sources import write_tokenizer

WORDS = [f"w{i}" for i in range(300)]
Rows = dict[str, list[Any]]


def shuffled(
    work: Callable[..., Any], plan: Any, tasks: int, journal: str | None = None
) -> Iterator[Any]:
    """The tasks one after another instead of on Ray, in an order that no one may rely on."""
    for i in np.random.default_rng(0).permutation(tasks):
        yield json.loads(attempt(work, plan, int(i), journal))


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "stream", shuffled)
    monkeypatch.setattr(service, "ensure_ray", lambda *arguments, **settings: None)


def rows_of(source: Path, prefix: str) -> Rows:
    """Columns of a split of a repository folder."""
    texts = (source / f"{prefix}_X.txt").read_text().splitlines()
    lines = (source / f"{prefix}_X_Y.txt").read_text().splitlines()[1:]
    filters: list[list[int]] = [[] for _ in texts]
    for line in (source / f"{prefix}_filter_labels.txt").read_text().splitlines():
        row, label = map(int, line.split())
        filters[row].append(label)
    labels = [[int(pair.partition(":")[0]) for pair in line.split()] for line in lines]
    return {"text": texts, "labels": labels, "filter_labels": filters}


def write(folder: Path, name: str, columns: Rows, *, strings: bool, group: int = 90) -> None:
    kind = pa.string() if strings else pa.int64()
    made = {
        key: pa.array(
            [[f"L{i:05d}" for i in row] for row in values] if strings else values, pa.list_(kind)
        )
        if "labels" in key
        else pa.array(values)
        for key, values in columns.items()
    }
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(made), path, row_group_size=group)


def parquet(source: Path, folder: Path, *, strings: bool, with_labels: bool = True) -> Path:
    """The repository folder as Parquet; train as two files."""
    train = rows_of(source, "trn")
    cut = len(train["text"]) // 3
    for i, piece in enumerate((slice(0, cut), slice(cut, None))):
        columns = {key: values[piece] for key, values in train.items()}
        write(folder, f"train/{i}.parquet", columns, strings=strings)
    write(folder, "test.parquet", rows_of(source, "tst"), strings=strings)
    if with_labels:
        texts = (source / "Y.txt").read_text().splitlines()
        table = {"text": texts}
        if strings:
            table["label"] = [f"L{i:05d}" for i in range(len(texts))]
        pq.write_table(pa.table(table), folder / "labels.parquet", row_group_size=500)
    return folder


def config_at(folder: Path, **changes: Any) -> ConvertConfig:
    """A configuration whose tokenizer is written to `folder`."""
    fixed = {"tokenizer": write_tokenizer(folder, WORDS), "validation": 0.1, "part_rows": 64}
    return ConvertConfig(**{**fixed, **changes})


def convert(source: Path, destination: Path, say: Callable[[str], None] = print) -> Dataset:
    config = config_at(destination.parent / "model")
    service.convert(str(source), str(destination), config, say)
    return Dataset.open(str(destination))


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository folder of made-up points; duplicates, empty rows, labels of no point."""
    rng = np.random.default_rng(5)
    folder = tmp_path_factory.mktemp("repository")
    words = [f"w{i}" for i in range(50)]
    for prefix, size in (("trn", 400), ("tst", 150)):
        texts, lines, filters = [], [f"{size} 900"], []
        for row in range(size):
            texts.append(" ".join(rng.choice(words, rng.integers(1, 9))))
            labels = rng.integers(0, 900, rng.integers(0, 6)).tolist()
            lines.append(" ".join(f"{label}:1.0" for label in [*labels, *labels[:1]]))
            filters += [f"{row} {label}" for label in rng.integers(0, 900, row % 3).tolist()]
        for name, content in (("X", texts), ("X_Y", lines), ("filter_labels", filters)):
            (folder / f"{prefix}_{name}.txt").write_text("\n".join(content) + "\n")
    names = [" ".join(rng.choice(words, 3)) for _ in range(900)]
    (folder / "Y.txt").write_text("\n".join(names) + "\n")
    return folder


@pytest.fixture(scope="module")
def expected(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """What the text files are converted to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, "stream", shuffled)
        patch.setattr(service, "ensure_ray", lambda *arguments, **settings: None)
        return convert(repository, tmp_path_factory.mktemp("expected") / "dataset")


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("strings", [False, True], ids=["ids", "strings"])
@pytest.mark.parametrize("bucket", [64, 1 << 19], ids=["many buckets", "one bucket"])
def test_the_parts_are_those_of_the_text_files(
    repository: Path,
    expected: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    strings: bool,
    bucket: int,
) -> None:
    monkeypatch.setattr(conversion, "BUCKET_ROWS", bucket)
    made = convert(parquet(repository, tmp_path / "src", strings=strings), tmp_path / "dst")
    assert made.manifest.splits == expected.manifest.splits  # with the SHA-256 of every part
    assert made.manifest.other_texts == expected.manifest.other_texts
    for split, counts in made.manifest.statistics.items():
        wanted = expected.manifest.statistics[split]
        assert counts == {key: wanted[key] for key in counts}
    assert sorted(p.name for p in (tmp_path / "dst").iterdir()) == sorted(
        ["dataset.json", "train", "validation", "test", "labels"]
    )


@pytest.mark.usefixtures("in_this_process")
def test_a_vocabulary_is_made_of_strings(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "BUCKET_ROWS", 64)
    source = parquet(repository, tmp_path / "src", strings=True, with_labels=False)
    made = convert(source, tmp_path / "dst")
    labels = made.read_rows("labels", 0, made.manifest.num_labels)
    names = labels["text"].to_pylist()
    points = rows_of(repository, "trn"), rows_of(repository, "tst")
    used = {
        i for rows in points for key in ("labels", "filter_labels") for r in rows[key] for i in r
    }
    assert sorted(names) == [f"L{i:05d}" for i in sorted(used)]
    counts: dict[str, int] = dict.fromkeys(names, 0)
    for row in points[0]["labels"]:
        for i in set(row):
            counts[f"L{i:05d}"] += 1
    assert labels["train_count"].to_pylist() == [counts[name] for name in names]
    for split, rows in (("train", points[0]), ("validation", points[0]), ("test", points[1])):
        for point in made.read_rows(split, 0, made.manifest.num_points(split)).to_pylist():
            for key in ("labels", "filter_labels"):
                wanted = {f"L{i:05d}" for i in rows[key][point["point_id"]]}
                assert {names[i] for i in point[key]} == wanted
                assert point[key] == sorted(set(point[key]))


@pytest.mark.usefixtures("in_this_process")
def test_tokens_that_are_there_already(tmp_path: Path) -> None:
    tokens = [[101, 7, 102], list(range(200, 0, -1)), [5]]
    write(
        tmp_path / "src",
        "train.parquet",
        {"input_ids": tokens, "labels": [[0, 2], [], [2]]},
        strings=False,
    )
    config = config_at(tmp_path / "model", validation=0, max_length=16)
    service.convert(str(tmp_path / "src"), str(tmp_path / "d"), config)
    made = Dataset.open(str(tmp_path / "d"))
    found = {row["point_id"]: row for row in made.read_rows("train", 0, 3).to_pylist()}
    assert found[0]["input_ids"] == tokens[0] and found[2]["input_ids"] == [5]
    assert found[1]["input_ids"] == [*range(200, 185, -1), 1]  # the last token stays
    assert made.read_rows("labels", 0, 3)["train_count"].to_pylist() == [1, 0, 2]
    assert not made.manifest.has_label_texts


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("kind", [pa.int8(), pa.bool_(), pa.float32()], ids=str)
def test_padding_is_left_out(tmp_path: Path, kind: pa.DataType) -> None:
    """Of points and of labels; a text beside the tokens is not read, and this is said."""
    tokens, mask = [[7, 8, 0, 0], [0, 0, 9, 10]], [[1, 1, 0, 0], [0, 0, 1, 1]]
    flags = pa.array(np.array(mask).astype(bool).tolist(), pa.list_(pa.bool_()))
    flags = flags.cast(pa.list_(kind))
    rows = {"input_ids": tokens, "attention_mask": flags}
    (tmp_path / "src").mkdir()
    points = pa.table(rows | {"text": ["a", "b"], "labels": [[0], [1]]})
    pq.write_table(points, tmp_path / "src" / "train.parquet")
    pq.write_table(pa.table(rows), tmp_path / "src" / "labels.parquet")
    said: list[str] = []
    config = config_at(tmp_path / "model", validation=0, test=0)
    service.convert(str(tmp_path / "src"), str(tmp_path / "d"), config, said.append)
    made = Dataset.open(str(tmp_path / "d"))
    points = made.read_rows("train", 0, 2).sort_by("point_id")
    assert points["input_ids"].to_pylist() == [[7, 8], [9, 10]]
    assert made.read_rows("labels", 0, 2)["input_ids"].to_pylist() == [[7, 8], [9, 10]]
    assert any("the tokens are read, and text is not" in text for text in said)


def masked(*mask: Any) -> Rows:
    return {"input_ids": [[1, 2], [3, 4]], "attention_mask": list(mask), "labels": [[0], [0]]}


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize(
    ("columns", "strings", "sentence"),
    [
        ({"labels": [[0]]}, False, "rename the one with the texts to 'text'"),
        ({"text": ["a"]}, False, "rename the one with the labels to 'labels'"),
        ({"text": [1], "labels": [[0]]}, False, "column 'text' of type int64"),
        ({"input_ids": [[1], None], "labels": [[0], [1]]}, False, "row 1 .* has no input_ids"),
        ({"input_ids": [[1], []], "labels": [[0], [1]]}, False, "row 1 .* has no input_ids"),
        ({"input_ids": [[1], [None]], "labels": [[0], [1]]}, False, "row 1 .* null in input_ids"),
        ({"text": ["a", "b"], "labels": [[0], [3, -4]]}, False, "row 1 of row group 0 has -4"),
        ({"text": ["a", "b"], "labels": [[], []]}, False, "gives no training point a label"),
        ({"text": [], "labels": []}, False, "has no training row"),
        ({"input_ids": [["a"]], "labels": [[0]]}, False, "'input_ids' of type list"),
        (masked([1, 0], [1]), False, "row 1 .* 2 input_ids and 1 values in attention_mask"),
        (masked([1, 0], None), False, "row 1 .* 2 input_ids and 0 values in attention_mask"),
        (masked([1, 0], [0, 0]), False, "row 1 .* no token that attention_mask leaves"),
        (masked(None, None), False, "row 0 .* 2 input_ids and 0 values"),
        (masked(1, 1), False, "'attention_mask' of type int64; it must be a list of 0 and 1"),
        ({"input_ids": [[1], [99999999]], "labels": [[0], [0]]}, False, "row 1 .* token 99999999"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, columns: Rows, strings: bool, sentence: str) -> None:
    if columns["text" if "text" in columns else "labels"] == []:
        columns = {"text": pa.array([], pa.string()), "labels": []}  # type: ignore[dict-item]
    write(tmp_path / "src", "train.parquet", columns, strings=strings)
    with pytest.raises(ReneeError, match=sentence) as caught:
        convert(tmp_path / "src", tmp_path / "d")
    assert str(tmp_path / "src") in str(caught.value)
    assert not (tmp_path / "d" / "dataset.json").exists()
    assert not (tmp_path / "d" / "_scratch").exists()


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("strings", [False, True], ids=["ids", "strings"])
def test_a_label_that_is_none_is_named(tmp_path: Path, strings: bool) -> None:
    rows = {"text": ["a", "b", "c"], "labels": [[0], [1], [0, 7]]}
    write(tmp_path / "src", "train.parquet", rows, strings=strings)
    table: dict[str, list[str]] = {"text": ["zero", "one"]}
    if strings:
        table["label"] = ["L00000", "L00001"]
    pq.write_table(pa.table(table), tmp_path / "src" / "labels.parquet")
    value = "'L00007'" if strings else "7"
    with pytest.raises(
        ReneeError, match=f"row 2 of row group 0 has {value} in labels, .* 2 labels"
    ):
        convert(tmp_path / "src", tmp_path / "d")


@pytest.mark.usefixtures("in_this_process")
def test_a_label_twice_in_the_table_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "BUCKET_ROWS", 2)
    write(tmp_path / "src", "train.parquet", {"text": ["a"], "labels": [[1]]}, strings=True)
    labels = pa.table({"label": ["L00001", "L00002", "L00003", "L00001"]})
    pq.write_table(labels, tmp_path / "src" / "labels.parquet", row_group_size=2)
    with pytest.raises(ReneeError, match="has the label 'L00001' 2 times"):
        convert(tmp_path / "src", tmp_path / "d")


@pytest.mark.usefixtures("in_this_process")
def test_files_that_differ_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "src/train/0.parquet", {"text": ["a"], "labels": [[1]]}, strings=False)
    write(tmp_path, "src/train/1.parquet", {"text": ["a"], "labels": [[1]]}, strings=True)
    with pytest.raises(ReneeError, match=r"1\.parquet has .*'labels' that is list of string"):
        convert(tmp_path / "src", tmp_path / "d")
    (tmp_path / "src" / "train" / "1.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(ReneeError, match=r"1\.parquet is not Parquet"):
        convert(tmp_path / "src", tmp_path / "d")


@pytest.mark.parametrize("kind", ["parquet", "text"])
def test_a_conversion_that_is_cut_off_goes_on(
    repository: Path,
    expected: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """Cut off again and again, each time after a few more tasks; no task is done twice."""
    source = repository
    if kind == "parquet":
        source = parquet(repository, tmp_path / "src", strings=True)
    done: list[tuple[str, int]] = []
    budget = 0

    def stream(
        work: Callable[..., Any], plan: Any, tasks: int, journal: str | None = None
    ) -> Iterator[Any]:
        def counted(plan: Any, i: int) -> Any:
            nonlocal budget
            if journal is not None:
                budget -= 1
                if budget < 0:
                    raise Interrupted("a task died")
                done.append((work.__name__, i))
            return work(plan, i)

        counted.__name__ = work.__name__
        for i in range(tasks):
            yield json.loads(attempt(counted, plan, i, journal))

    monkeypatch.setattr(conversion, "stream", stream)
    monkeypatch.setattr(service, "ensure_ray", lambda *arguments, **settings: None)
    monkeypatch.setattr(conversion, "BUCKET_ROWS", 64)
    monkeypatch.setattr(lines, "PIECE_ROWS", 50)
    said: list[str] = []
    for _ in range(50):
        budget = 7
        try:
            convert(source, tmp_path / "dst", said.append)
            break
        except Interrupted:
            assert not (tmp_path / "dst" / "dataset.json").exists()
    assert Dataset.open(str(tmp_path / "dst")).manifest.splits == expected.manifest.splits
    assert len(done) == len(set(done)) > 21
    assert sum("going on" in text for text in said) == -(-len(done) // 7) - 1
    assert not (tmp_path / "dst" / "_scratch").exists()


@pytest.mark.usefixtures("in_this_process")
def test_what_was_cut_off_serves_only_the_same_source(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = parquet(repository, tmp_path / "src", strings=False)

    def full(*arguments: Any) -> None:
        raise OSError("no space left on this disk")

    with monkeypatch.context() as patch, pytest.raises(ReneeError, match="no space left"):
        patch.setattr(service.layout, "write_manifest", full)
        convert(source, tmp_path / "d")
    assert (tmp_path / "d" / "_scratch").exists(), "kept for the next attempt"
    other = {"text": ["a"], "labels": [[0]], "filter_labels": [[1]]}
    write(source, "train/1.parquet", other, strings=False)
    said: list[str] = []
    convert(source, tmp_path / "d", said.append)
    manifest = Dataset.open(str(tmp_path / "d")).manifest
    assert manifest.num_points("train") + manifest.num_points("validation") == 134
    assert not any("going on" in text for text in said)
