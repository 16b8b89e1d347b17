"""A source folder of Parquet: which files it has, what they agree on, and reading their rows.

    train.parquet, train/, train-00000-of-00002.parquet ...    text, or input_ids and optionally
    test.parquet, test/, test-00000-of-00001.parquet ...       attention_mask; labels; optionally
                                                               filter_labels
    labels.parquet, labels/, ...    a row a label, in the order of their ids: label where labels
                                    are strings, text; both optional

Each may be in the folder itself or in its `data/`. A directory, also one `train.parquet/`, stands
for all Parquet files in it and below, in the order of their paths. Files and directories whose
names begin with "." or "_" are passed over. Types of columns: columns.py.

Only footers are read to index it, and ids of labels (label_order.py). A block is a row group.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from renee_ray.data.sources.columns import (
    LABELS,
    MASK,
    BadRow,
    checked_kind,
    class_names,
    column_title,
    common_kind,
    plain,
    read_column,
    without_padding,
)
from renee_ray.data.sources.label_order import check_label_ids
from renee_ray.data.sources.records import (
    Block,
    Names,
    Records,
    Source,
    SourceError,
    decode_texts,
    num_rows,
)
from renee_ray.data.sources.row_groups import (
    SLICE_ROWS,
    Origins,
    footer,
    read_block,
    row_name,
)
from renee_ray.data.storage import filesystem_of, listing, patiently

SPLITS = ("train", "test", "labels")
VALIDATION = ("validation", "valid", "val", "dev")
PARQUET = "parquet"
SYNONYMS = {"trn": "train", "tst": "test", "lbl": "labels"}
_NAME = r"({})(?:|\.(?:{kind})|-(\d+)(?:-of-(\d+))?(?:-\w+)?\.(?:{kind}))"
"""The split; the number of the file, and how many there are."""


@dataclass(frozen=True)
class ParquetTable:
    """The files of `train`, `test` or `labels`.

    columns: name -> kind (columns.py) of those that are read.
    class_names: the labels', where Hugging Face's metadata has them.
    width: values in a row's list of labels, each 0 or 1 for a label; None: the lists name labels.
    origins: of files that a conversion has made, the file that the rows are from, for errors.
    """

    blocks: tuple[Block, ...]
    columns: dict[str, str]
    class_names: tuple[str, ...] | None = None
    width: int | None = None
    origins: Origins = field(default_factory=dict)

    def read(self, block: Block, columns: Collection[str]) -> Iterator[Records]:
        """Reads a row group and hands it on in slices of at most `SLICE_ROWS`."""
        columns = [name for name in columns if name != MASK]
        masked = [MASK] if MASK in self.columns and "input_ids" in columns else []
        table = read_block(block, columns + masked, self.origins)
        for start in range(0, len(table), SLICE_ROWS):
            piece, replaced = table.slice(start, SLICE_ROWS), np.zeros(0, np.int64)
            try:
                found = {name: read_column(name, piece[name], self.width) for name in columns}
                if masked:
                    found["input_ids"] = without_padding(found["input_ids"], piece[MASK])
            except BadRow as bad:
                raise SourceError(f"{self._where(block, start, bad.row)} {bad}") from None
            if "text" in found:
                found["text"], replaced = decode_texts(found["text"])
            where = partial(self._where, block, start)
            yield Records(block.first + start, found, where, replaced)

    def _where(self, block: Block, start: int, row: int) -> str:
        return row_name(block, start + row, self.origins)


# --------------------------------------------------------------------------------------- files


def is_table(name: str, kind: str = PARQUET) -> bool:
    """Whether a file's name ends with `kind`, a pattern, and is neither hidden nor a cache."""
    return re.fullmatch(rf"(?![._]|cache-).*\.(?:{kind})", name) is not None


def find_files(path: str, kind: str = PARQUET) -> dict[str, list[str]]:
    """Finds the files of folder `path` by split (`SPLITS`, `VALIDATION`).

    Args:
        kind: the pattern of the endings of their names.

    Raises:
        SourceError: a split is there in two ways, or some of its numbered files are missing.
    """
    base, ways = path.rstrip("/"), defaultdict[str, dict[str, list[str]]](dict)
    known = re.compile(_NAME.format("|".join([*SPLITS, *VALIDATION, *SYNONYMS]), kind=kind))
    for folder in (base, f"{base}/data"):
        numbered = defaultdict[str, list[tuple[str, str]]](list)
        for info in listing(folder):
            match, here = known.fullmatch(info.base_name), f"{folder}/{info.base_name}"
            is_directory = info.type == pafs.FileType.Directory
            if match is None or not (is_directory or is_table(info.base_name, kind)):
                continue
            name, number, count = match.groups()
            name, ending = SYNONYMS.get(name, name), info.base_name.partition(".")[2]
            way = f"{folder}/{match[1]}-*.{ending}" if number else here
            if files := files_below(here, kind) if is_directory else [here]:
                ways[name].setdefault(way, []).extend(files)
            if count and name in SPLITS:
                numbered[way].append((number, count))
            if is_directory and name in SPLITS:
                check_numbered(files)
        for way, numbers in numbered.items():
            _check_complete(way, numbers)
    for name, each in ways.items():
        if len(each) > 1 and name in SPLITS:
            first, second = sorted(each)[:2]
            raise SourceError(f"{first} and {second} are both there; keep one of them")
    return {name: sorted(chain(*each.values())) for name, each in ways.items()}


