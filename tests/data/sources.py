"""Small source folders, each of a kind that people have, with what is to be read from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, models, pre_tokenizers

TEXTS = ["red lamp", "blue chair", "steel table", "wood shelf red", "garden stool", "amber lamp"]
IDS: list[list[int]] = [[0], [1, 2], [2], [0, 3], [3], [0, 1]]
PAIRS: list[list[int]] = [[0, 1], [1, 2], [2, 3], [0, 3], [1, 3], [0, 2]]
FLAGS = [[int(label in row) for label in range(4)] for row in IDS]
BOOLS = [[bool(flag) for flag in row] for row in FLAGS]
NAMES = ["lamp", "chair", "table", "stool"]
I64 = pa.int64()


def write_tokenizer(folder: Path, words: list[str]) -> str:
    """A tokenizer of whole words, in a directory; one of a model takes a second to load."""
    vocabulary = {word: i for i, word in enumerate(["[UNK]", *dict.fromkeys(words)])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    return str(folder)


@dataclass(frozen=True)
class Kind:
    """Writes a folder. labels: of its training rows, in order; settings: of the conversion."""

    write: Callable[[Path], object]
    labels: list[list[int]] = field(default_factory=lambda: IDS)
    texts: list[str] = field(default_factory=lambda: TEXTS)
    settings: dict[str, Any] = field(default_factory=dict)
    names: list[str] | None = None


def rows(
    text: pa.DataType | None = None,
    labels: pa.DataType | None = None,
    values: Any = None,
    **more: Any,
) -> pa.Table:
    """Six rows with columns of these types."""
    given = pa.array(IDS if values is None else values, labels or pa.list_(I64))
    return pa.table({"text": pa.array(TEXTS, text or pa.string()), "labels": given, **more})


def files(**tables: pa.Table | bytes) -> Callable[[Path], object]:
    """Writes files; `__` stands for `/`, and all are Parquet unless they are bytes."""

    def write(folder: Path) -> None:
        for name, table in tables.items():
            path = folder / name.replace("__", "/")
            if isinstance(table, bytes):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(table)
                continue
            path = path.with_name(f"{path.name}.parquet")
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, path)

    return write


def typed(
    text: pa.DataType | None = None,
    labels: pa.DataType | None = None,
    values: Any = None,
    **more: Any,
) -> Callable[[Path], object]:
    return files(train=rows(text, labels, values, **more))


def hub(*splits: str) -> Callable[[Path], object]:
    return files(**{f"data__{split}": rows() for split in splits})


def features(labels: Any) -> pa.Table:
    """Rows with the metadata that Hugging Face's datasets write."""
    made = {"text": {"dtype": "string", "_type": "Value"}, "labels": labels}
    content = {b"huggingface": json.dumps({"info": {"features": made}}).encode()}
    return rows().replace_schema_metadata(content)


def not_utf8(column: list[bytes]) -> pa.Array:
    """Strings that are not checked, as other writers leave them."""
    made = pa.array(column, pa.binary())
    return pa.StringArray.from_buffers(len(made), made.buffers()[1], made.buffers()[2])


