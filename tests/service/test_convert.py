from __future__ import annotations

import gzip
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from renee_ray.cli.main import main
from renee_ray.config.schema import ConvertConfig
from renee_ray.data.dataset import Dataset, DatasetError
from renee_ray.data.sources import lines
from renee_ray.data.split import Shuffle
from renee_ray.errors import ReneeError
from renee_ray.service.convert import conversion
from renee_ray.service.convert.convert import convert

from .test_convert_fuzz import CASES, check_cases, tokenizer
from .test_convert_parquet import in_this_process
from .test_convert_sources import KINDS, REFUSED, check, refuse
from .test_convert_sources import convert as convert_kind

__all__ = ["in_this_process", "tokenizer"]
IN_THIS_PROCESS = pytest.mark.usefixtures("in_this_process")
WORDS = ["red", "green", "blue", "one", "two", "three", "caf\u00e9", "\ufffd"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with a small word tokenizer whose padding token is not 0."""
    directory = tmp_path_factory.mktemp("model")
    vocabulary = {w: i for i, w in enumerate(["[UNK]", "[PAD]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_padding(pad_id=1, pad_token="[PAD]", length=9)
    tokenizer.save(str(directory / "tokenizer.json"))
    return str(directory)


def config_of(model: str, **changes: Any) -> ConvertConfig:
    return ConvertConfig(
        **{"tokenizer": model, "max_length": 6, "part_rows": 16, "test": 0, **changes}
    )


def write(folder: Path, files: Mapping[str, str | bytes]) -> str:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        data = text.encode() if isinstance(text, str) else text
        (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return str(folder)


def random_repository(points: int = 100, tests: int = 33, labels: int = 40) -> dict[str, Any]:
    """The naive records of a repository, and its text files, odd in every accepted way."""
    rng = np.random.default_rng(5)

    def text() -> str:
        return " ".join(rng.choice(WORDS[:7], rng.integers(0, 8)))

    def lines(n: int) -> list[list[int]]:
        return [rng.integers(0, labels, rng.integers(0, 6)).tolist() for _ in range(n)]

    def sparse(rows: list[list[int]]) -> str:
        body = [" ".join(f"{i}:1.00000" for i in row) for row in rows]
        return "\r\n".join([f"{len(rows)} {labels}", *body]) + "\r\n"

    texts = {"trn": [text() for _ in range(points)], "tst": [text() for _ in range(tests)]}
    pairs = {"trn": lines(points), "tst": lines(tests)}
    label_texts = [text() for _ in range(labels)]
    filters = [(int(rng.integers(points)), int(rng.integers(labels))) for _ in range(80)]
    files = {f"{s}_X.txt": "\ufeff" + "\r\n".join(texts[s]) + "\r\n" for s in texts}
    files |= {f"{s}_X_Y.txt": sparse(pairs[s]) for s in pairs}
    files["Y.txt"] = "\n".join(label_texts)
    files["trn_filter_labels.txt"] = "".join(f"{row} {label}\n" for row, label in filters)
    return {
        "texts": texts,
        "pairs": pairs,
        "labels": label_texts,
        "filters": filters,
        "files": files,
    }


def check_against(naive: dict[str, Any], path: str, config: ConvertConfig) -> None:
    """Rereads every row and compares it with the naive records, whichever files they came from."""
    dataset = Dataset.open(path)
    tokenizer = Tokenizer.from_file(f"{config.tokenizer}/tokenizer.json")
    tokenizer.no_padding()
    tokenizer.enable_truncation(config.max_length)
    rows = np.arange(len(naive["texts"]["trn"]))
    shuffle = Shuffle(config.seed, (config.validation,), np.zeros(0, np.uint64))
    held_out = shuffle.held_out(rows)
    order = {
        "train": sorted(rows[~held_out].tolist(), key=shuffle.keys(rows).tolist().__getitem__),
        "validation": rows[held_out].tolist(),
        "test": list(range(len(naive["texts"].get("tst", [])))),
    }
    for split, ids in order.items():
        source = "tst" if split == "test" else "trn"
        filters = naive["filters"] if source == "trn" else []
        expected = [
            {
                "point_id": i,
                "input_ids": tokenizer.encode(naive["texts"][source][i]).ids,
                "labels": sorted(set(naive["pairs"][source][i])),
                "filter_labels": sorted({label for row, label in filters if row == i}),
            }
            for i in ids
        ]
        assert dataset.manifest.num_points(split) == len(ids)
        assert dataset.read_rows(split, 0, len(ids)).to_pylist() == expected
        assert [part.rows for part in dataset.manifest.splits[split]] == [
            min(config.part_rows, len(ids) - start)
            for start in range(0, len(ids), config.part_rows)
        ]
    counts = [sum(i in row for row in naive["pairs"]["trn"]) for i in range(len(naive["labels"]))]
    points = {label for row, label in naive["filters"] if row in order["train"]}
    labels = dataset.read_rows("labels", 0, dataset.manifest.num_labels).to_pylist()
    assert labels == [
        {
            "label_id": i,
            "text": text,
            "input_ids": tokenizer.encode(text).ids,
            "train_count": counts[i],
            "is_point": i in points,
        }
        for i, text in enumerate(naive["labels"])
    ]
    assert sum(dataset.manifest.other_texts) == len(labels) - len(points)
    assert sum(counts) == sum(
        dataset.manifest.statistics[split]["label_pairs"] for split in ("train", "validation")
    )
    assert not Path(path, "_scratch").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_texts_against_naive_python(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    naive = random_repository()
    config = config_of(model, validation=0.2)
    monkeypatch.setattr(lines, "PIECE_ROWS", 9)
    monkeypatch.setattr(conversion, "BUCKET_ROWS", 2 * config.part_rows)
    messages: list[str] = []
    manifest = convert(
        write(tmp_path / "src", naive["files"]), str(tmp_path / "dst"), config, messages.append
    )
    check_against(naive, str(tmp_path / "dst"), config)
    blocks = sum(-(-len(of_split) // 2) for of_split in manifest.splits.values())
    assert blocks > 5 and messages[-1] == f"buckets written: {blocks} of {blocks}"
    assert Dataset.open(str(tmp_path / "dst")).manifest == manifest
    assert manifest.pad_id == 1 and manifest.has_label_texts and manifest.tokenizer == model
    # Some labels are filter labels of held-out points alone: their texts are not trained on.
    filtered = {label for _, label in naive["filters"]}
    assert len(naive["labels"]) > sum(manifest.other_texts) > len(naive["labels"]) - len(filtered)
    duplicates = sum(len(row) - len(set(row)) for row in naive["pairs"]["trn"])
    assert duplicates > 0
    assert manifest.statistics["train"]["duplicate_pairs"] == duplicates
    assert manifest.statistics["train"]["tokens_max"] == 6
    shares = manifest.statistics["labels"]["share_of_pairs_by_train_count"]
    assert sum(shares.values()) == pytest.approx(1, abs=1e-3)


@IN_THIS_PROCESS
def test_gzip_gives_the_same_parts(tmp_path: Path, model: str) -> None:
    naive = random_repository()
    config = config_of(model, validation=0.2)
    files = {f"{name}.gz": data for name, data in naive["files"].items()}
    convert(write(tmp_path / "src", files), str(tmp_path / "dst"), config)
    check_against(naive, str(tmp_path / "dst"), config)


@IN_THIS_PROCESS
def test_json_lines_give_the_same_parts(tmp_path: Path, model: str) -> None:
    naive = random_repository()
    config = config_of(model, validation=0.2)

    def records(texts: list[str], pairs: list[list[int]] | None) -> str:
        split = [text.split(" ", 1) for text in texts]
        rows = [{"title": words[0], "content": " ".join(words[1:])} for words in split]
        if pairs is not None:
            rows = [{**row, "target_ind": ids} for row, ids in zip(rows, pairs, strict=True)]
        return "".join(json.dumps(row) + "\n" for row in rows)

    files: dict[str, str | bytes] = {
        f"{s}.json.gz": records(naive["texts"][s], naive["pairs"][s]) for s in ("trn", "tst")
    }
    files["lbl.json"] = records(naive["labels"], None)
    files["filter_labels_train.txt"] = naive["files"]["trn_filter_labels.txt"]
    convert(write(tmp_path / "src", files), str(tmp_path / "dst"), config)
    check_against(naive, str(tmp_path / "dst"), config)


@IN_THIS_PROCESS
def test_odd_but_good(tmp_path: Path, model: str) -> None:
    """Bare ids, zero values, no header, no Y.txt, no test split, no filters, odd characters."""
    files: dict[str, str | bytes] = {
        "trn_X.txt": b"red\xff one\ngreen\xe2\x80\xa8two\n\ncaf\xc3\xa9",
        "trn_X_Y.txt": "4 2:0.0 4\n\n1:1 3:0\n0",
    }
    path = str(tmp_path / "dst")
    manifest = convert(
        write(tmp_path / "src", files), path, config_of(model, validation=0.0, part_rows=1)
    )
    rows = sorted(
        Dataset.open(path).read_rows("train", 0, 4).to_pylist(), key=lambda row: row["point_id"]
    )
    assert [row["labels"] for row in rows] == [[4], [], [1], [0]]
    assert [len(row["input_ids"]) for row in rows] == [4, 4, 2, 3]
    assert all(row["filter_labels"] == [] for row in rows)
    assert manifest.num_labels == 5 and not manifest.has_label_texts
    assert manifest.splits["test"] == () and manifest.splits["validation"] == ()
    labels = Dataset.open(path).read_rows("labels", 0, 5)
    assert labels["text"].to_pylist() == [""] * 5
    assert labels["train_count"].to_pylist() == [1, 1, 0, 0, 1]
    counts = manifest.statistics["train"]
    expected = {
        "duplicate_pairs": 1,
        "zero_values": 2,
        "replaced_lines": 1,
        "replaced_bytes": 1,
        "empty_texts": 1,
        "without_labels": 1,
        "label_pairs": 3,
        "points": 4,
    }
    assert {name: counts[name] for name in expected} == expected


@IN_THIS_PROCESS
def test_same_seed_same_files(tmp_path: Path, model: str) -> None:
    src = write(tmp_path / "src", random_repository()["files"])

    def files(name: str, seed: int) -> dict[str, bytes]:
        path = tmp_path / name
        convert(src, str(path), config_of(model, validation=0.1, seed=seed))
        return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}

    first = files("a", seed=1)
    assert first == files("b", seed=1)
    other = files("c", seed=2)
    part = "train/part-00000.parquet"
    assert first[part] != other[part]
    assert first["test/part-00000.parquet"] == other["test/part-00000.parquet"]


@IN_THIS_PROCESS
@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("trn_X_Y.txt", "3 4\n0:1\n1:1 x:1\n2:1\n", r"/src/trn_X_Y\.txt:3: malformed pair 'x:1'"),
        ("trn_X_Y.txt", "3 4\n0:1\n1:1\n4:1\n", r"/src/trn_X_Y\.txt:4: label id 4 is out of range"),
        ("tst_X_Y.txt", "1 4\n-1:1\n", r"/src/tst_X_Y\.txt:2: label id -1 is out of range"),
        ("trn_X_Y.txt", "3 4\n\n\n1:0\n", r"/src/trn_X_Y\.txt gives no training point a label"),
        ("trn_X_Y.txt", "5 4\n0:1\n1:1\n2:1\n", r"/src/trn_X_Y\.txt:1: the header says 5 rows"),
        ("trn_filter_labels.txt", "0 1\n7 1\n", r"/src/trn_filter_labels\.txt:2: row 7 is out of"),
        ("tst_filter_labels.txt", "0 4\n", r"/src/tst_filter_labels\.txt:1: label id 4 is out of"),
        ("tst_filter_labels.txt", "0\n", r"/src/tst_filter_labels\.txt:1: malformed filter line"),
    ],
)
def test_refused(tmp_path: Path, model: str, name: str, text: str, message: str) -> None:
    """The sentence itself comes out of the task, and neither a dataset nor its parts remain."""
    good = {
        "trn_X.txt": "a\nb\nc\n",
        "trn_X_Y.txt": "3 4\n0:1\n1:1\n2:1\n",
        "tst_X.txt": "d\n",
        "tst_X_Y.txt": "1 4\n1:1\n",
        "Y.txt": "w\nx\ny\nz\n",
    }
    src = write(tmp_path / "src", {**good, name: text})
    with pytest.raises(ReneeError, match=message) as caught:
        convert(src, str(tmp_path / "dst"), config_of(model))
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)
    with pytest.raises(DatasetError, match="is not a renee_ray dataset"):
        Dataset.open(str(tmp_path / "dst"))
    assert not list(tmp_path.glob("dst/**/*.parquet"))


@IN_THIS_PROCESS
def test_bad_json_and_bad_gzip(tmp_path: Path, model: str) -> None:
    good = '{"title": "red", "target_ind": [0]}\n'
    src = write(tmp_path / "src", {"trn.json": good * 9 + '{"title": "red"}\n'})
    with pytest.raises(ReneeError, match=r"/src/trn\.json:10: target_ind is None; write a list"):
        convert(src, str(tmp_path / "dst"), config_of(model))
    write(tmp_path / "src", {"trn.json": good * 9, "lbl.json.gz": '{"title": "blue"}\n' * 500})
    packed = tmp_path / "src" / "lbl.json.gz"
    packed.write_bytes(packed.read_bytes()[:-10])
    with pytest.raises(ReneeError, match=r"/src/lbl\.json\.gz is not a complete gzip file"):
        convert(src, str(tmp_path / "dst"), config_of(model))
    assert not (tmp_path / "dst" / "_scratch").exists()


@IN_THIS_PROCESS
def test_bad_label_texts_are_found_before_writing(tmp_path: Path, model: str) -> None:
    files: dict[str, str | bytes] = {
        "trn.json": '{"title": "red", "target_ind": [0]}\n' * 9,
        "lbl.json": '{"title": "blue"}\n' * 40 + "{oh\n" + '{"title": "blue"}\n' * 2,
    }
    src, dst = write(tmp_path / "src", files), str(tmp_path / "dst")
    with pytest.raises(ReneeError, match=r"/src/lbl\.json:41: bad JSON"):
        convert(src, dst, config_of(model))
    assert not [path for path in Path(dst).rglob("*") if path.is_file()]


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_conversion_that_dies_and_the_next_one(tmp_path: Path, model: str) -> None:
    """What was written of the source vanishes under the tasks that read it."""
    naive = random_repository()
    src, dst = write(tmp_path / "src", naive["files"]), str(tmp_path / "dst")

    def shorten(message: str) -> None:
        if message == "blocks read: 2 of 2":
            (texts,) = Path(dst).rglob("_scratch/labels/*.parquet")
            os.truncate(texts, texts.stat().st_size - 9)

    with pytest.raises(ReneeError, match=r"/labels/.*\.parquet"):
        convert(src, dst, config_of(model, part_rows=4), shorten)
    assert not [path for path in Path(dst).rglob("*") if path.is_file()]
    write(tmp_path / "src", naive["files"])
    config = config_of(model)
    manifest = convert(src, dst, config)
    check_against(naive, dst, config)
    names = {str(f.relative_to(dst)) for f in Path(dst).rglob("*.parquet")}
    assert names == {part.path for parts in manifest.splits.values() for part in parts}


@IN_THIS_PROCESS
def test_a_destination_that_is_taken(tmp_path: Path, model: str) -> None:
    naive = random_repository()
    src, dst = write(tmp_path / "src", naive["files"]), tmp_path / "dst"
    config = config_of(model)
    for taken in (src, str(tmp_path), f"{src}/Y.txt", f"{src}/dst"):
        with pytest.raises(ReneeError, match="are the same, or one is in the other"):
            convert(src, taken, config)
    with pytest.raises(ReneeError, match=r"tokenizer\.json is a file; give a directory"):
        convert(src, f"{model}/tokenizer.json", config)
    with pytest.raises(ReneeError, match="holds other files"):
        convert(src, model, config)
    convert(src, str(dst), config)
    with pytest.raises(ReneeError, match="dst already holds a dataset; give another directory or"):
        convert(src, str(dst), config)

    other = config_of(model, overwrite=True, part_rows=1000)
    Path(src, "trn_X_Y.txt").write_text("100 40\n" + "50:1\n" * 100)
    with pytest.raises(ReneeError, match=r"/trn_X_Y\.txt:2: label id 50 is out of range"):
        convert(src, str(dst), other)
    check_against(naive, str(dst), config)
    write(tmp_path / "src", naive["files"])
    convert(src, str(dst), other)
    check_against(naive, str(dst), other)
    assert len(list(dst.rglob("train/*.parquet"))) == 1


@IN_THIS_PROCESS
def test_nothing_left_to_train_on(tmp_path: Path, model: str) -> None:
    src = write(tmp_path / "src", {"trn_X.txt": "red\n", "trn_X_Y.txt": "1 1\n0\n"})
    with pytest.raises(ReneeError, match=r"validation=0\.999999 .* hold out all 1 training points"):
        convert(src, str(tmp_path / "dst"), config_of(model, validation=0.999999))


@IN_THIS_PROCESS
def test_no_such_tokenizer(tmp_path: Path) -> None:
    src = write(tmp_path / "src", {"trn_X.txt": "red\n", "trn_X_Y.txt": "1 1\n0\n"})
    broken: list[dict[str, str]] = [{}, {"tokenizer.json": "{"}]
    for files in broken:
        config = config_of(write(tmp_path / "model", files))
        with pytest.raises(ReneeError, match=r"^no fast tokenizer .*/model .*tokenizer\.json$"):
            convert(src, str(tmp_path / "dst"), config)
    assert not (tmp_path / "dst").exists()


@IN_THIS_PROCESS
def test_a_destination_that_cannot_be_written(tmp_path: Path, model: str) -> None:
    src = write(tmp_path / "src", {"trn_X.txt": "red\n", "trn_X_Y.txt": "1 1\n0\n"})
    with pytest.raises(ReneeError, match=r"^cannot convert .* to .*Y/dst \(.*\); check that both"):
        write(tmp_path, {"Y": "a file"})
        convert(src, str(tmp_path / "Y" / "dst"), config_of(model))


# ------------------------------------------------------------------------------------- on Ray


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("name", ["dictionary-names", "csv-pairs"])
def test_kinds_on_ray(tmp_path: Path, name: str) -> None:
    check(KINDS[name], convert_kind(KINDS[name], tmp_path))


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("name", ["uint64-beyond", "label-not-utf8", "cr-only"])
def test_refused_on_ray(tmp_path: Path, name: str) -> None:
    refuse(*REFUSED[name], tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_the_command(tmp_path: Path) -> None:
    """With the tokenizer that it takes by default."""
    src = write(tmp_path / "src", random_repository()["files"])
    assert main(["convert", src, str(tmp_path / "d"), "part_rows=16", "--json"]) == 0
    assert main(["inspect", str(tmp_path / "d"), "--verify", "--json"]) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_random_folders_on_ray(tmp_path: Path, tokenizer: str) -> None:
    """Tasks run beside one another here, also when what gave them is interrupted."""
    outcomes = check_cases(range(CASES, CASES + 30), tmp_path, tokenizer)
    assert 0 < outcomes["converted"] < 30
