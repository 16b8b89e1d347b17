"""Own data: small folders of each kind, with what is read from them."""

from __future__ import annotations

import gzip
import io
import json
import struct

import numpy as np
import pyarrow as pa
from scipy import sparse

from renee_ray.data.sources.lines import PIECE_ROWS

from .sources import (
    CLASS,
    IDS,
    NAMES,
    TEXTS,
    Kind,
    features,
    files,
    rows,
    typed,
)


def lines(*rows: str, end: str = "\n") -> bytes:
    return "".join(row + end for row in rows).encode()


def arrow(table: pa.Table, count: int = 2) -> list[bytes]:
    """A table as `datasets` saves it: files of Arrow streams."""
    step, made = -(-len(table) // count), []
    for first in range(0, len(table), step):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table.slice(first, step))
        made.append(sink.getvalue().to_pybytes())
    return made


def saved(prefix: str, table: pa.Table) -> dict[str, bytes]:
    """The files of one split, with the features and the state that `save_to_disk` writes."""
    parts = arrow(table)
    names = [f"data-{i:05d}-of-{len(parts):05d}.arrow" for i in range(len(parts))]
    state = {"_data_files": [{"filename": name} for name in names], "_split": "train"}
    beside = {"state.json": json.dumps(state).encode(), "dataset_info.json": b"{}"}
    made = dict(zip(names, parts, strict=True)) | beside
    return {f"{prefix}{name}": content for name, content in made.items()}


def pecos(rows: list[list[int]], texts: list[str], short: str) -> dict[str, bytes]:
    flat = [label for row in rows for label in row]
    starts = np.cumsum([0, *map(len, rows)])
    sink = io.BytesIO()
    sparse.save_npz(sink, sparse.csr_matrix((np.ones(len(flat)), flat, starts), (len(rows), 4)))
    return {f"X.{short}.txt": lines(*texts), f"Y.{short}.npz": sink.getvalue()}


def npz(starts: list[int] | None) -> bytes:
    """A matrix as scipy saves it, with these offsets, which nothing checks."""
    sink = io.BytesIO()
    arrays = {"indices": np.array([0, 1]), "data": np.ones(2), "shape": np.array([2, 4])}
    arrays |= {} if starts is None else {"indptr": np.array(starts)}
    np.savez(sink, format=np.array(b"csr"), **arrays)
    return sink.getvalue()


def damaged() -> bytes:
    """An Arrow stream whose texts have an offset far beyond their bytes."""
    offsets = pa.array([0, 1 << 30, 2], pa.int32()).buffers()[1]
    texts = pa.StringArray.from_buffers(2, offsets, pa.py_buffer(b"ab"))
    return arrow(pa.table({"text": texts, "labels": [[0], [1]]}), 1)[0]


def immense() -> bytes:
    """An Arrow stream with a batch that says that it has 2^46 bytes."""
    content = arrow(rows(), 1)[0]
    messages = pa.ipc.MessageReader.open_stream(content)
    sizes = [len(message.body or b"") for message in messages]
    size = struct.pack("<q", sizes[-1])
    assert content.count(size) == 1
    return content.replace(size, struct.pack("<q", 1 << 46))


def named(row: list[int]) -> list[str]:
    return [NAMES[label] for label in row]