CLASS = {"names": NAMES, "_type": "ClassLabel"}
MULTI_HOT = {"labels": "multi-hot"}
LATIN = [b"red lamp", b"caf\xe9", b"steel table", b"wood shelf red", b"garden stool", b"amber lamp"]
READABLE = ["red lamp", "caf\ufffd", "steel table", "wood shelf red", "garden stool", "amber lamp"]
WORDS = [word for text in [*TEXTS, *READABLE, *NAMES, "a b 0 1 2 3"] for word in text.split()]
NULLS = pa.table(
    {"text": pa.array(["a", "b"]), "labels": pa.array([[], None], pa.list_(pa.null()))}
)
KINDS = {
    "parquet-from-one": Kind(  # numbered from 1, beside JSON that tells of it
        files(
            **{
                "train__part-1-of-2": rows().slice(0, 3),
                "train__part-2-of-2": rows().slice(3),
                "train__metadata__v1.json": b"{}",
            }
        ),
    ),
    "parquet-empty-strings": Kind(
        typed(labels=pa.list_(pa.string()), values=[["", *map(str, row), ""] for row in IDS]),
        names=[str(label) for label in range(4)],
    ),
    "hub": Kind(hub("train-00000-of-00001", "test-00000-of-00001", "validation-00000-of-00001")),
    "hub-fingerprint": Kind(hub("train-00000-of-00001-a09b74b3ef9c3b56")),
    "hub-several": Kind(hub("train-00000-of-00002", "train-00001-of-00002"), IDS * 2, TEXTS * 2),
    "hub-convert": Kind(files(train__0000=rows(), test__0000=rows())),
    "data-folder": Kind(
        files(data__train__a=rows(), data__labels=pa.table({"text": NAMES})), names=NAMES
    ),
    "spark": Kind(
        files(
            **{
                "train.parquet___SUCCESS": b"",
                "train.parquet__.part-0.parquet.crc": b"crc",
                "train.parquet___temporary__0__part-1.parquet": b"half",
                "train.parquet__part-0": rows(),
            }
        )
    ),
    "hive": Kind(
        files(**{"train__lang=de__part-0": rows(), "train__lang=en__y=1__part-0": rows()}),
        IDS * 2,
        TEXTS * 2,
    ),
    "appledouble": Kind(
        files(
            **{
                "train__a": rows(),
                "train__._a.parquet": b"\0\5\x16\7",
                "._train.parquet": b"\0\5\x16\7",
            }
        )
    ),
    "list-of-null": Kind(
        files(train__a=rows(), train__b=NULLS), [*IDS, [], []], [*TEXTS, "a", "b"]
    ),
    "list-of-null-first": Kind(
        files(train__a=NULLS, train__b=rows()), [[], [], *IDS], ["a", "b", *TEXTS]
    ),
    "column-of-null": Kind(
        files(train__a=rows(), train__b=pa.table({"text": ["a"], "labels": pa.nulls(1)})),
        [*IDS, []],
        [*TEXTS, "a"],
    ),
    "two-widths": Kind(
        files(train__a=rows(), train__b=rows(pa.large_string(), pa.large_list(pa.int32()))),
        IDS * 2,
        TEXTS * 2,
    ),
    "unread-columns": Kind(
        files(train__a=rows(n=range(6), x=pa.nulls(6)), train__b=rows(n=["a"] * 6)),
        IDS * 2,
        TEXTS * 2,
    ),
    "null-rows": Kind(
        typed(
            values=[None, *IDS[1:]],
            filter_labels=pa.array([None, [3], None, [], None, None], pa.list_(I64)),
        ),
        [[], *IDS[1:]],
    ),
    "null-filter-column": Kind(typed(filter_labels=pa.nulls(6))),
    "null-text": Kind(
        files(train=rows().set_column(0, "text", pa.array([None, *TEXTS[1:]]))),
        texts=["", *TEXTS[1:]],
    ),
    "fixed-size": Kind(typed(labels=pa.list_(I64, 2), values=PAIRS), PAIRS),
    "fixed-size-null": Kind(
        typed(labels=pa.list_(I64, 2), values=[None, *PAIRS[1:]]), [[], *PAIRS[1:]]
    ),
    "list-view": Kind(typed(pa.string_view(), pa.list_view(pa.int16()))),
    "large-list-view": Kind(typed(pa.large_string(), pa.large_list_view(pa.uint8()))),
    "uint64": Kind(typed(labels=pa.list_(pa.uint64()))),
    "dictionary": Kind(typed(pa.dictionary(pa.int32(), pa.string()))),
    "binary": Kind(typed(pa.binary())),
    "binary-view": Kind(typed(pa.binary_view())),
    "not-utf8": Kind(files(train=rows().set_column(0, "text", not_utf8(LATIN))), texts=READABLE),
    "class-label": Kind(files(train=features({"feature": CLASS, "_type": "List"})), names=NAMES),
    "class-label-sequence": Kind(
        files(train__a=rows(), train__b=features([CLASS])), IDS * 2, TEXTS * 2, names=NAMES
    ),
    "class-label-and-table": Kind(
        files(
            train=features({"feature": CLASS, "_type": "Sequence", "length": -1}),
            labels=pa.table({"text": pa.array(["0", "1", "2", "3"]).dictionary_encode()}),
        ),
        names=["0", "1", "2", "3"],
    ),
    "label-ids-of-files": Kind(  # as decimals, which Oracle and Snowflake write
        files(
            train=rows(),
            labels__a=pa.table({"label_id": pa.array([0, 1], pa.decimal128(9)), "text": NAMES[:2]}),
            labels__b=pa.table({"text": NAMES[2:], "label_id": [2, 3]}),
        ),
        names=NAMES,
    ),
    "multi-hot": Kind(typed(values=FLAGS), settings=MULTI_HOT),
    "multi-hot-bool": Kind(typed(labels=pa.list_(pa.bool_()), values=BOOLS), settings=MULTI_HOT),
    "multi-hot-fixed": Kind(
        typed(labels=pa.list_(pa.float32(), 4), values=FLAGS), settings=MULTI_HOT
    ),
    "multi-hot-null": Kind(
        typed(labels=pa.list_(pa.float64(), 4), values=[None, *FLAGS[1:]]),
        [[], *IDS[1:]],
        settings=MULTI_HOT,
    ),
    "multi-hot-unused": Kind(
        typed(values=[[*row, 0] for row in FLAGS]), settings=MULTI_HOT, names=[""] * 5
    ),
    "two-labels": Kind(
        typed(values=[[0, 0], *[[0, 1]] * 5]), [[0], *[[0, 1]] * 5], settings={"labels": "ids"}
    ),
    "dictionary-names": Kind(
        typed(
            labels=pa.list_(pa.dictionary(pa.int32(), pa.string())),
            values=[[NAMES[label] for label in row] for row in IDS],
        ),
        [sorted([sorted(NAMES).index(NAMES[label]) for label in row]) for row in IDS],
        names=sorted(NAMES),
    ),
}
"""Folders that are read."""


