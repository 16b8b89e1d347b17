from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from renee_ray.data.sources import lines as lines_module
from renee_ray.data.sources import xmlrepo
from renee_ray.data.sources.lines import Lines
from renee_ray.data.sources.records import SourceError
from renee_ray.data.sources.repository import Repository, find_repository, header_of
from renee_ray.data.sources.xmlrepo import Where


def block_of(tmp_path: Path, data: bytes, name: str = "trn_X_Y.txt") -> tuple[list[bytes], Where]:
    """The lines of a file, and what names one of them."""
    path = tmp_path / name
    path.write_bytes(data)
    return list(Lines(str(path))), lambda i: f"{path}:{i + 1}"


def source(tmp_path: Path, **files: str | bytes | None) -> str:
    """A small good repository in which `files` replace or (None) remove files."""
    good: dict[str, str | bytes | None] = {
        "trn_X": "a\nb\nc\n",
        "trn_X_Y": "3 4\n0:1\n1:1 3:1\n2:1\n",
        "tst_X": "d\n",
        "tst_X_Y": "1 4\n1:1\n",
        "Y": "w\nx\ny\nz\n",
        **files,
    }
    for name, text in good.items():
        if text is not None:
            data = text.encode() if isinstance(text, str) else text
            (tmp_path / f"{name}.txt").write_bytes(data)
    return str(tmp_path)


def found_at(path: str) -> Repository:
    found = find_repository(path)
    assert found is not None
    return found


def read(path: str) -> dict[str, list[dict[str, Any]]]:
    """The rows of each split, and of the labels."""
    found = found_at(path)
    return {
        split: [row for piece in found.pieces(split, []) for row in piece.table.to_pylist()]
        for split, _ in found.tasks()
    }


# ------------------------------------------------------------------------------ lines and reads


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (b"", []),
        (b"\n", [b""]),
        (b"a", [b"a"]),
        (b"a\nb", [b"a", b"b"]),
        (b"a\r\n\r\nb\r\n", [b"a", b"", b"b"]),
        (b"\xef\xbb\xbfa\nb\n", [b"a", b"b"]),
        (b"\xef\xbb\xbf", []),
        ("a\u2028b\x0bc\x85d\re\nf\n".encode(), ["a\u2028b\x0bc\x85d\re".encode(), b"f"]),
        (b"a\r\r\nb\r", [b"a\r", b"b"]),
    ],
)
def test_lines_end_at_newlines_only(tmp_path: Path, data: bytes, lines: list[bytes]) -> None:
    assert block_of(tmp_path, data)[0] == lines


def test_gzip_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "trn_X.txt.gz"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbfa\nb") + gzip.compress(b"c\n"))
    assert list(Lines(str(path))) == [b"a", b"bc"]


def test_file_that_shrinks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines_module, "REQUEST_BYTES", 2)
    path = tmp_path / "trn_X.txt"
    path.write_bytes(b"a\nb\nc\n")
    with lines_module.opened(str(path)) as file:
        assert file.read() == b"a\nb\nc\n"
    lines = iter(Lines(str(path)))
    assert next(lines) == b"a"
    path.write_bytes(b"a\nb")
    with pytest.raises(SourceError, match=r"trn_X\.txt became shorter .*no byte 3; convert again"):
        list(lines)


@pytest.mark.parametrize("damage", ["truncated", "not gzip", "flipped"])
def test_damaged_gzip(tmp_path: Path, damage: str) -> None:
    packed = gzip.compress(np.random.default_rng(0).bytes(5000))
    path = tmp_path / "trn_X.txt.gz"
    flipped = packed[:-6] + bytes([packed[-6] ^ 1]) + packed[-5:]
    path.write_bytes({"truncated": packed[:-9], "not gzip": b"abc\n", "flipped": flipped}[damage])
    with pytest.raises(SourceError, match=r"trn_X\.txt\.gz is not a complete gzip file .*again"):
        Lines(str(path)).drain()


def test_utf16(tmp_path: Path) -> None:
    path = tmp_path / "trn_X.txt"
    path.write_text("a\n", encoding="utf-16")
    with pytest.raises(SourceError, match=r"trn_X\.txt:1: the file is in UTF-16; save it as UTF-8"):
        Lines(str(path)).drain()


