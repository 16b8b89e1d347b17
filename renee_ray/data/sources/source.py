"""Which kind of source a folder is: text files (repository.py) or Parquet (parquet.py)."""

from __future__ import annotations

import re

import pyarrow.fs as pafs

from renee_ray.data.sources.parquet import find_files, index_parquet
from renee_ray.data.sources.records import Source, SourceError
from renee_ray.data.sources.repository import Files, find_repository
from renee_ray.data.storage import filesystem_of, listing

READ = (
    "a folder is read that has trn_X.txt and trn_X_Y.txt, or trn.json, plain or .gz, or Parquet: "
    "train.parquet, train/*.parquet or train-00000-of-00001.parquet, there or in its data/"
)
"""The kinds of training sets, for error messages."""
_NOT_YET = re.compile(r".*\.(csv|tsv|jsonl|ndjson)(\.\w+)?|(data/)?(train|test)[^/]*\.json(\.\w+)?")


def find_source(path: str, labels_are: str = "auto") -> Files | Source:
    """Finds the source in folder `path` (local, or a URL).

    Parquet is indexed, which only reads footers. The lines of text files are still to be counted.

    Args:
        labels_are: "auto", "ids" or "multi-hot", as the configuration's key `labels`.

    Raises:
        SourceError: no such folder, no training set in it or two, half a split, or an error of
            `index_parquet`.
    """
    filesystem, root = filesystem_of(path)
    kind = filesystem.get_file_info(root).type
    if kind != pafs.FileType.Directory:
        problem = "does not exist" if kind == pafs.FileType.NotFound else "is not a directory"
        raise SourceError(f"{path} {problem}; {READ}")
    parquet, text = find_files(path).get("train"), find_repository(path)
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
    """Says which files of kinds that are not read, or of other names, are in the folder."""
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