_NUMBERED = re.compile(r"(.*?)-?(\d+)-of-(\d+)(\.\w+)")


def check_numbered(files: Iterable[str]) -> None:
    """Raises SourceError where some of the files `NUMBER-of-COUNT` are missing."""
    numbered = defaultdict[str, list[tuple[str, str]]](list)
    for file in files:
        if part := _NUMBERED.fullmatch(file):
            numbered[f"{part[1]}-*{part[4]}"].append((part[2], part[3]))
    for way, numbers in numbered.items():
        _check_complete(way, numbers)


def _check_complete(way: str, numbers: list[tuple[str, str]]) -> None:
    """Raises SourceError unless files `NUMBER-of-COUNT` are all there, each once."""
    count = max(int(count) for _, count in numbers)
    have = sorted(int(number) for number, _ in numbers)
    if len(have) != count or have not in ([*range(count)], [*range(1, count + 1)]):
        raise SourceError(
            f"{way}: of the {count} files that the names tell of, {len(have)} are there, with the "
            f"numbers {have!s:.60}; there must be one of each"
        )


def files_below(directory: str, kind: str = PARQUET) -> list[str]:
    """Finds the files of a kind in a directory and below that are not hidden, by path."""
    base, (_, root) = directory.rstrip("/"), filesystem_of(directory)
    names = []
    for info in listing(base, recursive=True):
        name = info.path.strip("/")[len(root.strip("/")) :].strip("/")
        hidden = any(part.startswith((".", "_")) for part in name.split("/"))
        if info.type == pafs.FileType.File and is_table(info.base_name, kind) and not hidden:
            names.append(name)
    return [f"{base}/{name}" for name in sorted(names)]


# --------------------------------------------------------------------------------------- index


def index_parquet(
    path: str, labels_are: str = "auto", origins: Origins | None = None, *, is_file: bool = False
) -> Source:
    """Reads the footers of folder `path`, or of a training set that is one file; makes its tables.

    Args:
        labels_are: "auto", "ids" or "multi-hot", as the configuration's key `labels`.
        origins: as in `ParquetTable`.

    Raises:
        SourceError: a file that is no Parquet, a column that is missing or of another kind,
            files that disagree, labels that are not in the order of their ids, no training row.
    """
    multi_hot = labels_are == "multi-hot"
    files = {"train": [path]} if is_file else find_files(path)
    tables, origins = dict[str, ParquetTable](), origins or {}
    for name in ("train", "test"):
        if name in files:
            wanted = ("text", "labels"), (*LABELS[1:], MASK)
            tables[name] = table_of(files[name], *wanted, multi_hot, origins)
    if "train" not in tables or not num_rows(tables["train"]):
        raise SourceError(f"{path} has no training row; give a training set of at least one")
    kinds = {table.columns.get(name, "") for table in tables.values() for name in LABELS}
    strings = "list of string" in kinds
    if {"list of integer", "list of string"} <= kinds:
        raise SourceError(f"{path} has labels that are strings and others that are ids; use one")
    train_path = _origin(tables["train"].blocks[0].path, origins)
    labels: ParquetTable | Names | None = None
    if "labels" in files:
        labels = _labels_of(files["labels"], strings, origins)
    elif not strings and (names := _class_names(files, tables)) is not None:
        labels = Names(names, train_path)
    num_labels = None if labels is None else num_rows(labels)
    if multi_hot:
        width = _width(tables["train"])
        tables = {name: replace(table, width=width) for name, table in tables.items()}
        if num_labels not in (None, width):
            raise SourceError(
                f"{train_path} has {width} values in a row of labels and there are {num_labels} "
                f"labels; make them agree"
            )
        num_labels = width
    return Source(
        tables["train"],
        tables.get("test"),
        labels,
        train_path,
        num_labels,
        strings,
        notes=notes_on(path, files) + _note_on_text(files["train"][0]),
    )


