"""What a source folder holds: text files of the XML repository in one of two layouts, or Parquet.

    texts    {trn,tst}_X.txt, {trn,tst}_X_Y.txt (labels), Y.txt (label texts)
    JSON     {trn,tst}.json, lbl.json (label texts)

With both, optionally, {trn,tst}_filter_labels.txt. What is in them: xmlrepo.py; Parquet:
parquet_source.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import pyarrow.fs as pafs

from renee_ray.data.sources.lines import SourceError
from renee_ray.data.sources.parquet import ParquetSource, find_files, index_parquet
from renee_ray.data.storage import filesystem_of, listing

READ = (
    "a folder is read that has trn_X.txt and trn_X_Y.txt, or trn.json, plain or .gz, or Parquet: "
    "train.parquet, train/*.parquet or train-00000-of-00001.parquet, there or in its data/"
)
"""The kinds of training sets."""
_NOT_YET = re.compile(r".*\.(csv|tsv|jsonl|ndjson)(\.\w+)?|(data/)?(train|test)[^/]*\.json(\.\w+)?")


@dataclass(frozen=True)
class SplitFiles:
    """Paths of one split's files; None where there is none."""

    texts: str
    labels: str | None
    """None: the labels are in the JSON lines of `texts`."""
    filters: str | None


@dataclass(frozen=True)
class Source:
    """The files of a folder of the XML repository, each plain or with .gz added."""

    path: str
    is_json: bool
    train: SplitFiles
    test: SplitFiles | None
    label_texts: str | None


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


def _find_text(path: str) -> Source | None:
    """The files in folder `path` (local, or a URL); None without a training set.

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
    train = _split_files(base, "trn", files, is_json)
    if train is None:
        return None
    return Source(
        path,
        is_json,
        train,
        _split_files(base, "tst", files, is_json),
        files["lbl_json" if is_json else "Y"],
    )


def _split_files(
    base: str, split: str, files: dict[str, str | None], is_json: bool
) -> SplitFiles | None:
    filters = files[f"{split}_filter"]
    if is_json:
        objects = files[f"{split}_json"]
        return SplitFiles(objects, None, filters) if objects else None
    texts, labels = files[f"{split}_X"], files[f"{split}_X_Y"]
    if texts and labels:
        return SplitFiles(texts, labels, filters)
    if texts or labels:
        there, missing = texts or labels, f"{split}_X.txt" if labels else f"{split}_X_Y.txt"
        raise SourceError(f"{there} is there but {base}/{missing} is missing; add it (or its .gz)")
    return None


def find_source(path: str, labels_are: str = "auto") -> Source | ParquetSource:
    """The files of folder `path` (local, or a URL): those of text not yet read, Parquet indexed.

    Args:
        labels_are: "auto", "ids" or "multi-hot", as the configuration's key `labels`.

    Raises:
        SourceError: no such folder, no training set in it or two, half a split, and as
            `index_parquet`.
    """
    filesystem, root = filesystem_of(path)
    kind = filesystem.get_file_info(root).type
    if kind != pafs.FileType.Directory:
        problem = "does not exist" if kind == pafs.FileType.NotFound else "is not a directory"
        raise SourceError(f"{path} {problem}; {READ}")
    parquet, text = find_files(path).get("train"), _find_text(path)
    if parquet and text:
        raise SourceError(
            f"{path} has two training sets, {parquet[0]} and {text.train.texts}; keep one"
        )
    if parquet:
        return index_parquet(path, labels_are)
    if text is None:
        raise SourceError(f"{path} has no training set{_there(path)}; {READ}")
    if labels_are == "multi-hot":
        raise SourceError(
            f"{text.train.labels or text.train.texts} is text and labels=multi-hot is for "
            f"Parquet; write the ids of each point's labels"
        )
    return text


def _there(path: str) -> str:
    """Which files of kinds that are not read, or of other names, are in the folder."""
    names = sorted(
        f"{prefix}{info.base_name}"
        for folder, prefix in ((path, ""), (f"{path}/data", "data/"))
        for info in listing(folder)
        if info.type == pafs.FileType.File and not info.base_name.startswith((".", "_"))
    )
    if tables := [name for name in names if _NOT_YET.fullmatch(name)]:
        return f" that is read: CSV and JSON lines, as {tables[0]!r:.100}, are not read yet"
    if others := [name for name in names if name.endswith(".parquet")]:
        return f" by its name, though {others[0]!r:.100} is there"
    return ""
