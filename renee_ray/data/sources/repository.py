"""A folder of the Extreme Classification Repository: its files, what they agree on, its tables.

    texts    {trn,tst}_X.txt, {trn,tst}_X_Y.txt (labels), Y.txt (label texts)
    JSON     {trn,tst}.json, lbl.json (label texts)
    tokens   {tokenizer}-{length}/*.dat (memmaps.py), {trn,tst}_X_Y.txt

With each, optionally, {trn,tst}_filter_labels.txt; each file plain or with .gz added. What is in
them: xmlrepo.py. The lines of all files are counted (lines.py) before anything is read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial

import pyarrow.fs as pafs

from renee_ray.data.sources import memmaps, xmlrepo
from renee_ray.data.sources.lines import Lines, blocks_of, read
from renee_ray.data.sources.memmaps import Memmap, find_memmaps
from renee_ray.data.sources.records import (
    MAX_INFERRED_LABELS,
    Block,
    Records,
    Source,
    SourceError,
    Table,
)
from renee_ray.data.storage import filesystem_of


@dataclass(frozen=True)
class LineTable:
    """Rows that are lines: row i is line i of each file.

    parse: makes records of a batch of lines of each file.
    """

    files: tuple[Lines, ...]
    columns: tuple[str, ...]
    parse: Callable[..., Records]

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        return blocks_of(self.files[0].rows, *self.files)

    def read(self, block: Block, columns: Collection[str]) -> Iterator[Records]:
        stop = block.first + block.rows
        yield self.parse(*(read(lines, block.first, stop) for lines in self.files))


def text_table(lines: Lines) -> LineTable:
    """The table of a file with a text a line."""
    return LineTable((lines,), ("text",), xmlrepo.parse_texts)


# --------------------------------------------------------------------------------------- files


@dataclass(frozen=True)
class SplitFiles:
    """Paths of one split's files; None where there is none."""

    texts: str
    """The labels where there are tokens instead of texts."""
    labels: str | None
    """None: the labels are in the JSON lines of `texts`."""
    filters: str | None
    tokens: Memmap | None = None


@dataclass(frozen=True)
class Files:
    """The files of a folder."""

    is_json: bool
    train: SplitFiles
    test: SplitFiles | None
    label_texts: str | None
    label_tokens: Memmap | None = None

    @property
    def paths(self) -> list[str]:
        """The paths of all files."""
        found = [self.label_texts]
        for split in (self.train, self.test):
            found += [split.texts, split.labels, split.filters] if split else []
        return [path for path in found if path is not None]


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


