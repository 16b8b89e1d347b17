"""A source folder of text files: what its files agree on, and where its rows are read from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from renee_ray.data.sources.lines import Lines, SourceError
from renee_ray.data.sources.source import Source, SplitFiles
from renee_ray.data.sources.xmlrepo import header_of


@dataclass(frozen=True)
class RawSplit:
    """Files of one split. filters: lines of pairs (row in the split, label), in any order."""

    texts: Lines
    labels: Lines | None
    """None: in the JSON lines of `texts`."""
    filters: Lines | None

    @property
    def rows(self) -> int:
        return self.texts.rows

    @property
    def labelled(self) -> Lines:
        """The lines that hold the labels."""
        return self.texts if self.labels is None else self.labels


@dataclass(frozen=True)
class Raw:
    """A source whose files agree. num_labels: None while only the greatest id can tell."""

    train: RawSplit
    test: RawSplit | None
    label_texts: Lines | None
    is_json: bool
    num_labels: int | None

    @property
    def has_label_texts(self) -> bool:
        return self.label_texts is not None

    @property
    def labelled_path(self) -> str:
        """The file with the labels of training points."""
        return self.train.labelled.path

    def split(self, name: str) -> RawSplit:
        split = self.train if name == "train" else self.test
        assert split is not None
        return split


def files_of(found: Source) -> list[str]:
    """The paths of all files of `found`."""
    paths = [found.label_texts]
    for split in (found.train, found.test):
        paths += [split.texts, split.labels, split.filters] if split else []
    return [path for path in paths if path is not None]


def agreed(found: Source, lines: Mapping[str, Lines]) -> Raw:
    """The source `found`, whose files' lines are given by path.

    Raises:
        SourceError: an empty training set, files that disagree on the number of rows or of labels.
    """
    label_texts = lines[found.label_texts] if found.label_texts else None
    if label_texts is not None and found.is_json:
        label_texts = label_texts.without_blank_end()
    train, train_columns = _split(found.train, lines)
    if train.rows == 0:
        raise SourceError(
            f"{train.texts.path} holds no training point; give a training set of at least one"
        )
    test, test_columns = _split(found.test, lines) if found.test else (None, None)
    label_texts, num_labels = _agree(label_texts, (train, train_columns), (test, test_columns))
    return Raw(train, test, label_texts, found.is_json, num_labels)


def _split(files: SplitFiles, lines: Mapping[str, Lines]) -> tuple[RawSplit, int | None]:
    """The split, and the number of labels that its header gives."""
    texts = lines[files.texts]
    filters = lines[files.filters] if files.filters else None
    if files.labels is None:
        return RawSplit(texts.without_blank_end(), None, filters), None
    labels = lines[files.labels]
    header = header_of(labels, texts.rows)
    if header is not None:
        labels = labels.without_header().without_blank_tail(header[0])
        if labels.rows != header[0]:
            raise SourceError(
                f"{labels.path}:1: the header says {header[0]} rows and {labels.rows} follow; "
                f"correct the header or complete the file"
            )
    texts = texts.without_blank_tail(labels.rows)
    labels = labels.without_blank_tail(texts.rows)
    if texts.rows != labels.rows:
        raise SourceError(
            f"{texts.path} has {texts.rows} lines and {labels.path} has labels for {labels.rows} "
            f"rows; make one line of labels for each text"
            + (f" (its {texts.returns} carriage returns end no line)" if texts.returns else "")
        )
    return RawSplit(texts, labels, filters), header[1] if header else None


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