BEYOND = 12120467241726599441
PAIR_LINES = b"".join(b" ".join(b"%d:1" % label for label in row) + b"\n" for row in IDS)
LINES = "".join(f"{text}\n" for text in TEXTS).encode()
FLAG_LINES = "".join(" ".join(map(str, row)) + "\n" for row in FLAGS).encode()


def refused(write: Callable[[Path], object], sentence: str, **settings: Any) -> tuple[Kind, str]:
    return Kind(write, settings=settings), sentence


TEXT = {"trn_X.txt": LINES, "trn_X_Y.txt": PAIR_LINES}
REFUSED = {
    "uint64-beyond": refused(
        typed(labels=pa.list_(pa.uint64()), values=[*IDS[:5], [1, BEYOND]]),
        rf"train\.parquet: row 5 of row group 0 has {BEYOND} in labels",
    ),
    "multi-hot": refused(typed(values=FLAGS), "give labels=multi-hot.* or labels=ids"),
    "multi-hot-ragged": refused(
        typed(values=[[0, 0], [1], [0], [1], [0], [0]]), "labels=multi-hot"
    ),
    "multi-hot-with-names": refused(
        files(train=rows(values=FLAGS), labels=pa.table({"text": NAMES})), "labels=multi-hot"
    ),
    "multi-hot-bool": refused(
        typed(labels=pa.list_(pa.bool_()), values=BOOLS), "list<element: bool>.*labels=multi-hot"
    ),
    "multi-hot-float": refused(
        typed(labels=pa.list_(pa.float32()), values=FLAGS), "list<element: float>.*labels=multi-hot"
    ),
    "multi-hot-lines": refused(
        files(**TEXT | {"trn_X_Y.txt": FLAG_LINES}), "write the ids .* labels="
    ),
    "multi-hot-text": refused(files(**TEXT), "labels=multi-hot is for Parquet", **MULTI_HOT),
    "multi-hot-value": refused(
        typed(values=[*FLAGS[:5], [0, 2, 0, 0]]),
        "row 5 of row group 0 has 2 in labels",
        **MULTI_HOT,
    ),
    "multi-hot-length": refused(
        typed(values=[*FLAGS[:5], [0, 1]]),
        "row 5 of row group 0 has 2 values in labels",
        **MULTI_HOT,
    ),
    "multi-hot-table": refused(
        files(train=rows(values=FLAGS), labels=pa.table({"text": NAMES[:3]})),
        "4 values .* 3 labels",
        **MULTI_HOT,
    ),
    "multi-hot-strings": refused(
        typed(labels=pa.list_(pa.string()), values=[["1", "0"]] * 6), "list of 0 and 1", **MULTI_HOT
    ),
    "null-in-list": refused(typed(values=[*IDS[:5], [None]]), "row 5 .* has a null in labels"),
    "label-not-utf8": refused(
        files(
            train=rows().set_column(
                1,
                "labels",
                pa.ListArray.from_arrays(pa.array(range(7), pa.int32()), not_utf8(LATIN)),
            )
        ),
        r"row 1 of row group 0 has b'caf\\xe9' in labels, which is not UTF-8",
    ),
    "label-ids": refused(
        files(train=rows(), labels=pa.table({"label_id": [0, 1, 3, 2], "text": NAMES})),
        r"labels\.parquet: row 2 of row group 0 has 3 in label_id and is label 2; .* from 0",
    ),
    "label-ids-of-files": refused(
        files(
            train=rows(),
            labels__0=pa.table({"id": ["0", "1"], "text": NAMES[:2]}),
            labels__1=pa.table({"id": ["2", "4"], "text": NAMES[2:]}),
        ),
        r"1\.parquet: row 1 of row group 0 has '4' in id and is label 3",
    ),
    "label-id-null": refused(
        files(train=rows(), labels=pa.table({"id": [0, 1, None, 3], "text": NAMES})),
        "row 2 of row group 0 has None in id",
    ),
    "cr-only": refused(
        files(**{name: lines.replace(b"\n", b"\r") for name, lines in TEXT.items()}),
        r"trn_X(_Y)?\.txt has 0 line feeds and 5 carriage returns",
    ),
    "cr-labels": refused(
        files(**TEXT | {"trn_X_Y.txt": PAIR_LINES.replace(b"\n", b"\r", 2)}),
        r"trn_X_Y\.txt:1: a carriage return within the line",
    ),
    "cr-mixed": refused(
        files(**{name: b.replace(b"\n", b"\r", 2) for name, b in TEXT.items()}),
        r"trn_X_Y\.txt:1: a carriage return within the line",
    ),
    "other-name": refused(files(part=rows()), r"part\.parquet.*train-00000-of-00001"),
    "empty-folder": refused(
        lambda folder: folder.mkdir(), r"trn_X\.txt.*trn\.json.*train\.parquet"
    ),
    "no-folder": refused(lambda folder: None, "does not exist"),
    "two-kinds": refused(files(**TEXT, train=rows()), "two training sets"),
    "two-ways": refused(files(train=rows(), train__a=rows()), "both there; keep one"),
    "hub-incomplete": refused(
        hub("train-00000-of-00003", "train-00002-of-00003"),
        r"train-\*\.parquet: of the 3 files .* 2 are there",
    ),
    "hub-immense": refused(hub("train-00000-of-99999999999"), "1 are there"),
    "hub-twice": refused(hub("train-00000-of-00001", "train-00000-of-00001-abc"), "one of each"),
    "a-column-less": refused(
        files(train__a=rows(), train__b=rows().drop_columns("labels")),
        "rename the one with the labels",
    ),
    "a-filter-less": refused(
        files(train__a=rows(), train__b=rows(filter_labels=[[1]] * 6)),
        "'filter_labels' that is list of integer and in .* missing",
    ),
    "metadata": refused(
        files(train=rows().replace_schema_metadata({"huggingface": "{"})), "no JSON"
    ),
    "class-names-differ": refused(
        files(train=features([CLASS]), test=features([CLASS | {"names": NAMES[::-1]}])),
        r"test\.parquet has other class names",
    ),
    "class-label-range": refused(
        files(train=features([CLASS | {"names": NAMES[:3]}])),
        "row 3 .* has 3 in labels, which is none of the 3",
    ),
    "text-of-null": refused(
        files(train=rows().set_column(0, "text", pa.nulls(6))), "'text' of type null"
    ),
    "struct": refused(
        typed(labels=pa.struct({"a": I64}), values=[{"a": 1}] * 6), "'labels' of type"
    ),
}
"""Folders that are not, and words of the sentence."""