def find_repository(path: str) -> Files | None:
    """Finds the files in folder `path` (local, or a URL); None without a training set.

    Raises:
        SourceError: half a split.
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
    train = _split_files(base, "trn", files, is_json, tokens)
    if train is None:
        return None
    test = _split_files(base, "tst", files, is_json, tokens)
    if "trn_doc" in tokens:
        return Files(False, train, test, None, tokens.get("lbl"))
    return Files(is_json, train, test, files["lbl_json" if is_json else "Y"])


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
    texts, labels = files[f"{split}_X"], files[f"{split}_X_Y"]
    if labels and f"{split}_doc" in tokens:
        return SplitFiles(labels, labels, filters, tokens[f"{split}_doc"])
    if texts and labels:
        return SplitFiles(texts, labels, filters)
    if texts or labels:
        there, missing = texts or labels, f"{split}_X.txt" if labels else f"{split}_X_Y.txt"
        raise SourceError(f"{there} is there but {base}/{missing} is missing; add it (or its .gz)")
    return None


# ----------------------------------------------------------------------------------- agreement


def agreed(files: Files, lines: Mapping[str, Lines]) -> Source:
    """Makes the source of a folder's files, whose lines are given by path.

    Raises:
        SourceError: an empty training set, files that disagree on the number of rows or of labels.
    """
    train, train_columns = _split(files.train, lines)
    if train.texts.rows == 0:
        raise SourceError(
            f"{train.texts.path} holds no training point; give a training set of at least one"
        )
    test, test_columns = _split(files.test, lines) if files.test else (None, None)
    said = [
        (split.labelled.path, columns)
        for split, columns in ((train, train_columns), (test, test_columns))
        if split is not None and columns is not None
    ]
    label_texts = lines[files.label_texts] if files.label_texts else None
    if label_texts is not None and files.is_json:
        label_texts = label_texts.without_blank_end()
    label_texts, num_labels = _agree_on_labels(label_texts, said)
    labels: Table | None = files.label_tokens
    if files.label_tokens is not None:
        num_labels = files.label_tokens.rows if num_labels is None else num_labels
        if files.label_tokens.rows != num_labels:
            raise SourceError(
                f"{files.label_tokens.path} has {files.label_tokens.rows} rows and there are "
                f"{num_labels} labels; tokenise the label texts again"
            )
    if label_texts is not None:
        objects = partial(xmlrepo.parse_objects, num_labels=None, with_labels=False)
        parse = objects if files.is_json else xmlrepo.parse_texts
        labels = LineTable((label_texts,), ("text",), parse)
    filters = {
        name: split.filter_table(num_labels)
        for name, split in (("train", train), ("test", test))
        if split is not None and split.filters is not None
    }
    return Source(
        train.table(num_labels),
        None if test is None else test.table(num_labels),
        labels,
        train.labelled.path,
        num_labels,
        filters=filters,
    )


@dataclass(frozen=True)
class _Split:
    texts: Lines
    labels: Lines | None
    filters: Lines | None
    tokens: Memmap | None = None

    @property
    def labelled(self) -> Lines:
        """The lines that hold the labels."""
        return self.texts if self.labels is None else self.labels

    def table(self, num_labels: int | None) -> Table:
        if self.tokens is not None:
            parse_tokens = partial(memmaps.parse_tokens, tokens=self.tokens, num_labels=num_labels)
            return LineTable((self.labelled,), ("input_ids", "labels"), parse_tokens)
        files = (self.texts,) if self.labels is None else (self.texts, self.labels)
        parse = xmlrepo.parse_objects if self.labels is None else xmlrepo.parse_points
        return LineTable(files, ("text", "labels"), partial(parse, num_labels=num_labels))

    def filter_table(self, num_labels: int | None) -> Table:
        assert self.filters is not None
        limit = MAX_INFERRED_LABELS if num_labels is None else num_labels
        parse = partial(xmlrepo.parse_filters, num_rows=self.texts.rows, num_labels=limit)
        return LineTable((self.filters,), ("row", "label"), parse)


def _split(files: SplitFiles, lines: Mapping[str, Lines]) -> tuple[_Split, int | None]:
    """Makes a split; returns it with the number of labels that its header gives."""
    texts = lines[files.texts]
    filters = lines[files.filters] if files.filters else None
    if files.labels is None:
        return _Split(texts.without_blank_end(), None, filters), None
    labels = lines[files.labels]
    header = xmlrepo.header_of(labels, texts.rows)
    if header is not None:
        labels = labels.without_header().without_blank_tail(header[0])
        if labels.rows != header[0]:
            raise SourceError(
                f"{labels.path}:1: the header says {header[0]} rows and {labels.rows} follow; "
                f"correct the header or complete the file"
            )
    if files.tokens is not None:
        labels = texts = labels.without_blank_tail(files.tokens.rows)
        if labels.rows != files.tokens.rows:
            raise SourceError(
                f"{files.tokens.path} has tokens of {files.tokens.rows} texts and {labels.path} "
                f"has labels for {labels.rows} rows; tokenise again"
            )
    texts = texts.without_blank_tail(labels.rows)
    labels = labels.without_blank_tail(texts.rows)
    if texts.rows != labels.rows:
        raise SourceError(
            f"{texts.path} has {texts.rows} lines and {labels.path} has labels for {labels.rows} "
            f"rows; make one line of labels for each text"
            + (f" (its {texts.returns} carriage returns end no line)" if texts.returns else "")
        )
    return _Split(texts, labels, filters, files.tokens), header[1] if header else None


def _agree_on_labels(
    label_texts: Lines | None, said: list[tuple[str, int]]
) -> tuple[Lines | None, int | None]:
    """Returns the label texts without a blank end, and the number of labels all files agree on.

    Args:
        said: (file, number of labels in its header), where there is one.
    """
    if label_texts is not None and said:
        label_texts = label_texts.without_blank_tail(said[0][1])
    if label_texts is not None:
        for path, columns in said:
            if columns != label_texts.rows:
                raise SourceError(
                    f"{label_texts.path} has {label_texts.rows} lines and {path}:1 says "
                    f"{columns} labels; correct the header or complete the label texts"
                )
        return label_texts, label_texts.rows
    for path, columns in said[1:]:
        if columns != said[0][1]:
            raise SourceError(
                f"{path}:1: the header says {columns} labels and {said[0][0]}:1 says "
                f"{said[0][1]}; correct one of them"
            )
    return None, said[0][1] if said else None