# ------------------------------------------------------------------------------------- labels


def test_odd_label_lines(tmp_path: Path) -> None:
    data = b"3:1.00000 1:1.00000\r\n\n 5\t2:1 \n4:0.0 4:1 7:0 6:0.00000\n1:1 1:2 1\n0:1e-3 2:0e5\n9"
    block = block_of(tmp_path, data)
    labels, zeros = xmlrepo.parse_pairs(*block, 10)
    assert labels.to_pylist() == [[3, 1], [], [5, 2], [4], [1, 1, 1], [0], [9]]
    assert zeros == 4


def test_label_ids_stay_integers(tmp_path: Path) -> None:
    """Float32 would make 2**24 of the first, float64 2**53 of the second."""
    ids = [2**24 + 1, 2**53 + 1, 10**18 - 1]
    block = block_of(tmp_path, b"\n".join(b"%d:1.0" % i for i in ids))
    assert xmlrepo.parse_pairs(*block, 10**18)[0].flatten().to_pylist() == ids


def test_parse_equals_naive_python(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    values = [":1.00000", "", ":1", ":0", ":0.00", ":0.5", ":2e-1", ":.5", ":3.", ":+1"]
    lines = [
        " ".join(f"{i}{values[rng.integers(len(values))]}" for i in rng.integers(0, 300, n))
        for n in rng.integers(0, 12, 500)
    ]
    block = block_of(tmp_path, "\n".join(lines).encode() + b"\n")
    labels, zeros = xmlrepo.parse_pairs(*block, 300)
    split = [[(*token.split(":"), "1")[:2] for token in line.split()] for line in lines]
    kept = [[int(i) for i, value in line if float(value) != 0] for line in split]
    assert labels.to_pylist() == kept
    assert zeros == sum(len(a) - len(b) for a, b in zip(split, kept, strict=True))


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("-3:1.0", "label id -3 is out of range, ids are from 0 to 9; correct"),
        ("-3", "label id -3 is out of range"),
        ("10:1.0", "label id 10 is out of range, ids are from 0 to 9"),
        ("9" * 30 + ":1", "label id " + "9" * 30 + " is out of range"),
        ("9223372036854775808:1", "label id 9223372036854775808 is out of range"),
        ("a:1", "malformed pair 'a:1'; write id:value"),
        (":1", "malformed pair ':1'"),
        ("3:", "malformed pair '3:'"),
        ("3:x", "malformed pair '3:x'"),
        ("3:1:1", "malformed pair '3:1:1'"),
        ("3.0:1", r"malformed pair '3\.0:1'"),
        ("3:nan", "malformed pair '3:nan'"),
        ("3:inf", "malformed pair '3:inf'"),
        ("3:-1", "malformed pair '3:-1'"),
        ("3:1_0", "malformed pair '3:1_0'"),
        ("3:1.0.0", r"malformed pair '3:1\.0\.0'"),
        ("1,2:1", "malformed pair '1,2:1'"),
        ("\u00e9:1", "malformed pair '\u00e9:1'"),
        ("--3:1", "malformed pair '--3:1'"),
        ("\u0663:1", "malformed pair '\u0663:1'"),
    ],
)
@pytest.mark.parametrize("same", [True, False])
def test_bad_pairs(tmp_path: Path, token: str, message: str, same: bool) -> None:
    """The first bad one is named, its line too; alone and among others."""
    others = "" if same else "1:1.0 2:0.5 "
    data = f"{others}\n{others}\n{others}{token}\n-7:1\n".encode()
    with pytest.raises(SourceError, match=rf"/trn_X_Y\.txt:3: {message}"):
        xmlrepo.parse_pairs(*block_of(tmp_path, data), 10)


