"""A source folder of Parquet: which files it has, what they agree on, and reading their rows.

    train.parquet, train/, train-00000-of-00002.parquet ...    text or input_ids; labels;
    test.parquet, test/, test-00000-of-00001.parquet ...       optionally filter_labels
    labels.parquet, labels/, ...    a row a label, in the order of their ids: label where labels
                                    are strings, text; both optional

Each may be in the folder itself or in its `data/`. A directory, also one `train.parquet/`, stands
for all Parquet files in it and below, in the order of their paths. Files and directories whose
names begin with "." or "_" are passed over. Types of columns: parquet_columns.py.

Only footers are read to index it. Rows are read a row group at a time and handed on in slices
of at most `SLICE_ROWS`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from renee_ray.data.sources.columns import (
    LABELS,
    BadRow,
    checked_kind,
    class_names,
    column_title,
    common_kind,
    plain,
    read_column,
)
from renee_ray.data.sources.lines import Int64s, SourceError
from renee_ray.data.storage import filesystem_of, is_transient, listing, patiently
from renee_ray.data.untrusted import read_row_groups, rows_of
from renee_ray.errors import reason

SLICE_ROWS = 1 << 16
SPLITS = ("train", "test", "labels")
VALIDATION = ("validation", "valid", "val", "dev")
_NAME = re.compile(
    rf"({'|'.join(SPLITS + VALIDATION)})(?:|\.parquet|-(\d+)(?:-of-(\d+))?(?:-\w+)?\.parquet)"
)
"""What it is of; its number among several files, and theirs."""


@dataclass(frozen=True)
class Block:
    """Some rows of a file that are read together. first: row number in the split."""

    path: str
    group: int
    first: int
    rows: int


@dataclass(frozen=True)
class Table:
    """The files of `train`, `test` or `labels`.

    columns: name -> kind (parquet_columns.py) of those that are read.
    class_names: of the labels, where Hugging Face's metadata has them.
    """

    blocks: tuple[Block, ...]
    columns: dict[str, str]
    class_names: tuple[str, ...] | None = None

    @property
    def rows(self) -> int:
        return sum(block.rows for block in self.blocks)


@dataclass(frozen=True)
class ParquetSource:
    """An indexed folder.

    labels_are_strings: else they are ids.
    class_names: texts of the labels where there is no table of them.
    width: values in a row's list, each 0 or 1 for a label; None: the lists name labels.
    notes: sentences about files that are there and not read.
    """

    train: Table
    test: Table | None
    labels: Table | None
    labels_are_strings: bool
    class_names: tuple[str, ...] | None = None
    width: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def num_labels(self) -> int | None:
        """None while only the greatest id, or all strings, can tell."""
        if self.labels is not None:
            return self.labels.rows
        return self.width if self.class_names is None else len(self.class_names)

    @property
    def has_label_texts(self) -> bool:
        given = self.labels is not None and "text" in self.labels.columns
        return given or self.labels_are_strings or self.class_names is not None

    @property
    def labelled_path(self) -> str:
        """The file, or first file, with labels of training points."""
        return self.train.blocks[0].path

    def split(self, name: str) -> Table:
        table = self.train if name == "train" else self.test
        assert table is not None
        return table


# --------------------------------------------------------------------------------------- files


def find_files(path: str) -> dict[str, list[str]]:
    """The Parquet files of folder `path`, by what they are of (`SPLITS`, `VALIDATION`).

    Raises:
        SourceError: there are two kinds of them, or some of several are missing.
    """
    base, ways = path.rstrip("/"), defaultdict[str, dict[str, list[str]]](dict)
    for folder in (base, f"{base}/data"):
        numbered = defaultdict[str, list[tuple[str, str]]](list)
        for info in listing(folder):
            match, here = _NAME.fullmatch(info.base_name), f"{folder}/{info.base_name}"
            is_directory = info.type == pafs.FileType.Directory
            if match is None or not (is_directory or here.endswith(".parquet")):
                continue
            name, number, count = match.groups()
            way = f"{folder}/{name}-*.parquet" if number else here
            if files := parquet_files(here) if is_directory else [here]:
                ways[name].setdefault(way, []).extend(files)
            if count and name in SPLITS:
                numbered[way].append((number, count))
        for way, numbers in numbered.items():
            _check_complete(way, numbers)
    for name, each in ways.items():
        if len(each) > 1 and name in SPLITS:
            first, second = sorted(each)[:2]
            raise SourceError(f"{first} and {second} are both there; keep one of them")
    return {name: sorted(chain(*each.values())) for name, each in ways.items()}


def _check_complete(way: str, numbers: list[tuple[str, str]]) -> None:
    """Raises SourceError unless files `NUMBER-of-COUNT` are all there, each once."""
    count = max(int(count) for _, count in numbers)
    have = sorted(int(number) for number, _ in numbers)
    if len(have) != count or have != list(range(len(have))):
        raise SourceError(
            f"{way}: of the {count} files that the names tell of, {len(have)} are there, with the "
            f"numbers {have!s:.60}; there must be one of each"
        )


def parquet_files(directory: str) -> list[str]:
    """The Parquet files in a directory and below, by path, without those that are hidden."""
    base, (_, root) = directory.rstrip("/"), filesystem_of(directory)
    names = []
    for info in listing(base, recursive=True):
        name = info.path.strip("/")[len(root.strip("/")) :].strip("/")
        hidden = any(part.startswith((".", "_")) for part in name.split("/"))
        if info.type == pafs.FileType.File and name.endswith(".parquet") and not hidden:
            names.append(name)
    return [f"{base}/{name}" for name in sorted(names)]


# --------------------------------------------------------------------------------------- index


def index_parquet(path: str, labels_are: str = "auto") -> ParquetSource:
    """The tables of folder `path`, whose columns are as the module says.

    Args:
        labels_are: "auto", "ids" or "multi-hot", as the configuration's key `labels`.

    Raises:
        SourceError: a file that is no Parquet, a column that is missing or of another kind,
            files that disagree, no training row.
    """
    multi_hot = labels_are == "multi-hot"
    files, tables = find_files(path), dict[str, Table]()
    for name in ("train", "test"):
        if name in files:
            tables[name] = table_of(files[name], ("text", "labels"), LABELS[1:], multi_hot)
    if "train" not in tables or not tables["train"].rows:
        raise SourceError(f"{path} has no training row; give a training set of at least one")
    kinds = {table.columns[name] for table in tables.values() for name in label_columns(table)}
    strings = "list of string" in kinds
    if {"list of integer", "list of string"} <= kinds:
        raise SourceError(f"{path} has labels that are strings and others that are ids; use one")
    if "labels" in files:
        needed = ("label",) if strings else ()
        tables["labels"] = table_of(files["labels"], needed, ("text",))
    source = ParquetSource(
        tables["train"],
        tables.get("test"),
        tables.get("labels"),
        strings,
        None if strings or "labels" in files else _class_names(files, tables),
        _width(tables["train"]) if multi_hot else None,
        tuple(
            f"{files[name][0]} is not read: validation= of the training points are held out"
            for name in VALIDATION
            if name in files
        )
        + tuple(
            f"{files[name][0]} is in a directory that stands for a column, which is not read"
            for name in SPLITS
            if name in files and "=" in files[name][0][len(path) :].rpartition("/")[0]
        ),
    )
    if source.width is not None and source.width != source.num_labels:
        raise SourceError(
            f"{source.labelled_path} has {source.width} values in a row of labels and there are "
            f"{source.num_labels} labels; make them agree"
        )
    return source


def _class_names(files: dict[str, list[str]], tables: dict[str, Table]) -> tuple[str, ...] | None:
    train, test = tables["train"], tables.get("test")
    if test is None:
        return train.class_names
    only = replace(test, columns=train.columns)
    return _merged(files["train"][0], train, files["test"][0], only).class_names


def _width(table: Table) -> int:
    """Values in a list of labels, in the first block that has any."""
    for block in table.blocks:
        for chunk in _read(block, ["labels"])["labels"].chunks:
            lists = plain(chunk)
            if not pa.types.is_null(lists.type) and len(lists.flatten()):
                return int(pc.max(pc.list_value_length(lists)).as_py())
    raise SourceError(f"{table.blocks[0].path} gives no training point a label; give labels")


def table_of(
    paths: list[str],
    required: tuple[str, ...],
    optional: tuple[str, ...] = (),
    multi_hot: bool = False,
) -> Table:
    """The table in these files, with these of its columns; labelled `input_ids` serve as `text`.

    Raises:
        SourceError: a file that is no Parquet, or has a column that is missing, of another kind,
            or does not go with those of the files before it.
    """
    blocks: list[Block] = []
    first, table = 0, Table((), {})
    for path in paths:
        schema, metadata = patiently(partial(_footer, path), f"reading {path}")
        here = _table(path, schema, required, optional, multi_hot)
        table = here if path == paths[0] else _merged(paths[0], table, path, here)
        for group in range(metadata.num_row_groups):
            rows = metadata.row_group(group).num_rows
            if rows:
                blocks.append(Block(path, group, first, rows))
            first += rows
    if table.columns.get("text") == "nothing" and "text" in required:
        raise SourceError(f"{paths[0]} has a column 'text' of type null; it must be strings")
    return replace(table, blocks=tuple(blocks))


def _table(
    path: str,
    schema: pa.Schema,
    required: tuple[str, ...],
    optional: tuple[str, ...],
    multi_hot: bool,
) -> Table:
    """The columns of one file."""
    columns = dict[str, str]()
    with_tokens = "labels" in required and "input_ids" in schema.names
    for wanted in required + optional:
        name = "input_ids" if wanted == "text" and with_tokens else wanted
        if name in schema.names:
            if schema.names.count(name) > 1:
                raise SourceError(f"{path} has two columns {name!r}; rename one")
            columns[name] = checked_kind(path, schema.field(name), multi_hot)
        elif name in required:
            raise SourceError(
                f"{path} has the columns {schema.names!s:.300}; rename the one with the "
                f"{column_title(name)} to {name!r}"
            )
    return Table((), columns, class_names(path, schema) if "labels" in required else None)


def _merged(first: str, table: Table, path: str, here: Table) -> Table:
    """The columns of file `path` and of those before it, of which `first` is one."""
    columns = dict[str, str]()
    for name in sorted(table.columns.keys() | here.columns.keys()):
        kinds = [each.columns.get(name, "missing") for each in (table, here)]
        common = None if "missing" in kinds else common_kind(*kinds)
        if common is None:
            raise SourceError(
                f"{path} has a column {name!r} that is {kinds[1]} and in {first} it is "
                f"{kinds[0]}; make them equal"
            )
        columns[name] = common
    names = table.class_names or here.class_names
    if here.class_names not in (None, names):
        raise SourceError(f"{path} has other class names than {first}; make them equal")
    return Table((), columns, names)


def _footer(path: str) -> tuple[pa.Schema, pq.FileMetaData]:
    filesystem, root = filesystem_of(path)
    with filesystem.open_input_file(root) as file:
        try:
            footer = pq.ParquetFile(file)
            rows_of(footer.metadata)
            return footer.schema_arrow, footer.metadata
        except (OSError, ValueError, NotImplementedError) as error:  # pa.ArrowInvalid is one
            if is_transient(error):
                raise
            raise SourceError(f"{path} is not Parquet ({reason(error)}); replace it") from None


# -------------------------------------------------------------------------------------- reading


def slices(
    block: Block, columns: list[str], width: int | None = None
) -> Iterator[tuple[Int64s, dict[str, pa.Array]]]:
    """(row numbers in the split, columns as parquet_columns.py says) of the block, in slices.

    Raises:
        SourceError: the file is damaged, or a row is bad.
    """
    table = _read(block, columns)
    for start in range(0, len(table), SLICE_ROWS):
        piece = table.slice(start, SLICE_ROWS)
        try:
            read = {name: read_column(name, piece[name], width) for name in columns}
        except BadRow as bad:
            raise SourceError(f"{where(block, start + bad.row)} {bad}") from None
        yield np.arange(block.first + start, block.first + start + len(piece)), read


def _read(block: Block, columns: list[str]) -> pa.Table:
    """All rows of the block.

    Raises:
        SourceError: the file is damaged.
    """

    def read() -> pa.Table:
        filesystem, root = filesystem_of(block.path)
        with filesystem.open_input_file(root) as file:
            return read_row_groups(partial(pq.ParquetFile, file), [block.group], columns)

    try:
        return patiently(read, f"reading {block.path}")
    except (OSError, ValueError, NotImplementedError) as error:  # pa.ArrowInvalid is one
        if is_transient(error):
            raise
        raise SourceError(
            f"{block.path} cannot be read ({reason(error):.200}) in row group {block.group}; "
            f"replace it"
        ) from None


def label_columns(table: Table) -> list[str]:
    """The columns of points that hold labels."""
    return [name for name in LABELS if name in table.columns]


def where(block: Block, row: int) -> str:
    """file and row, for people; `row` counted in the block."""
    return f"{block.path}: row {row} of row group {block.group}"
