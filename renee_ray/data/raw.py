"""A source folder, indexed: its files agree on rows and labels, and any row can be read.

Held in memory: the offset of every line (int64) and the filter pairs; never texts or labels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from renee_ray.data import xmlrepo
from renee_ray.data.storage import filesystem_of
from renee_ray.data.xmlrepo import (
    MAX_INFERRED_LABELS,
    Lines,
    Pairs,
    Source,
    SourceError,
    SplitFiles,
    header_of,
    is_packed,
    pairs,
    parse_filters,
    read,
    without_blank_end,
    without_blank_tail,
)

PIECE_BYTES = 1 << 22


@dataclass(frozen=True)
class RawSplit:
    """Indexed files of one split. filters: pairs of (row in the split, label)."""

    texts: Lines
    labels: Lines | None
    """None: in the JSON lines of `texts`."""
    filters: Pairs

    @property
    def rows(self) -> int:
        return self.texts.rows

    @property
    def labelled(self) -> Lines:
        """The lines that hold the labels."""
        return self.texts if self.labels is None else self.labels


@dataclass(frozen=True)
class Raw:
    """An indexed source. num_labels: None while only the greatest id can tell."""

    train: RawSplit
    test: RawSplit | None
    label_texts: Lines | None
    is_json: bool
    num_labels: int | None

    def split(self, name: str) -> RawSplit:
        """Files of the points of `name`; validation is a part of the training files."""
        if name != "test":
            return self.train
        assert self.test is not None
        return self.test


def index_source(found: Source, scratch: str) -> Raw:
    """Finds the lines of all files of `found`; those in gzip are unpacked into `scratch`.

    Raises:
        SourceError: an empty training set, files that disagree on the number of rows or of
            labels, a bad filter line, damaged gzip.
    """
    unpack = _Unpacker(scratch)
    label_texts = unpack.index(found.label_texts) if found.label_texts else None
    if label_texts is not None and found.is_json:
        label_texts = without_blank_end(label_texts)
    train, train_columns = _index_split(found.train, unpack)
    if train.rows == 0:
        raise SourceError(
            f"{train.texts.path} holds no training point; give a training set of at least one"
        )
    test, test_columns = _index_split(found.test, unpack) if found.test else (None, None)
    label_texts, num_labels = _agree(label_texts, (train, train_columns), (test, test_columns))
    raw = Raw(train, test, label_texts, found.is_json, num_labels)
    return _with_filters(raw, found, unpack)


class _Unpacker:
    """Indexes files; those in gzip are unpacked into a scratch directory first."""

    def __init__(self, scratch: str) -> None:
        self.scratch = scratch

    def index(self, path: str) -> Lines:
        if not is_packed(path):
            return xmlrepo.index(path)
        filesystem, root = filesystem_of(self.scratch)
        filesystem.create_dir(root, recursive=True)
        name = path.rpartition("/")[2].removesuffix(".gz")
        return xmlrepo.index(path, f"{self.scratch}/{name}")


def _index_split(files: SplitFiles, unpack: _Unpacker) -> tuple[RawSplit, int | None]:
    """The split, its filters still empty, and the number of labels that its header gives."""
    texts, no_pairs = unpack.index(files.texts), _no_pairs()
    if files.labels is None:
        return RawSplit(without_blank_end(texts), None, no_pairs), None
    labels = unpack.index(files.labels)
    header = header_of(labels, texts.rows)
    if header is not None:
        labels = without_blank_tail(labels.without_header(), header[0])
        if labels.rows != header[0]:
            raise SourceError(
                f"{labels.path}:1: the header says {header[0]} rows and {labels.rows} follow; "
                f"correct the header or complete the file"
            )
    texts = without_blank_tail(texts, labels.rows)
    labels = without_blank_tail(labels, texts.rows)
    if texts.rows != labels.rows:
        raise SourceError(
            f"{texts.path} has {texts.rows} lines and {labels.path} has labels for {labels.rows} "
            f"rows; make one line of labels for each text"
        )
    return RawSplit(texts, labels, no_pairs), header[1] if header else None


def _no_pairs() -> Pairs:
    return Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64))


def _agree(
    label_texts: Lines | None,
    train: tuple[RawSplit, int | None],
    test: tuple[RawSplit | None, int | None],
) -> tuple[Lines | None, int | None]:
    """The label texts without a blank end, and the number of labels all files agree on."""
    said = [
        (split.labelled.path, columns)
        for split, columns in (train, test)
        if split is not None and columns is not None
    ]
    if label_texts is not None and said:
        label_texts = without_blank_tail(label_texts, said[0][1])
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


def _with_filters(raw: Raw, found: Source, unpack: _Unpacker) -> Raw:
    train = replace(raw.train, filters=_filters(found.train.filters, raw.train, raw, unpack))
    if raw.test is None or found.test is None:
        return replace(raw, train=train)
    test = replace(raw.test, filters=_filters(found.test.filters, raw.test, raw, unpack))
    return replace(raw, train=train, test=test)


def _filters(path: str | None, split: RawSplit, raw: Raw, unpack: _Unpacker) -> Pairs:
    if path is None:
        return _no_pairs()
    lines = unpack.index(path)
    limit = MAX_INFERRED_LABELS if raw.num_labels is None else raw.num_labels
    parsed = [
        parse_filters(read(lines, np.arange(start, stop)), split.rows, limit)
        for start, stop in pieces(lines)
    ]
    if not parsed:
        return _no_pairs()
    rows, labels = (np.concatenate(column) for column in zip(*parsed, strict=True))
    return pairs(rows, labels)


def pieces(lines: Lines) -> list[tuple[int, int]]:
    """Row ranges of about PIECE_BYTES each."""
    if lines.rows == 0:
        return []
    size = int(lines.starts[-1] - lines.starts[0])
    targets = lines.starts[0] + np.arange(0, size, PIECE_BYTES)
    firsts = np.unique(np.minimum(np.searchsorted(lines.starts, targets), lines.rows - 1))
    bounds = [*firsts.tolist(), lines.rows]
    return list(pairwise(bounds))
