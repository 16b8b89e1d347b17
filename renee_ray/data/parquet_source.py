"""A source folder of Parquet: which files it has, what their columns hold, and reading them.

    train.parquet or train/*.parquet      text string, or input_ids list<int>; labels list<int> or
    test.parquet or test/*.parquet        list<string>; optionally filter_labels, as labels
    labels.parquet or labels/*.parquet    a row a label, in the order of their ids: label string
                                          where labels are strings, text string; both optional

Only footers are read to index it. Rows are read a row group at a time and handed on in slices
of at most `SLICE_ROWS`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from renee_ray.config import reason
from renee_ray.data.lines import Int64s, SourceError
from renee_ray.data.storage import filesystem_of, is_transient, patiently
from renee_ray.data.untrusted import read_row_groups, rows_of

SLICE_ROWS = 1 << 16


@dataclass(frozen=True)
class Block:
    """Some rows of a file that are read together. first: row number in the split."""

    path: str
    group: int
    first: int
    rows: int


@dataclass(frozen=True)
class Table:
    """The files of `train`, `test` or `labels`. columns: name -> type, the same in every file."""

    blocks: tuple[Block, ...]
    columns: dict[str, pa.DataType]

    @property
    def rows(self) -> int:
        return sum(block.rows for block in self.blocks)


@dataclass(frozen=True)
class ParquetSource:
    """An indexed folder. labels_are_strings: else they are ids."""

    train: Table
    test: Table | None
    labels: Table | None
    labels_are_strings: bool

    @property
    def num_labels(self) -> int | None:
        """None while only the greatest id, or all strings, can tell."""
        return None if self.labels is None else self.labels.rows

    @property
    def has_label_texts(self) -> bool:
        given = self.labels is not None and "text" in self.labels.columns
        return given or self.labels_are_strings

    @property
    def labelled_path(self) -> str:
        """The file, or first file, with labels of training points."""
        return self.train.blocks[0].path

    def split(self, name: str) -> Table:
        table = self.train if name == "train" else self.test
        assert table is not None
        return table


def is_parquet(path: str) -> bool:
    """Whether folder `path` has a training set in Parquet."""
    return bool(_files(path, "train"))


def index_parquet(path: str) -> ParquetSource:
    """The tables of folder `path`, whose columns are as the module says.

    Raises:
        SourceError: a file that is no Parquet, a column that is missing or of another type,
            files that disagree, no training row.
    """
    tables = {name: _table(_files(path, name)) for name in ("train", "test", "labels")}
    train = tables["train"]
    if train is None or not train.rows:
        raise SourceError(f"{path} has no training row; give a training set of at least one")
    kinds = set()
    for name in ("train", "test"):
        table = tables[name]
        if table is not None:
            where = table.blocks[0].path if table.blocks else f"{path}/{name}"
            kinds |= _check_points(where, table.columns)
    if len(kinds) > 1:
        raise SourceError(f"{path} has labels that are strings and others that are ids; use one")
    strings = kinds == {"string"}
    labels = tables["labels"]
    if labels is not None:
        _check_labels(labels, strings)
    return ParquetSource(train, tables["test"], labels, strings)


def read_block(block: Block, columns: list[str]) -> pa.Table:
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
    except ValueError as error:  # pa.ArrowInvalid is one
        raise SourceError(
            f"{block.path} cannot be read ({reason(error):.200}) in row group {block.group}; "
            f"replace it"
        ) from None


def slices(block: Block, columns: list[str]) -> Iterator[tuple[Int64s, pa.Table]]:
    """(row numbers in the split, rows) of the block, in slices."""
    table = read_block(block, columns)
    for start in range(0, len(table), SLICE_ROWS):
        piece = table.slice(start, SLICE_ROWS).combine_chunks()
        for name in columns:
            if piece[name].null_count:
                row = int(np.argmax(piece[name].is_null().to_numpy()))
                raise SourceError(
                    f"{where(block, start + row)} has no {name}; fill it in or leave the row out"
                )
        yield np.arange(block.first + start, block.first + start + len(piece)), piece


def label_columns(table: Table) -> list[str]:
    """The columns of points that hold labels."""
    return [name for name in ("labels", "filter_labels") if name in table.columns]


def where(block: Block, row: int) -> str:
    """file and row, for people; `row` counted in the block."""
    return f"{block.path}: row {row} of row group {block.group}"


def _files(path: str, name: str) -> list[str]:
    filesystem, root = filesystem_of(path)
    base = path.rstrip("/")
    if filesystem.get_file_info(f"{root}/{name}.parquet").type == pafs.FileType.File:
        return [f"{base}/{name}.parquet"]
    listed = filesystem.get_file_info(pafs.FileSelector(f"{root}/{name}", allow_not_found=True))
    names = sorted(info.base_name for info in listed if info.base_name.endswith(".parquet"))
    return [f"{base}/{name}/{each}" for each in names]


def _table(paths: list[str]) -> Table | None:
    return table_of(paths) if paths else None


def table_of(paths: list[str]) -> Table:
    """The table in these files.

    Raises:
        SourceError: a file that is no Parquet, or has other columns than the first.
    """
    blocks: list[Block] = []
    first = 0
    columns: dict[str, pa.DataType] = {}
    for path in paths:
        schema, metadata = patiently(partial(_footer, path), f"reading {path}")
        found = {field.name: field.type for field in schema}
        if len(found) != len(schema):
            raise SourceError(f"{path} has two columns of one name; rename one")
        if columns and found != columns:
            raise SourceError(
                f"{path} has the columns {found} and {paths[0]} has {columns}; make them equal"
            )
        columns = found
        for group in range(metadata.num_row_groups):
            rows = metadata.row_group(group).num_rows
            if rows:
                blocks.append(Block(path, group, first, rows))
            first += rows
    return Table(tuple(blocks), columns)


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


def check_text_column(path: str, columns: dict[str, pa.DataType]) -> None:
    """Raises SourceError unless the table at `path` has a column `text` of strings."""
    if "text" not in columns:
        raise SourceError(
            f"{path} has the columns {list(columns)}; rename the one that holds the texts to 'text'"
        )
    if not _is_string(columns["text"]):
        raise SourceError(f"{path} has a column 'text' of type {columns['text']}; make it string")


def _check_points(path: str, columns: dict[str, pa.DataType]) -> set[str]:
    """Kinds of its labels: "string", "id"."""
    if "input_ids" in columns:
        if _item(columns["input_ids"]) != "id":
            raise SourceError(
                f"{path} has a column 'input_ids' of type {columns['input_ids']}; it must be a "
                f"list of integers"
            )
    else:
        check_text_column(path, columns)
    if "labels" not in columns:
        raise SourceError(
            f"{path} has the columns {list(columns)}; rename the one with the labels to 'labels'"
        )
    kinds = set()
    for name in ("labels", "filter_labels"):
        if name in columns:
            kind = _item(columns[name])
            if kind is None:
                raise SourceError(
                    f"{path} has a column {name!r} of type {columns[name]}; it must be a list of "
                    f"integers or of strings"
                )
            kinds.add(kind)
    return kinds


def _check_labels(table: Table, strings: bool) -> None:
    path = table.blocks[0].path if table.blocks else "labels"
    if strings and not _is_string(table.columns.get("label", pa.null())):
        raise SourceError(
            f"{path} has the columns {list(table.columns)}; labels are strings, so one named "
            f"'label' must hold them"
        )
    if "text" in table.columns:
        check_text_column(path, table.columns)


def _item(kind: pa.DataType) -> str | None:
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return None
    if _is_string(kind.value_type):
        return "string"
    return "id" if pa.types.is_integer(kind.value_type) else None


def _is_string(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)