def _labels_of(paths: list[str], strings: bool, origins: Origins) -> ParquetTable:
    """Makes the table of labels; strings: its labels are names, so that their order is free."""
    if strings:
        return table_of(paths, ("label",), ("text",), origins=origins)
    if "label" in footer(paths[0])[0].names:
        raise SourceError(
            f"{_origin(paths[0], origins)} has a column 'label' and the points have ids; leave it "
            f"out, with the rows in the order of the ids, or rename it to 'text'"
        )
    table = table_of(paths, (), ("text", "input_ids", MASK), origins=origins)
    check_label_ids(table.blocks, origins)
    return table


def notes_on(path: str, files: dict[str, list[str]]) -> tuple[str, ...]:
    """Sentences about files that are there and not read."""
    return tuple(
        f"{files[name][0]} is not read: validation= of the training points are held out"
        for name in VALIDATION
        if name in files
    ) + tuple(
        f"{files[name][0]} is in a directory that stands for a column, which is not read"
        for name in SPLITS
        if name in files and "=" in files[name][0][len(path) :].rpartition("/")[0]
    )


def _note_on_text(path: str) -> tuple[str, ...]:
    """A sentence about a text that is not read, because its tokens are there."""
    names = patiently(partial(footer, path), f"reading {path}")[0].names
    both = {"text", "input_ids"} <= set(names)
    return (f"{path} has text and input_ids: the tokens are read, and text is not",) * both


def _class_names(
    files: dict[str, list[str]], tables: dict[str, ParquetTable]
) -> tuple[str, ...] | None:
    train, test = tables["train"], tables.get("test")
    if test is None:
        return train.class_names
    only = replace(test, columns=train.columns)
    paths = (_origin(files[name][0], train.origins) for name in ("train", "test"))
    return _merged(next(paths), train, next(paths), only).class_names


def _width(table: ParquetTable) -> int:
    """Returns the number of values in a list of labels, from the first block that has any."""
    for block in table.blocks:
        for chunk in read_block(block, ["labels"], table.origins)["labels"].chunks:
            lists = plain(chunk)
            if not pa.types.is_null(lists.type) and len(lists.flatten()):
                return int(pc.max(pc.list_value_length(lists)).as_py())
    path = _origin(table.blocks[0].path, table.origins)
    raise SourceError(f"{path} gives no training point a label; give labels")


def table_of(
    paths: list[str],
    required: tuple[str, ...],
    optional: tuple[str, ...] = (),
    multi_hot: bool = False,
    origins: Origins | None = None,
) -> ParquetTable:
    """Makes the table of these files, with these of its columns.

    Where labels are required, a column `input_ids` serves as `text`. A column `attention_mask`
    belongs to `input_ids`, and says which of them are padding.

    Raises:
        SourceError: a file that is no Parquet, or has a column that is missing, of another kind,
            or does not go with those of the files before it.
    """
    blocks: list[Block] = []
    first, table, origins = 0, ParquetTable((), {}), origins or {}
    firsts = _origin(paths[0], origins)
    for path in paths:
        schema, metadata = patiently(partial(footer, path), f"reading {path}")
        named = _origin(path, origins)
        here = _table(named, schema, required, optional, multi_hot)
        table = here if path == paths[0] else _merged(firsts, table, named, here)
        for group in range(metadata.num_row_groups):
            rows = metadata.row_group(group).num_rows
            if rows:
                blocks.append(Block(path, first, rows, group))
            first += rows
    if table.columns.get("text") == "nothing" and "text" in required:
        raise SourceError(f"{firsts} has a column 'text' of type null; it must be strings")
    return replace(table, blocks=tuple(blocks), origins=origins)


def _origin(path: str, origins: Origins) -> str:
    return origins.get(path, (path,))[0]


def _table(
    path: str,
    schema: pa.Schema,
    required: tuple[str, ...],
    optional: tuple[str, ...],
    multi_hot: bool,
) -> ParquetTable:
    """Makes a table with the columns of one file, without its blocks."""
    columns = dict[str, str]()
    with_tokens = "labels" in required and "input_ids" in schema.names
    for wanted in required + optional:
        name = "input_ids" if wanted == "text" and with_tokens else wanted
        if name == MASK and "input_ids" not in schema.names:
            continue
        if name in schema.names:
            if schema.names.count(name) > 1:
                raise SourceError(f"{path} has two columns {name!r}; rename one")
            columns[name] = checked_kind(path, schema.field(name), multi_hot)
        elif name in required:
            raise SourceError(
                f"{path} has the columns {schema.names!s:.300}; rename the one with the "
                f"{column_title(name)} to {name!r}"
            )
    return ParquetTable((), columns, class_names(path, schema) if "labels" in required else None)


def _merged(first: str, table: ParquetTable, path: str, here: ParquetTable) -> ParquetTable:
    """Merges the columns of file `path` with those of the files before it, such as `first`."""
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
    return ParquetTable((), columns, names)