@pytest.mark.parametrize(
    ("data", "texts", "header"),
    [
        (b"2 5\n0:1\n1:1\n", 2, (2, 5)),
        (b"2 5\r\n0\n1\n", 2, (2, 5)),
        (b"0:1\n1:1\n", 2, None),
        (b"3 5\n0\n1 4\n", 3, (3, 5)),
        (b"2 5\n0\n1 4\n", 3, None),
        (b"7 5\n0:1\n1:1\n", 3, (7, 5)),
        (b"7 5 3\n1\n", 2, None),
        (b"5\n1\n", 2, None),
        (b"\n1\n", 2, None),
        (b"", 0, None),
    ],
)
def test_header(tmp_path: Path, data: bytes, texts: int, header: tuple[int, int] | None) -> None:
    (tmp_path / "trn_X_Y.txt").write_bytes(data)
    (tmp_path / "trn_X.txt").write_bytes(b"a\n" * texts)
    assert header_of(str(tmp_path / "trn_X_Y.txt"), str(tmp_path / "trn_X.txt")) == header


def test_filter_lines(tmp_path: Path) -> None:
    block = block_of(tmp_path, b"\xef\xbb\xbf4 1\r\n\n 0\t3 \n4 1", "trn_filter_labels.txt")
    pairs = xmlrepo.parse_filters(*block, 4)
    assert [column.tolist() for column in pairs] == [[0, 2, 3], [4, 0, 4], [1, 3, 1]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1", "malformed filter line '1'; write two integers, row and label"),
        ("1 2 3", "malformed filter line '1 2 3'"),
        ("-1 2", "malformed filter line '-1 2'"),
        ("1 -2", "malformed filter line '1 -2'"),
        ("1 2:1.0", r"malformed filter line '1 2:1\.0'"),
        ("a b", "malformed filter line 'a b'"),
        ("1 4", "label id 4 is out of range, ids are from 0 to 3"),
    ],
)
def test_bad_filter_lines(tmp_path: Path, line: str, message: str) -> None:
    block = block_of(tmp_path, f"0 1\n\n{line}\n9 9\n".encode(), "trn_filter_labels.txt")
    with pytest.raises(SourceError, match=rf"/trn_filter_labels\.txt:3: {message}"):
        xmlrepo.parse_filters(*block, 4)


# --------------------------------------------------------------------------------------- JSON


def test_json_lines(tmp_path: Path) -> None:
    records = [
        {"uid": "x", "title": "T", "content": "C c", "target_ind": [3, 1, 3]},
        {"title": "only", "target_ind": [2, 0], "target_rel": [1.0, 0.0]},
        {"content": None, "target_ind": []},
        {"title": "\ud800!", "target_ind": [0]},
    ]
    data = "\r\n".join(json.dumps(record) for record in records).encode()
    block = block_of(tmp_path, data + b'\n{"title": "\xff\xff", "target_ind": []}', "trn.json")
    found, odd = xmlrepo.parse_objects(*block, 4)
    texts, labels = found["text"].to_pylist(), found["labels"].to_pylist()
    assert texts == ["T C c", "only", "", "\ufffd!", "\ufffd\ufffd"]
    assert labels == [[3, 1, 3], [2], [], [0], []]
    assert odd == {"replaced_lines": 2, "replaced_bytes": 3, "zero_values": 1}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{bad", r"bad JSON \(.*\) in '\{bad'; write one JSON object a line"),
        ("", "bad JSON"),
        ("[1]", r"'\[1\]' is no JSON object"),
        ('{"title": 5, "target_ind": []}', "title is 5; write a string"),
        ('{"content": ["x"], "target_ind": []}', r"content is \['x'\]; write a string"),
        ('{"title": "x"}', "target_ind is None; write a list of integer ids"),
        ('{"target_ind": 3}', "target_ind is 3"),
        ('{"target_ind": [1.0]}', r"target_ind is \[1\.0\]"),
        ('{"target_ind": ["1"]}', r"target_ind is \['1'\]"),
        ('{"target_ind": [true]}', r"target_ind is \[True\]"),
        ('{"target_ind": [-1]}', "label id -1 is out of range"),
        ('{"target_ind": [4]}', "label id 4 is out of range, ids are from 0 to 3"),
        ('{"target_ind": [1], "target_rel": []}', r"target_rel is \[\]; write a number"),
        ('{"target_ind": [1], "target_rel": ["a"]}', r"target_rel is \['a'\]"),
        ('{"target_ind": [1], "target_rel": [NaN]}', r"target_rel is \[nan\]"),
    ],
)
def test_bad_json_lines(tmp_path: Path, line: str, message: str) -> None:
    data = f'{{"target_ind": []}}\n{line}\n{{worse\n'.encode()
    with pytest.raises(SourceError, match=rf"/trn\.json:2: {message}"):
        xmlrepo.parse_objects(*block_of(tmp_path, data, "trn.json"), 4)


