"""A folder of the Extreme Classification Repository: its files, and the rows that are in them.

    texts    {trn,tst}_X.txt, {trn,tst}_X_Y.txt (labels), Y.txt (label texts)
    JSON     {trn,tst}.json, lbl.json (label texts)
    tokens   {tokenizer}-{length}/*.dat (memmaps.py), {trn,tst}_X_Y.txt

With each, optionally, {trn,tst}_filter_labels.txt; each file plain or with .gz added. What is in
a line: xmlrepo.py. A task reads the files of a split together, from their start to their end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice, repeat

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from renee_ray.data.dataset.schema import MAX_LABELS
from renee_ray.data.sources.lines import Lines, chunked
from renee_ray.data.sources.memmaps import Memmap, find_memmaps
from renee_ray.data.sources.records import (
    MAX_INFERRED_LABELS,
    Int64s,
    Piece,
    SourceError,
    lists_of,
)
from renee_ray.data.sources.xmlrepo import Where, parse_filters, parse_objects, parse_pairs
from renee_ray.data.storage import filesystem_of

MAX_HEADER_DIGITS = 100
HEAD_LINES = 100


@dataclass(frozen=True)
class SplitFiles:
    """The files of one split; None where there is none.

    labels: None: they are in the JSON lines of `texts`.
    header: rows and columns, as the first line of `labels` says.
    """

    texts: str | Memmap
    labels: str | None
    filters: str | None
    header: tuple[int, int] | None = None

    @property
    def labelled(self) -> str:
        """The file that holds the labels."""
        return self.labels or str(self.texts)


@dataclass(frozen=True)
class Repository:
    """The files of a folder. num_labels: as headers say, or None."""

    splits: dict[str, SplitFiles]
    label_texts: str | Memmap | None
    num_labels: int | None
    notes = ()

    def tasks(self) -> list[tuple[str, list[str]]]:
        """Returns (split, one of its files, for errors) of each task."""
        tasks = [(name, [files.labelled]) for name, files in self.splits.items()]
        if self.label_texts is not None:
            tasks.append(("labels", [getattr(self.label_texts, "path", str(self.label_texts))]))
        return tasks

    def pieces(self, split: str, paths: list[str]) -> Iterator[Piece]:
        """Yields the rows of a split.

        Raises:
            SourceError: a bad line, no row, or files that disagree on their number.
        """
        if split == "labels":
            yield from self._labels()
            return
        files = self.splits[split]
        unknown = MAX_INFERRED_LABELS if self.label_texts is None else MAX_LABELS
        limit = unknown if self.num_labels is None else self.num_labels
        filters = _filters(files.filters, limit) if files.filters else None
        made = _pairs(files, limit) if files.labels else _objects(files.labelled, limit)
        rows = 0
        for piece in made:
            if filters is not None:
                lists = _lists(filters, rows, len(piece.table))
                piece = replace(piece, table=piece.table.append_column("filter_labels", lists))
            yield piece
            rows += len(piece.table)
        if filters is not None and len(filters["row"]) and filters["row"][-1] >= rows:
            line, row = (
                filters[name][np.searchsorted(filters["row"], rows)] for name in ("line", "row")
            )
            raise SourceError(
                f"{files.filters}:{line}: row {row} is out of range, the split has {rows} points "
                f"(rows count from 0); correct the row or remove the line"
            )

    def _labels(self) -> Iterator[Piece]:
        texts, expected = self.label_texts, self.num_labels
        assert texts is not None
        if isinstance(texts, Memmap):
            yield from _numbered_pieces(texts.pieces(), texts.path, 0, ": row ")
            path, rows, ends = texts.path, texts.rows, texts.rows
        elif self.splits["train"].labels is None:
            yield from _objects(texts, None)
            return
        else:
            lines = Lines(texts)
            yield from _numbered_pieces(_texts(islice(lines, expected)), texts, 1, ":")
            lines.drain()
            path, rows, ends = texts, lines.number, lines.solid
        if expected is not None and not ends <= expected <= rows:
            raise SourceError(
                f"{path} has {rows} rows and a header says {expected} labels; correct "
                f"the header or complete the label texts"
            )


# --------------------------------------------------------------------------------------- files


_NAMES = {
    "trn_X": ("trn_X.txt", "raw/trn_X.txt"),
    "tst_X": ("tst_X.txt", "raw/tst_X.txt"),
    "Y": ("Y.txt", "raw/Y.txt"),
    "trn_X_Y": ("trn_X_Y.txt",),
    "tst_X_Y": ("tst_X_Y.txt",),
    "trn_filter": ("trn_filter_labels.txt", "filter_labels_train.txt"),
    "tst_filter": ("tst_filter_labels.txt", "filter_labels_test.txt"),
    "trn_json": ("trn.json",),
    "tst_json": ("tst.json",),
    "lbl_json": ("lbl.json",),
}


def find_repository(path: str) -> Repository | None:
    """Finds the files in folder `path` (local, or a URL), and reads the headers of labels.

    Returns:
        None without a training set.

    Raises:
        SourceError: half a split, or headers that disagree.
    """
    filesystem, root = filesystem_of(path)
    base = path.rstrip("/")
    files = {
        role: next(
            (
                f"{base}/{name}{suffix}"
                for name in names
                for suffix in ("", ".gz")
                if filesystem.get_file_info(f"{root}/{name}{suffix}").type == pafs.FileType.File
            ),
            None,
        )
        for role, names in _NAMES.items()
    }
    is_json = files["trn_X"] is None and files["trn_json"] is not None
    tokens = find_memmaps(path) if files["trn_X"] is None and files["trn_X_Y"] else {}
    splits = dict[str, SplitFiles]()
    for name, short in (("train", "trn"), ("test", "tst")):
        split = _split_files(base, short, files, is_json, tokens)
        if split is not None:
            splits[name] = split
    if "train" not in splits:
        return None
    said = [(split.labels, split.header[1]) for split in splits.values() if split.header]
    for labels, columns in said[1:]:
        if columns != said[0][1]:
            raise SourceError(
                f"{labels}:1: the header says {columns} labels and {said[0][0]}:1 says "
                f"{said[0][1]}; correct one of them"
            )
    texts = tokens.get("lbl") if "trn_doc" in tokens else files["lbl_json" if is_json else "Y"]
    return Repository(splits, texts, said[0][1] if said else None)


def _split_files(
    base: str,
    split: str,
    files: dict[str, str | None],
    is_json: bool,
    tokens: dict[str, Memmap],
) -> SplitFiles | None:
    filters = files[f"{split}_filter"]
    if is_json:
        objects = files[f"{split}_json"]
        return SplitFiles(objects, None, filters) if objects else None
    labels = files[f"{split}_X_Y"]
    texts: str | Memmap | None = files[f"{split}_X"]
    if labels and f"{split}_doc" in tokens:
        texts = tokens[f"{split}_doc"]
    if texts and labels:
        return SplitFiles(texts, labels, filters, header_of(labels, texts))
    if texts or labels:
        there, missing = texts or labels, f"{split}_X.txt" if labels else f"{split}_X_Y.txt"
        raise SourceError(f"{there} is there but {base}/{missing} is missing; add it (or its .gz)")
    return None


def header_of(path: str, texts: str | Memmap) -> tuple[int, int] | None:
    """Returns (rows, columns) if the first line of a label file is a header, else None.

    A file of bare ids can begin with a row of two labels: it is no header if the lines, the
    first included, are as many as the texts and its first number says otherwise. Blank lines at
    the end may count or not.
    """
    head = list(islice(Lines(path), HEAD_LINES))
    fields = head[0].split() if head else []
    if len(fields) != 2 or not all(f.isdigit() and len(f) <= MAX_HEADER_DIGITS for f in fields):
        return None
    rows, columns = map(int, fields)
    if columns > MAX_LABELS:
        raise SourceError(
            f"{path}:1: the header says {columns} labels, above the limit of {MAX_LABELS}; "
            f"correct it"
        )
    if not any(b":" in line for line in head[1:]):
        if isinstance(texts, Memmap):
            there = {texts.rows}
        else:
            read = Lines(texts).drain()
            there = {read.number, read.solid}
        if rows not in there:
            own = Lines(path).drain()
            return None if {own.number, own.solid} & there else (rows, columns)
    return rows, columns


# ---------------------------------------------------------------------------------------- rows


def _numbered(path: str, first: int) -> Where:
    return lambda i: f"{path}:{first + i}"


def _texts(lines: Iterable[bytes]) -> Iterator[pa.Table]:
    return (pa.table({"text": pa.array(each, pa.large_binary())}) for each in chunked(lines))


def _numbered_pieces(
    tables: Iterable[pa.Table], path: str, first: int, between: str
) -> Iterator[Piece]:
    for table in tables:
        yield Piece(table, path, first, between)
        first += len(table)


def _pairs(files: SplitFiles, limit: int) -> Iterator[Piece]:
    """Reads texts, or tokens, and the lines of their labels; blank lines at the end may be more."""
    assert files.labels is not None
    labels, texts, rows = Lines(files.labels), files.texts, 0
    begin = 1 if files.header is None else 2
    wanted = islice(labels, begin - 1, None if files.header is None else 1 + files.header[0])
    given = None if isinstance(texts, Memmap) else Lines(texts)
    tables = texts.pieces() if isinstance(texts, Memmap) else _texts(given or ())
    for table in tables:
        start = rows
        for lines in chunked(islice(wanted, len(table))):  # labels may be longer than texts
            if not lines and rows:
                continue
            first = rows + begin
            lists, zeros = parse_pairs(lines, _numbered(labels.path, first), limit)
            here = table.slice(rows - start, len(lines)).append_column("labels", lists)
            yield Piece(here, labels.path, first, ":", {"zero_values": zeros})
            rows += len(lines)
    labels.drain()
    number, solid = labels.number + 1 - begin, labels.solid + 1 - begin
    if files.header is not None and not solid <= files.header[0] <= number:
        raise SourceError(
            f"{labels.path}:1: the header says {files.header[0]} rows and {number} follow; "
            f"correct the header or complete the file"
        )
    if given is None:
        assert isinstance(texts, Memmap)
        path, lines_there, filled, returns = texts.path, texts.rows, texts.rows, 0
    else:
        path, lines_there, filled, returns = given.path, given.number, given.solid, given.returns
    if max(filled, solid) > rows:
        raise SourceError(
            f"{path} has {lines_there} texts and {labels.path} has labels for {number} rows; "
            f"make one line of labels for each text"
            + (f" (its {returns} carriage returns end no line)" if returns else "")
        )


def _objects(path: str, limit: int | None) -> Iterator[Piece]:
    """Reads JSON lines, with labels unless `limit` is None; those at the end may be blank."""
    first = 1
    for lines in chunked(_without_blank_end(Lines(path))):
        table, odd = parse_objects(lines, _numbered(path, first), limit)
        yield Piece(table, path, first, ":", odd)
        first += len(lines)


def _without_blank_end(lines: Iterable[bytes]) -> Iterator[bytes]:
    blank = 0
    for line in lines:
        if line.strip():
            yield from repeat(b"", blank)
            yield line
        blank = 0 if line.strip() else blank + 1


def _filters(path: str, limit: int) -> dict[str, Int64s]:
    """Reads all filter pairs of a split, 24 bytes each: line, row and label, by row."""
    found, first = [], 1
    for lines in chunked(Lines(path)):
        places, *pairs = parse_filters(lines, _numbered(path, first), limit)
        found.append((places + first, *pairs))
        first += len(lines)
    line, row, label = (np.concatenate(each) for each in zip(*found, strict=True))
    order = np.argsort(row, kind="stable")
    return {"line": line[order], "row": row[order], "label": label[order]}


def _lists(filters: dict[str, Int64s], first: int, rows: int) -> pa.Array:
    """Returns the filter labels of the rows [first, first + rows), large_list<int64>."""
    here = slice(*np.searchsorted(filters["row"], [first, first + rows]))
    return lists_of(rows, filters["row"][here] - first, pa.array(filters["label"][here]))