BY_NAME = [sorted(sorted(NAMES).index(name) for name in named(row)) for row in IDS]
NESTED = [
    {"id": i, "doc": {"title": text.split()[0], "body": " ".join(text.split()[1:])}, "tags": tags}
    for i, (text, tags) in enumerate(zip(TEXTS, map(named, IDS), strict=True))
]
PAIR_ROWS = [f"{text},{name}" for text, row in zip(TEXTS, IDS, strict=True) for name in named(row)]
SEVERAL_LINES = ["red, lamp\nblue", "a,b\nc,d\ne", 'steel "table", wood\n', "x\n\ny, z", "a", "b"]
QUOTED = ['red\tlamp "a"', "blue\nchair", *TEXTS[2:]]
SINGLE = {"label": CLASS}
OWN = {
    "csv-pairs": Kind(
        files(**{"train.csv": lines("title,category", *PAIR_ROWS[3:], *PAIR_ROWS[:3])}),
        [*BY_NAME[2:], *BY_NAME[:2]],
        [*TEXTS[2:], *TEXTS[:2]],
        names=sorted(NAMES),
    ),
    "csv-separator": Kind(
        files(
            **{
                "train.csv": b"\xef\xbb\xbf"
                + lines(
                    "text,labels,n",
                    *(f"{t},{' | '.join(named(r))},7" for t, r in zip(TEXTS, IDS, strict=True)),
                    end="\r\n",
                ),
                "labels.csv": lines("label,text", *(f"{name},{name}" for name in NAMES)),
                "test.csv": lines("text,labels", "red lamp,lamp|chair"),
            }
        ),
        names=NAMES,
    ),
    "csv-labels-in-parts": Kind(  # with ids that go on; a label may be in brackets
        files(
            **{
                "train.csv": lines(
                    "text,labels",
                    *(f"{t},{'|'.join(map(str, r))}" for t, r in zip(TEXTS, IDS, strict=True)),
                ),
                "labels__a.csv": lines("id,text", *(f"{i},[{NAMES[i]}]" for i in (0, 1))),
                "labels__b.csv": lines("id,text", *(f"{i},[{NAMES[i]}]" for i in (2, 3))),
            }
        ),
        settings={"labels": "ids", "separator": "|"},
        names=[f"[{name}]" for name in NAMES],
    ),
    "csv-brackets": Kind(
        files(
            **{
                "train.csv": lines(
                    "text;labels", *(f"{t};[{NAMES[i]}]" for i, t in enumerate(TEXTS[:4]))
                ),
                "labels.csv": lines("label", *(f"[{name}]" for name in NAMES), "", ""),
            }
        ),
        [[0], [1], [2], [3]],
        TEXTS[:4],
        names=[f"[{name}]" for name in NAMES],
    ),
    "csv-excel": Kind(  # columns without a name behind the last, and an empty line in one column
        files(
            **{
                "train.csv": lines(
                    "text,labels,,",
                    *(f"{t},{'|'.join(map(str, r))},," for t, r in zip(TEXTS, IDS, strict=True)),
                ),
                "labels.csv": lines("text", NAMES[0], "", *NAMES[2:]),
            }
        ),
        settings={"labels": "ids", "separator": "|"},
        names=[NAMES[0], "", *NAMES[2:]],
    ),
    "csv-ids": Kind(
        files(
            **{
                "articles.csv": lines(
                    "id;body;topics",
                    *(f"x{i};{t};{' '.join(map(str, IDS[i]))}" for i, t in enumerate(TEXTS)),
                )
            }
        ),
        settings={"labels": "ids"},
    ),
    **{
        f"csv-several-lines-{name}": Kind(  # with as many delimiters as the header among them
            files(
                **{
                    "train.csv": lines(
                        f"text{mark}tags",
                        *(
                            '"' + t.replace('"', '""') + '"' + mark + "|".join(named(r))
                            for t, r in zip(texts, IDS, strict=True)
                        ),
                    )
                }
            ),
            BY_NAME,
            texts,
            names=sorted(NAMES),
        )
        for name, mark in (("comma", ","), ("semicolon", ";"))
        for texts in ([each.replace(",", mark) for each in SEVERAL_LINES],)
    },
    "csv-pairs-without-text": Kind(
        files(**{"train.csv": lines("title,category", ",b", "x,a", " ,c", "x,b", ",a")}),
        [[1], [0, 1], [2], [0]],
        ["", "x", " ", ""],
        names=["a", "b", "c"],
    ),
    "csv-label-codes": Kind(  # which are no places
        files(
            **{
                "train.csv": lines("text,labels", "a,0|1", "b,1"),
                "labels.csv": lines("id,text", "7,red", "B00,blue"),
            }
        ),
        [[0, 1], [1]],
        ["a", "b"],
        settings={"labels": "ids", "text": "text"},
        names=["red", "blue"],
    ),
    "parquet-named-labels": Kind(
        files(
            train=pa.table({"title": TEXTS, "tags": IDS}),
            labels=pa.table({"id": range(4), "text": NAMES, "vector": [[0.5]] * 4}),
        ),
        settings={"text": "title", "labels": "tags"},
        names=NAMES,
    ),
    "tsv-quotes": Kind(
        files(
            **{
                "train.tsv.gz": gzip.compress(
                    lines(
                        "Text\tTags",
                        *(
                            '"' + t.replace('"', '""') + '"\t' + ";".join(named(r))
                            for t, r in zip(QUOTED, IDS, strict=True)
                        ),
                    )
                )
            }
        ),
        BY_NAME,
        QUOTED,
        names=sorted(NAMES),
    ),
    "jsonl-nested": Kind(
        files(**{"train.jsonl": lines(*map(json.dumps, NESTED), "")}),
        BY_NAME,
        settings={"text": "doc.title+doc.body", "labels": "tags"},
        names=sorted(NAMES),
    ),
    "jsonl-surrogate": Kind(
        files(**{"data__train.json": b'{"text": "caf\\ud800", "labels": [0]}\n{"labels": [1]}'}),
        [[0], [1]],
        ["caf\ufffd", ""],
    ),
    "jsonl-dotted": Kind(  # keys as pandas' json_normalize writes them
        files(
            **{
                "train.jsonl": lines(
                    *(
                        json.dumps({"review.text": t, "review.tags": named(r)})
                        for t, r in zip(TEXTS, IDS, strict=True)
                    )
                )
            }
        ),
        BY_NAME,
        settings={"labels": "review.tags"},
        names=sorted(NAMES),
    ),
    "csv-tab": Kind(
        files(**{"train.csv": lines("text,tags", "a,lamp\tshelf", "b,shelf")}),
        [[0, 1], [1]],
        ["a", "b"],
        settings={"separator": r"\t"},
        names=["lamp", "shelf"],
    ),
    "jsonl-full-piece": Kind(
        files(
            **{
                "train.jsonl": lines('{"text": "a", "labels": [1]}'),
                "labels.jsonl": lines(*(f'{{"text": "{i}"}}' for i in range(PIECE_ROWS))),
            }
        ),
        [[1]],
        ["a"],
        names=[str(i) for i in range(PIECE_ROWS)],
    ),
    "parquet-dictionary": Kind(
        files(
            train=pa.table(
                {
                    "title": pa.array(TEXTS).dictionary_encode(),
                    "tags": pa.array(
                        list(map(named, IDS)),
                        pa.large_list(pa.dictionary(pa.int8(), pa.string())),
                    ),
                }
            )
        ),
        BY_NAME,
        settings={"text": "title", "labels": "tags"},
        names=sorted(NAMES),
    ),
    "large-list": Kind(typed(pa.large_string(), pa.large_list(pa.int32()))),
    "pecos": Kind(
        files(
            **pecos(IDS, TEXTS, "trn"),
            **pecos(IDS[:2], TEXTS[:2], "tst"),
            **{"output-items.txt": lines(*NAMES)},
        ),
        names=NAMES,
    ),
    "datasets": Kind(
        files(
            **saved("train__", features({"feature": CLASS, "_type": "List"})),
            **saved("test__", rows()),
            **saved("validation__", rows()),
            **{"dataset_dict.json": b'{"splits": ["train", "test", "validation"]}'},
            **{"train__cache-1.arrow": b"no stream"},
        ),
        names=NAMES,
    ),
    "datasets-one": Kind(
        files(
            **saved(
                "",
                pa.table({"text": TEXTS[:2] * 2, "label": [0, 1, 0, 1]}).replace_schema_metadata(
                    {b"huggingface": json.dumps({"info": {"features": SINGLE}}).encode()}
                ),
            )
        ),
        [[0], [1], [0], [1]],
        TEXTS[:2] * 2,
        names=NAMES,
    ),
}
"""Own data that is read; `one split only` is a test of its own."""