# ------------------------------------------------------------------------------------- folders


def test_a_good_folder(tmp_path: Path) -> None:
    path = source(tmp_path)
    (tmp_path / "trn_filter_labels.txt").write_text("2 3\n\n0 1\n2 0\n")
    rows = read(path)
    train = [(row["text"], row["labels"], row["filter_labels"]) for row in rows["train"]]
    assert train == [(b"a", [0], [1]), (b"b", [1, 3], []), (b"c", [2], [3, 0])]
    assert rows["test"] == [{"text": b"d", "labels": [1]}] and len(rows["labels"]) == 4
    (piece,) = found_at(path).pieces("train", [])
    where = f"{piece.path}{piece.between}{piece.number}"
    assert where.endswith("trn_X_Y.txt:2") and found_at(path).num_labels == 4


def test_pieces_hold_few_bytes_of_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines_module, "PIECE_BYTES", 50)
    ids = [[4 * row, *range(5)] for row in range(40)]
    labels = "".join(" ".join(f"{i}:1" for i in row) + "\n" for row in ids)
    path = source(tmp_path, trn_X="a\n" * 40, trn_X_Y=f"40 200\n{labels}", tst_X=None, tst_X_Y=None)
    pieces = list(found_at(path).pieces("train", []))
    assert [row for piece in pieces for row in piece.table["labels"].to_pylist()] == ids
    assert max(len(piece.table) for piece in pieces) == 3
    rows = np.cumsum([0, *(len(piece.table) for piece in pieces)])
    assert [piece.number for piece in pieces] == (rows[:-1] + 2).tolist()
    monkeypatch.setattr(lines_module, "PIECE_ROWS", 3)
    numbers = [piece.number for piece in found_at(source(tmp_path)).pieces("labels", [])]
    assert numbers == [1, 4]


@pytest.mark.parametrize("lines", ["", " \n\n"])
def test_a_filter_file_without_pairs(tmp_path: Path, lines: str) -> None:
    path = source(tmp_path)
    (tmp_path / "trn_filter_labels.txt").write_text(lines)
    assert [row["filter_labels"] for row in read(path)["train"]] == [[], [], []]


def test_a_filter_row_that_is_no_point(tmp_path: Path) -> None:
    path = source(tmp_path)
    for row in ("3", "9" * 25):
        (tmp_path / "trn_filter_labels.txt").write_text(f"1 1\n\n{row} 1\n0 1\n")
        with pytest.raises(SourceError, match=r"filter_labels\.txt:3: row \d+ is out of range"):
            read(path)


def test_a_header_is_one_beside_blank_ends(tmp_path: Path) -> None:
    (tmp_path / "trn_X_Y.txt").write_bytes(b"3 10\n1\n2\n3\n")
    (tmp_path / "trn_X.txt").write_bytes(b"a\nb\nc\n\n")
    assert header_of(f"{tmp_path}/trn_X_Y.txt", f"{tmp_path}/trn_X.txt") == (3, 10)


@pytest.mark.parametrize(
    "files",
    [
        {"trn_X": "a\nb\nc\n\n\n"},
        {"trn_X_Y": "3 4\n0:1\n1:1 3:1\n2:1\n\n\r\n"},
        {"Y": "w\nx\ny\nz\n\n"},
        {"trn_X": "a\nb\nc\n\n", "trn_X_Y": "3 4\n0:1\n1:1 3:1\n2:1\n \n"},
        {"trn_X_Y": "0:1\n1:1 3:1\n2:1\n", "tst_X_Y": "1:1\n"},
        {"Y": None},
        {"trn_X_Y": "0:1\n1:1 3:1\n2:1\n\n", "Y": None},
    ],
)
def test_blank_ends_and_missing_headers(tmp_path: Path, files: dict[str, str | None]) -> None:
    path = source(tmp_path, **files)
    rows = read(path)
    assert found_at(path).num_labels == 4 or len(rows["labels"]) == 4
    assert [row["labels"] for row in rows["train"]] == [[0], [1, 3], [2]]


