"""Own data: small folders of each kind, with what is read from them, and what is refused."""

from __future__ import annotations

import gzip
import io
import json
import struct

import numpy as np
import pyarrow as pa
from scipy import sparse

from renee_ray.data.sources.lines import PIECE_ROWS
from renee_ray.data.sources.own import SAMPLE_ROWS

from .sources import (
    CLASS,
    IDS,
    NAMES,
    TEXT,
    TEXTS,
    Kind,
    features,
    files,
    refused,
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


OWN_REFUSED = {
    "bag-of-words": refused(
        files(**{"train.txt": lines("2 3 2", "0,1 0:1.0 2:0.5", "1 1:1.0")}),
        r"train\.txt holds a bag of words.*'raw text' archive",
    ),
    "csv-two-texts": refused(
        files(**{"train.csv": lines("title,body,tags", "a,b,c")}),
        r"train\.csv: which column of .*'title', 'body'.*holds the text\?.*text=title labels=tags ",
    ),
    "csv-two-labels": refused(
        files(**{"train.csv": lines("text,tags,topics", "a,b,c")}),
        "'tags', 'topics'.*holds the labels\\?.*text=text labels=tags ",
    ),
    "csv-both-unknown": refused(
        files(**{"train.csv": lines("name,summary,used,needs", "a,a lamp of red,yes,b;c")}),
        r"holds the text and the labels\?.*text=summary labels=needs ",
    ),
    "csv-one-column": refused(
        files(**{"train.csv": lines("name", "a")}), "no column can hold labels"
    ),
    "csv-usual-names": refused(  # an author's name has a comma, and is in Latin-1
        files(**{"train.csv": b'title,body,author,tags,topics\na,b c,"\xc9, e",d,e;f\n'}),
        "holds the text and the labels.*text=body labels=topics ",
    ),
    "csv-two-separators": refused(
        files(**{"train.csv": lines("text;tags", "a;b,c|d")}), r"'\|' or ','.*separator=none"
    ),
    "csv-brackets": refused(
        files(**{"train.csv": lines("text;tags", "a;['b', 'c']")}), "brackets.*JSON lines"
    ),
    "csv-no-column": refused(
        files(**{"train.csv": lines("a,b", "a,b")}), "no column 'c'; it has .'a', 'b'", text="c"
    ),
    "csv-ragged": refused(
        files(**{"train.csv": lines("text,tags", "a,b", "a,b,c")}), r"train\.csv.*2 columns, got 3"
    ),
    "csv-no-id": refused(
        files(**{"train.csv": lines("text,tags", "a,1", "b,x")}), "no id.*'x'", labels="ids"
    ),
    "csv-utf16": refused(
        files(**{"train.csv": "text,tags\na,b\n".encode("utf-16")}), "UTF-16; save it as UTF-8"
    ),
    "csv-empty": refused(files(**{"train.csv": b""}), r"train\.csv"),
    "csv-late-ids": refused(
        files(**{"train.csv": lines("text,n", *["a,7"] * (SAMPLE_ROWS + 1), "b,3 5")}),
        "n has '3 5', and the first rows have no separator",
        labels="n",
        text="text",
    ),
    "csv-test-of-another-kind": refused(
        files(**{"train.csv": lines("text,tags", "a,b"), "test.parquet": b""}),
        r"test\.parquet is there, and the training set is .*train\.csv; write both in one format",
    ),
    "jsonl-filter-labels": refused(
        files(**{"train.jsonl": b'{"text": "a", "labels": ["b"], "filter_labels": ["c"]}\n'}),
        "has a column 'filter_labels'",
    ),
    "jsonl-ids-and-names": refused(
        files(
            **{
                "train.jsonl": b'{"text": "a", "labels": [1]}\n',
                "labels.csv": lines("label,text", "1,two", "0,zero"),
            }
        ),
        r"labels\.csv has a column 'label' and the points have ids",
    ),
    "pecos-names": refused(
        files(**pecos(IDS, TEXTS, "trn"), **{"Y.txt": lines("title", *NAMES, "more")}),
        r"Y\.txt has \d+ lines and .*Y\.trn\.npz has 4 columns",
    ),
    "jsonl-mixed": refused(
        files(
            **{"train.jsonl": lines('{"text": "a", "labels": ["a"]}', '{"labels": 1, "text": ""}')}
        ),
        "labels is not of one kind",
        labels="labels",
    ),
    "jsonl-mixed-guessed": refused(
        files(
            **{
                "train.jsonl": lines(
                    '{"id": 1, "text": "a", "label": "x"}', '{"id": 2, "text": "b", "label": ["y"]}'
                )
            }
        ),
        "label is not of one kind",
    ),
    "jsonl-float": refused(
        files(**{"train.jsonl": lines('{"text": "a", "label": 1.0}')}),
        "label is of type double; it must be strings, integers",
    ),
    "jsonl-two-kinds": refused(
        files(
            **{
                "train__a.jsonl": lines('{"text": "a", "label": "x"}'),
                "train__b.jsonl": lines('{"text": "b", "label": 1}'),
            }
        ),
        r"a\.jsonl and in .*b\.jsonl are list of string and list of integer",
    ),
    "jsonl-later-file": refused(
        files(
            **{
                "train__a.jsonl": lines('{"text": "a", "labels": [1]}'),
                "train__b.jsonl": lines('{"text": "b", "labels": [0.5]}'),
            }
        ),
        r"src/train/b\.jsonl has a column 'labels' of type",
    ),
    "jsonl-empty-test": refused(
        files(**{"train.jsonl": lines('{"text": "a", "labels": [1]}'), "test.jsonl": b""}),
        r"test\.jsonl has no row",
    ),
    "csv-header-test": refused(
        files(**{"train.csv": lines("text,tags", "a,b"), "test.csv": lines("text,tags")}),
        r"test\.csv has no row",
    ),
    "csv-only-test": refused(
        files(**{"test.csv": lines("text,tags", "a,b")}), "no training set.*'test.csv' is there"
    ),
    "csv-late-separator": refused(
        files(**{"train.csv": lines("text,tags", *["a,b"] * SAMPLE_ROWS, "a,b|c")}),
        r"'b\|c', and the first rows have no separator; give separator=",
    ),
    "csv-label-columns": refused(
        files(**{"train.csv": lines("text,tags", "a,b"), "labels.csv": lines("id,name", "0,b")}),
        r"labels\.csv has the columns .'id', 'name'.*'label'",
    ),
    "jsonl-label-kinds": refused(
        files(
            **{
                "train.jsonl": lines('{"text": "a", "labels": ["x"]}'),
                "labels.jsonl": lines('{"label": "x"}', '{"label": ["y"]}'),
            }
        ),
        r"labels\.jsonl: label is not of one kind",
    ),
    "csv-bad-gzip": refused(
        files(**{"train.csv.gz": gzip.compress(lines("text,tags", "a,b"))[:-9]}),
        r"train\.csv\.gz is not a complete gzip file",
    ),
    "csv-no-gzip": refused(
        files(**{"train.csv.gz": lines("text,tags", "a,b")}), "is not a complete gzip file"
    ),
    "jsonl-separator": refused(
        files(**{"train.jsonl": lines('{"text": "a", "labels": ["b|c"]}')}),
        "leave separator= out",
        separator="|",
    ),
    "arrow-offsets": refused(files(**{"train__data-0.arrow": damaged()}), "data-0.arrow cannot be"),
    "arrow-body": refused(files(**{"train__data-0.arrow": immense()}), "data-0.arrow cannot be"),
    "arrow-truncated": refused(
        files(**{"train__data-0.arrow": arrow(rows())[0][:-400]}), "data-0.arrow cannot be read"
    ),
    "pecos-offsets": refused(
        files(**{"X.trn.txt": lines("a", "b"), "Y.trn.npz": npz([0, 9_999_999, 2])}),
        r"Y\.trn\.npz is no sparse matrix",
    ),
    "pecos-truncated": refused(
        files(**{"X.trn.txt": lines("a", "b"), "Y.trn.npz": npz([0, 1, 2])[:-30]}), "no sparse"
    ),
    "pecos-missing": refused(
        files(**{"X.trn.txt": lines("a", "b"), "Y.trn.npz": npz(None)}), "no sparse matrix"
    ),
    "pecos-no-npz": refused(
        files(**{"X.trn.txt": lines("a", "b"), "Y.trn.npz": b"1 2"}), "no sparse matrix"
    ),
    "pecos-named": refused(
        files(**pecos(IDS, TEXTS, "trn")), "leave text=, labels= and separator= out", separator="|"
    ),
    "parquet-separator": refused(typed(), "separator=.*labels=COLUMN", separator="|"),
    "jsonl-array": refused(
        files(**{"train.json": b'[{"text": "a", "labels": [1]}]'}), "write one a line"
    ),
    "jsonl-range": refused(
        files(
            **{
                "train.jsonl": lines('{"text": "a", "labels": [0]}', '{"labels": [0, 4]}'),
                "labels.jsonl": lines(*(json.dumps({"text": name}) for name in NAMES)),
            }
        ),
        r"train\.jsonl: row 1 has 4 in labels, which is none of the 4",
    ),
    "pecos-rows": refused(
        files(**pecos(IDS, TEXTS, "trn") | {"X.trn.txt": lines("a", "b")}), "2 lines .* 6 rows"
    ),
    "repository-named": refused(files(**TEXT), "leave text=, labels= and sep", text="title"),
    "repository-separator": refused(files(**TEXT), "leave text=, labels= and sep", separator=";"),
    "all-held-out": refused(files(**TEXT), "hold out all", validation=0.9, test=0.1),
}
