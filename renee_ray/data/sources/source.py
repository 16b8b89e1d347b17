"""Which kind of source a folder or a file is: text files, Parquet or own data (own.py)."""

from __future__ import annotations

from typing import NoReturn

import pyarrow.fs as pafs

from renee_ray.data.sources.own import (
    TABLES,
    Own,
    find_own,
    read_own,
    refuse_other_kinds,
    training_sets,
)
from renee_ray.data.sources.parquet import PARQUET, find_files, index_parquet, is_table
from renee_ray.data.sources.records import Source, SourceError
from renee_ray.data.sources.repository import Repository, find_repository
from renee_ray.data.storage import filesystem_of, listing

READ = (
    "a .csv, .tsv, .jsonl, .ndjson, .json (or .gz) or .parquet file is read, or a folder that has "
    "one or train.csv and test.csv, or trn_X.txt and trn_X_Y.txt, or trn.json, or train.parquet, "
    "train/*.parquet or train-00000-of-00001.parquet, there or in its data/, or what datasets' "
    "save_to_disk or PECOS (X.trn.txt) wrote"
)
"""The kinds of training sets, for error messages."""


def find_source(
    path: str, labels_are: str = "auto", text: str = "", separator: str = ""
) -> Repository | Own | Source:
    """Finds the source at `path`, a folder or a table (local, or a URL).

    Parquet is indexed, which only reads footers. Others are still to be written as Parquet.

    Args:
        labels_are, text, separator: as the keys `labels`, `text` and `separator`.

    Raises:
        SourceError: nothing there, no training set in it or two, half a split, or an error of
            `index_parquet`.
    """
    path = path.rstrip("/")
    filesystem, root = filesystem_of(path)
    info = filesystem.get_file_info(root)
    named = bool(text or labels_are not in ("auto", "ids", "multi-hot"))
    if info.type == pafs.FileType.File and is_table(info.base_name, f"{TABLES}|{PARQUET}"):
        if info.extension == PARQUET and not (named or separator):
            return index_parquet(path, labels_are, is_file=True)
        return read_own({"train": [path]}, text, labels_are, separator)
    if info.type != pafs.FileType.Directory:
        is_missing = info.type == pafs.FileType.NotFound
        raise SourceError(
            f"{path} {'does not exist' if is_missing else 'is of no kind that is read'}; {READ}"
        )
    splits, files = find_files(path), find_repository(path)
    parquet = splits.get("train")
    there = [parquet[0]] if parquet else []
    there += [files.splits["train"].labelled] if files else []
    there += training_sets(path)
    if first := next((each for each in there if each != there[0]), None):
        raise SourceError(f"{path} has two training sets, {there[0]} and {first}; keep one")
    if parquet and not named:
        if separator:
            raise SourceError(
                f"{parquet[0]}: separator= is for a column that is named; give labels=COLUMN"
            )
        refuse_other_kinds(path, splits, parquet[0])
        return index_parquet(path, labels_are)
    if files is None:
        own = find_own(path, text, labels_are, separator)
        if own is None:
            raise SourceError(f"{path} has no training set{_there(path)}; {READ}")
        if own.fields is None and (named or separator or labels_are == "multi-hot"):
            _refuse_keys(own.splits["train"][0])
        return own
    if named or separator:
        _refuse_keys(files.splits["train"].labelled)
    if labels_are == "multi-hot":
        raise SourceError(
            f"{files.splits['train'].labelled} is text and labels=multi-hot is for Parquet; "
            f"write the ids of each point's labels"
        )
    return files


def _refuse_keys(path: str) -> NoReturn:
    raise SourceError(
        f"{path} says what is text and labels; leave text=, labels= and separator= out"
    )


def _there(path: str) -> str:
    """Says which files of kinds that are not read, or of other names, are in the folder."""
    names = sorted(
        f"{prefix}{info.base_name}"
        for folder, prefix in ((path, ""), (f"{path}/data", "data/"))
        for info in listing(folder)
        if info.type == pafs.FileType.File and not info.base_name.startswith((".", "_"))
    )
    if "train.txt" in names or "trn_X_Xf.txt" in names:
        bag = "train.txt" if "train.txt" in names else "trn_X_Xf.txt"
        return (
            f" with texts: {bag} holds a bag of words, and an encoder reads texts; fetch the "
            f"'raw text' archive of this dataset from the repository (trn_X.txt or trn.json.gz)"
        )
    if tables := [name for name in names if is_table(name, TABLES)]:
        return f" by its name, though {tables[0]!r:.100} is there (which of them is train?)"
    if others := [name for name in names if name.endswith(".parquet")]:
        return f" by its name, though {others[0]!r:.100} is there"
    return ""