def test_no_header_and_no_label_texts(tmp_path: Path) -> None:
    files = {"trn_X_Y": "0:1\n1:1 3:1\n2:1\n", "tst_X_Y": "100000000:1\n", "Y": None}
    path = source(tmp_path, **files)
    assert found_at(path).num_labels is None
    with pytest.raises(
        SourceError, match=r"tst_X_Y\.txt:1: label id 100000000 is implausibly .*'rows columns'"
    ):
        read(path)


def test_no_test_split(tmp_path: Path) -> None:
    assert "test" not in read(source(tmp_path, tst_X=None, tst_X_Y=None))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"trn_X_Y": "4 4\n0:1\n1:1 3:1\n2:1\n"},
            r"/trn_X_Y\.txt:1: the header says 4 rows and 3 follow; correct the header",
        ),
        ({"trn_X_Y": "2 4\n0:1\n1:1\n2:1\n"}, r"/trn_X_Y\.txt:1: the header says 2 rows and 3"),
        (
            {"trn_X": "a\nb\n"},
            r"/trn_X\.txt has 2 texts and .*/trn_X_Y\.txt has labels for 3 rows; make one line",
        ),
        ({"tst_X": "d\ne\n"}, r"/tst_X\.txt has 2 texts and .*/tst_X_Y\.txt has labels for 1"),
        ({"trn_X_Y": "0:1\n1:1\n"}, r"/trn_X\.txt has 3 texts and .*/trn_X_Y\.txt has .* 2 rows"),
        ({"Y": "w\nx\ny\n"}, r"/Y\.txt has 3 rows and a header says 4 labels; correct"),
        ({"tst_X_Y": "1 5\n1:1\n"}, r"/tst_X_Y\.txt:1: the header says 5 labels and .* says 4"),
        (
            {"tst_X_Y": "1 5\n1:1\n", "Y": None},
            r"/tst_X_Y\.txt:1: the header says 5 labels and .*/trn_X_Y\.txt:1 says 4; correct one",
        ),
        (
            {"trn_X_Y": "3 99999999999999999999\n0:1\n1:1\n2:1\n"},
            r"/trn_X_Y\.txt:1: the header says 99999999999999999999 labels, above the limit",
        ),
        ({"trn_X": None}, r"/trn_X_Y\.txt is there but .*/trn_X\.txt is missing; add it"),
        ({"trn_X_Y": None}, r"/trn_X\.txt is there but .*/trn_X_Y\.txt is missing; add it"),
        ({"tst_X_Y": None}, r"/tst_X\.txt is there but .*/tst_X_Y\.txt is missing; add it"),
    ],
)
def test_folders_that_disagree(tmp_path: Path, files: dict[str, str | None], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        read(source(tmp_path, **files))


def test_carriage_returns_are_no_line_ends(tmp_path: Path) -> None:
    """Texts may have a few in their lines; labels have none; a file of them alone is refused."""
    texts = Lines(str(Path(source(tmp_path, trn_X="a\rb\nc\nd\n")) / "trn_X.txt"))
    assert texts.drain().returns == 1
    with pytest.raises(SourceError, match=r"trn_X_Y\.txt:3: a carriage return within the line"):
        read(source(tmp_path, trn_X_Y="3 4\n0:1\n1:1\r3:1\n2:1\n"))
    with pytest.raises(
        SourceError, match=r"3 texts and .* 4 rows.* 1 carriage returns end no line"
    ):
        read(source(tmp_path, trn_X="a\rb\nc\nd\n", trn_X_Y="0\n1\n2\n3\n"))
    for ending in ("\r", "\n", ""):
        data = "a\rb\rc\rd"[: -1 if ending else None] + ending
        with pytest.raises(SourceError, match=r"trn_X\.txt has . line feeds and [23] carriage"):
            read(source(tmp_path, trn_X=data, trn_X_Y="0\n"))
