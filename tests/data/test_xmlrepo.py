from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from renee_ray.data.sources import lines as module
from renee_ray.data.sources import xmlrepo
from renee_ray.data.sources.lines import (
    LineBatch,
    Lines,
    blocks_of,
    count,
    lines_of,
    ranges,
    read,
)
from renee_ray.data.sources.records import Source, SourceError, num_rows
from renee_ray.data.sources.repository import LineTable, agreed
from renee_ray.data.sources.source import find_source


def lines_at(path: Path | str, scratch: Path | str = "nowhere") -> Lines:
    parts = ranges(str(path), str(scratch))
    return lines_of(parts, [count(part) for part in parts])


def block_of(tmp_path: Path, data: bytes, name: str = "trn_X_Y.txt") -> LineBatch:
    path = tmp_path / name
    path.write_bytes(data)
    lines = lines_at(path)
    return read(lines, 0, lines.rows)


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


def indexed(path: str) -> Source:
    found = find_source(path)
    assert not isinstance(found, Source)
    return agreed(found, {file: lines_at(file) for file in found.paths})


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
    assert list(block_of(tmp_path, data)) == lines


@pytest.mark.parametrize("ending", [b"\n", b"", b"\n\n\r\n"])
@pytest.mark.parametrize(("grain", "part"), [(3, 6), (10, 10), (64, 256)])
def test_rows_from_any_grain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: bytes, grain: int, part: int
) -> None:
    """Every range of rows, with and without a header; lines end at, before and after a grain."""
    monkeypatch.setattr(module, "GRAIN_BYTES", grain)
    monkeypatch.setattr(module, "RANGE_BYTES", part)
    rows = [b"x" * (i * 5 % 17) + b"y" for i in range(30)] + [b""] * ending.count(b"\n\n")
    rows += [b""] * ending.count(b"\r")
    path = tmp_path / "trn_X_Y.txt"
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(rows[:30]) + ending)
    whole = lines_at(path)
    assert (whole.rows, whole.solid) == (len(rows), 30)
    for lines, wanted in ((whole, rows), (whole.without_header(), rows[1:])):
        for start in range(len(wanted)):
            for stop in range(start, len(wanted) + 1):
                block = read(lines, start, stop)
                assert list(block) == wanted[start:stop]
                assert len(block) == stop - start
        assert read(lines, 3, 5).where(1) == f"{path}:{len(rows) - len(wanted) + 5}"


def test_blank_rows_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"a\n \nb\n\n\r\n \n")
    lines = lines_at(path)
    assert (lines.rows, lines.without_blank_end().rows) == (6, 3)
    assert [lines.without_blank_tail(rows).rows for rows in (2, 3, 4, 6, 7)] == [6, 3, 4, 6, 6]


def test_blocks_cover_every_row_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("GRAIN_BYTES", 8), ("BLOCK_BYTES", 40), ("BLOCK_ROWS", 7)):
        monkeypatch.setattr(module, name, value)
    paths = tmp_path / "f", tmp_path / "g"
    paths[0].write_bytes(b"".join(b"y" * (i * 5 % 31) + b"\n" for i in range(40)))
    paths[1].write_bytes(b"40 1\n" + b"0:1\n" * 40)
    files = lines_at(paths[0]), lines_at(paths[1]).without_header()
    blocks = blocks_of(40, *files)
    bounds = [(block.first, block.first + block.rows) for block in blocks]
    assert [row for start, stop in bounds for row in range(start, stop)] == list(range(40))
    longest = max(len(read(file, *bound).data) for file in files for bound in bounds)
    assert max(stop - start for start, stop in bounds) <= 7 and longest <= 40 + 31
    assert blocks_of(0, *files) == ()


def test_file_that_shrinks(tmp_path: Path) -> None:
    path = tmp_path / "trn_X.txt"
    path.write_bytes(b"a\nb\n")
    lines = lines_at(path)
    path.write_bytes(b"a\n")
    with pytest.raises(SourceError, match=r"trn_X\.txt became shorter .*no byte 2; convert again"):
        read(lines, 0, 2)
    path.write_bytes(b"a\nbc")
    with pytest.raises(SourceError, match=r"trn_X\.txt was changed .*no line 2; convert again"):
        read(lines, 0, 2)


def test_gzip_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "trn_X.txt.gz"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbfa\nb") + gzip.compress(b"c\n"))
    lines = lines_at(path, tmp_path)
    assert list(read(lines, 0, 2)) == [b"a", b"bc"]
    assert lines.where(1) == f"{path}:2"


@pytest.mark.parametrize("damage", ["truncated", "not gzip", "flipped"])
def test_damaged_gzip(tmp_path: Path, damage: str) -> None:
    packed = gzip.compress(np.random.default_rng(0).bytes(5000))
    path = tmp_path / "trn_X.txt.gz"
    flipped = packed[:-6] + bytes([packed[-6] ^ 1]) + packed[-5:]
    path.write_bytes({"truncated": packed[:-9], "not gzip": b"abc\n", "flipped": flipped}[damage])
    with pytest.raises(SourceError, match=r"trn_X\.txt\.gz is not a complete gzip file .*again"):
        lines_at(path, tmp_path)


def test_utf16(tmp_path: Path) -> None:
    path = tmp_path / "trn_X.txt"
    path.write_text("a\n", encoding="utf-16")
    with pytest.raises(SourceError, match=r"trn_X\.txt:1: the file is in UTF-16; save it as UTF-8"):
        lines_at(path)


def test_replaced_bytes_are_counted(tmp_path: Path) -> None:
    block = block_of(tmp_path, b"ok \xef\xbf\xbd\n\xff\xfea\xe9\nna\xc3\xafve\n\xc3\n")
    found = xmlrepo.parse_texts(block)
    texts = found.columns["text"].to_pylist()
    assert texts == ["ok \ufffd", "\ufffd\ufffda\ufffd", "na\u00efve", "\ufffd"]
    assert found.replaced.tolist() == [0, 3, 0, 1]


# ------------------------------------------------------------------------------------- labels


def test_odd_label_lines(tmp_path: Path) -> None:
    data = b"3:1.00000 1:1.00000\r\n\n 5\t2:1 \n4:0.0 4:1 7:0 6:0.00000\n1:1 1:2 1\n0:1e-3 2:0e5\n9"
    block = block_of(tmp_path, data)
    labels, zeros = xmlrepo.parse_pairs(block, 10)
    assert labels.to_pylist() == [[3, 1], [], [5, 2], [4], [1, 1, 1], [0], [9]]
    assert zeros == 4


def test_label_ids_stay_integers(tmp_path: Path) -> None:
    """Float32 would make 2**24 of the first, float64 2**53 of the second."""
    ids = [2**24 + 1, 2**53 + 1, 10**18 - 1]
    block = block_of(tmp_path, b"\n".join(b"%d:1.0" % i for i in ids))
    assert xmlrepo.parse_pairs(block, 10**18)[0].flatten().to_pylist() == ids


def test_parse_equals_naive_python(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    values = [":1.00000", "", ":1", ":0", ":0.00", ":0.5", ":2e-1", ":.5", ":3.", ":+1"]
    lines = [
        " ".join(f"{i}{values[rng.integers(len(values))]}" for i in rng.integers(0, 300, n))
        for n in rng.integers(0, 12, 500)
    ]
    block = block_of(tmp_path, "\n".join(lines).encode() + b"\n")
    labels, zeros = xmlrepo.parse_pairs(block, 300)
    split = [[(*token.split(":"), "1")[:2] for token in line.split()] for line in lines]
    kept = [[int(i) for i, value in line if float(value) != 0] for line in split]
    assert labels.to_pylist() == kept
    assert zeros == sum(len(a) - len(b) for a, b in zip(split, kept, strict=True))


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("-3:1.0", "label id -3 is negative; ids count from 0"),
        ("-3", "label id -3 is negative"),
        ("10:1.0", "label id 10 is out of range, there are 10 labels"),
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
        xmlrepo.parse_pairs(block_of(tmp_path, data), 10)


def test_an_id_far_above_any_label_when_their_number_is_unknown(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r":1: label id 100000000 is implausibly large; add"):
        xmlrepo.parse_pairs(block_of(tmp_path, b"100000000:1\n"), None)


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
    assert xmlrepo.header_of(block_of(tmp_path, data).lines, texts) == header


def test_filter_lines(tmp_path: Path) -> None:
    block = block_of(tmp_path, b"\xef\xbb\xbf4 1\r\n\n 0\t3 \n4 1", "trn_filter_labels.txt")
    pairs = xmlrepo.parse_filters(block, 5, 4).columns
    assert {name: column.to_pylist() for name, column in pairs.items()} == {
        "row": [4, 0, 4],
        "label": [1, 3, 1],
    }


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1", "malformed filter line '1'; write two integers, row and label"),
        ("1 2 3", "malformed filter line '1 2 3'"),
        ("-1 2", "malformed filter line '-1 2'"),
        ("1 -2", "malformed filter line '1 -2'"),
        ("1 2:1.0", r"malformed filter line '1 2:1\.0'"),
        ("a b", "malformed filter line 'a b'"),
        ("5 2", "row 5 is out of range, the split has 5 points"),
        ("9" * 25 + " 2", "row " + "9" * 25 + " is out of range"),
        ("1 4", "label id 4 is out of range, there are 4 labels"),
    ],
)
def test_bad_filter_lines(tmp_path: Path, line: str, message: str) -> None:
    block = block_of(tmp_path, f"0 1\n\n{line}\n9 9\n".encode(), "trn_filter_labels.txt")
    with pytest.raises(SourceError, match=rf"/trn_filter_labels\.txt:3: {message}"):
        xmlrepo.parse_filters(block, 5, 4)


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
    found = xmlrepo.parse_objects(block, 4)
    texts, labels = found.columns["text"].to_pylist(), found.columns["labels"].to_pylist()
    assert texts == ["T C c", "only", "", "\ufffd!", "\ufffd\ufffd"]
    assert found.replaced.tolist() == [0, 0, 0, 1, 2]
    assert labels == [[3, 1, 3], [2], [], [0], []]
    assert found.zeros == 1


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
        ('{"target_ind": [-1]}', "label id -1 is negative"),
        ('{"target_ind": [4]}', "label id 4 is out of range, there are 4 labels"),
        ('{"target_ind": [1], "target_rel": []}', r"target_rel is \[\]; write a number"),
        ('{"target_ind": [1], "target_rel": ["a"]}', r"target_rel is \['a'\]"),
        ('{"target_ind": [1], "target_rel": [NaN]}', r"target_rel is \[nan\]"),
    ],
)
def test_bad_json_lines(tmp_path: Path, line: str, message: str) -> None:
    data = f'{{"target_ind": []}}\n{line}\n{{worse\n'.encode()
    with pytest.raises(SourceError, match=rf"/trn\.json:2: {message}"):
        xmlrepo.parse_objects(block_of(tmp_path, data, "trn.json"), 4)


# ------------------------------------------------------------------------------------- folders


def test_a_good_folder(tmp_path: Path) -> None:
    raw = indexed(source(tmp_path))
    assert raw.num_labels == 4 and num_rows(raw.train) == 3 and raw.test is not None
    assert isinstance(raw.train, LineTable)
    assert raw.train.files[1].where(0).endswith("trn_X_Y.txt:2")


@pytest.mark.parametrize(
    "files",
    [
        {"trn_X": "a\nb\nc\n\n\n"},
        {"trn_X_Y": "3 4\n0:1\n1:1 3:1\n2:1\n\n\r\n"},
        {"Y": "w\nx\ny\nz\n\n"},
        {"trn_X_Y": "0:1\n1:1 3:1\n2:1\n", "tst_X_Y": "1:1\n"},
        {"Y": None},
        {"trn_X_Y": "0:1\n1:1 3:1\n2:1\n", "Y": None},
    ],
)
def test_blank_ends_and_missing_headers(tmp_path: Path, files: dict[str, str | None]) -> None:
    raw = indexed(source(tmp_path, **files))
    assert raw.num_labels == 4 and num_rows(raw.train) == 3


def test_no_header_and_no_label_texts(tmp_path: Path) -> None:
    files = {"trn_X_Y": "0:1\n1:1 3:1\n2:1\n", "tst_X_Y": "1:1\n", "Y": None}
    assert indexed(source(tmp_path, **files)).num_labels is None


def test_no_test_split(tmp_path: Path) -> None:
    assert indexed(source(tmp_path, tst_X=None, tst_X_Y=None)).test is None


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
            r"/trn_X\.txt has 2 lines and .*/trn_X_Y\.txt has labels for 3 rows; make one line",
        ),
        ({"tst_X": "d\ne\n"}, r"/tst_X\.txt has 2 lines and .*/tst_X_Y\.txt has labels for 1"),
        ({"trn_X_Y": "0:1\n1:1\n"}, r"/trn_X\.txt has 3 lines and .*/trn_X_Y\.txt has .* 2 rows"),
        ({"Y": "w\nx\ny\n"}, r"/Y\.txt has 3 lines and .*/trn_X_Y\.txt:1 says 4 labels; correct"),
        ({"tst_X_Y": "1 5\n1:1\n"}, r"/Y\.txt has 4 lines and .*/tst_X_Y\.txt:1 says 5 labels"),
        (
            {"tst_X_Y": "1 5\n1:1\n", "Y": None},
            r"/tst_X_Y\.txt:1: the header says 5 labels and .*/trn_X_Y\.txt:1 says 4; correct one",
        ),
        (
            {"trn_X": "", "trn_X_Y": "0 4\n"},
            r"/trn_X\.txt holds no training point; give a training set of at least one",
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
        indexed(source(tmp_path, **files))


def test_carriage_returns_are_no_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts may have a few in their lines; labels have none; a file of them alone is refused."""
    texts = indexed(source(tmp_path, trn_X="a\rb\nc\nd\n")).train
    assert isinstance(texts, LineTable) and texts.files[0].returns == 1
    found = indexed(source(tmp_path, trn_X_Y="3 4\n0:1\n1:1\r3:1\n2:1\n"))
    assert isinstance(found.train, LineTable)
    labels = found.train.files[1]
    with pytest.raises(SourceError, match=r"trn_X_Y\.txt:3: a carriage return within the line"):
        xmlrepo.parse_pairs(read(labels, 0, 3), 4)
    with pytest.raises(
        SourceError, match=r"3 lines and .* 4 rows.* 1 carriage returns end no line"
    ):
        indexed(source(tmp_path, trn_X="a\rb\nc\nd\n", trn_X_Y="0\n1\n2\n3\n"))
    for grain in (1, 2, 1 << 20):
        monkeypatch.setattr(module, "GRAIN_BYTES", grain)
        for ending in ("\r", "\n", ""):
            with pytest.raises(SourceError, match=r"trn_X\.txt has . line feeds and [23] carriage"):
                indexed(source(tmp_path, trn_X="a\rb\rc\rd"[: -1 if ending else None] + ending))
