"""Own data: files of tables and of others' programs, written again as Parquet of a source.

    train.csv, .tsv, .jsonl, .ndjson, .json (plain or .gz), or one such file of any name
    train/data-*.arrow, or data-*.arrow     what Hugging Face's `datasets` saves to disk
    train.parquet                           with columns of other names
    X.trn.txt, Y.trn.npz                    PECOS: a text a line, labels as a sparse matrix

The same names with test (tst) and labels; for PECOS, Y.txt or output-items.txt has the label texts.
A task reads a file from its start to its end, since a quoted field may hold line ends, and writes
pieces with the columns `text` and `labels` (fields.py). parquet.py reads these like any others.
"""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy import sparse

from renee_ray.data.sources import parquet
from renee_ray.data.sources.columns import kind_of
from renee_ray.data.sources.csv_rows import csv_rows
from renee_ray.data.sources.fields import MIXED, Fields, column, guess, leaves, shaped
from renee_ray.data.sources.label_order import ID_COLUMNS
from renee_ray.data.sources.lines import Lines, chunked, opened
from renee_ray.data.sources.records import (
    Block,
    Piece,
    SourceError,
    lists_of,
    whole_characters,
)
from renee_ray.data.sources.row_groups import SLICE_ROWS, first_rows, footer, read_block
from renee_ray.data.sources.xmlrepo import json_object
from renee_ray.data.storage import is_transient, listing
from renee_ray.errors import reason

TABLES = r"(?:csv|tsv|jsonl|ndjson|json)(?:\.gz)?"
"""Endings of the names of files that are read."""
SAMPLE_ROWS = 1000
SLICE_BYTES = 1 << 28
"""About the most bytes of rows of Parquet that are handed on together."""
GUESSED = ("auto", "ids", "multi-hot")
"""Values of the key `labels` that name no column."""
PAIR_BYTES = 1 << 31
"""The most bytes of rows that are brought together by their text, in one task."""
PECOS = {"train": "trn", "test": "tst"}


@dataclass(frozen=True)
class Own:
    """The files of each split. fields: None where the kind of the files says what is what."""

    splits: dict[str, list[str]]
    fields: Fields | None
    notes: tuple[str, ...]
    num_labels = None

    def tasks(self) -> list[tuple[str, list[str]]]:
        """Returns (split, the files that are read together) of each task."""
        pairs = self.fields is not None and self.fields.pairs
        return [
            (split, files)
            for split in ("train", "test", "labels")
            if (paths := self.splits.get(split, []))
            for files in ([paths] if pairs and split != "labels" else [[path] for path in paths])
        ]

    def pieces(self, split: str, paths: list[str]) -> Iterator[Piece]:
        """Yields the rows of some files of a split.

        Raises:
            SourceError: a file that cannot be read, or a bad row.
        """
        fields, pairs, size = self.fields, list[tuple[str, pa.Table]](), 0
        for path in paths:
            first, matrix = 0, ""
            wanted = [*fields.text, fields.labels] if fields and split != "labels" else None
            if split == "labels" and path.endswith(f".{parquet.PARQUET}"):
                wanted = ["label", "text", *ID_COLUMNS]
            if fields is None and split in PECOS:
                matrix = f"{path.rpartition('/')[0]}/Y.{PECOS[split]}.npz"
            for rows in tables_of(path, wanted, matrix):
                made = rows
                if fields is not None and split != "labels":
                    made = shaped(path, rows, fields)
                elif fields is not None:
                    made = _with_ids(path, label_columns(path, rows), rows)
                if fields is None or split == "labels" or not fields.pairs:
                    yield Piece(made, path, first)
                else:
                    pairs.append((path, made))
                    if (size := size + made.nbytes) > PAIR_BYTES:
                        raise SourceError(
                            f"{path}: the pairs of a text and a label have more than {PAIR_BYTES} "
                            f"bytes; write each text once, with all its labels and a separator"
                        )
                first += len(rows)
            if fields is None and split == "labels":
                self._compare(path, first)
        if pairs:
            yield Piece(_grouped(pairs), path, 0)

    def _compare(self, path: str, lines: int) -> None:
        """Raises SourceError where PECOS' matrix has another number of labels than their texts."""
        matrix = f"{path.rpartition('/')[0]}/Y.trn.npz"
        with opened(matrix) as file:
            columns = _matrix(matrix, file.read()).shape[1]
        if lines != columns:
            raise SourceError(
                f"{path} has {lines} lines and {matrix} has {columns} columns; make them agree"
            )


def refuse_other_kinds(path: str, splits: Collection[str], train: str) -> None:
    """Raises SourceError for a test set or labels of another kind than the training set."""
    for kind in ("arrow", TABLES, parquet.PARQUET):
        for split, (first, *_) in parquet.find_files(path, kind).items():
            if split in ("test", "labels") and split not in splits:
                raise SourceError(
                    f"{first} is there, and the training set is {train}; write both in one format"
                )


def training_sets(path: str) -> list[str]:
    """Returns the first file of the training set of each kind of own data in folder `path`."""
    base = path.rstrip("/")
    found = [parquet.find_files(base, kind).get("train", []) for kind in ("arrow", TABLES)]
    # Tables in directories may tell of the other files there.
    found[1] = [each for each in found[1] if each.rpartition("/")[0] in (base, f"{base}/data")]
    if pecos := _pecos(base):
        found.append(pecos.splits["train"])
    return [files[0] for files in found if files]


def find_own(path: str, text: str, labels: str, separator: str) -> Own | None:
    """Finds own data in folder `path`, and reads its first rows; None without a training set.

    Raises:
        SourceError: what is the text or the labels is not clear, or the file cannot be read.
    """
    base, pecos = path.rstrip("/"), _pecos(path)
    if pecos is not None:
        return pecos
    named = bool(text or labels not in GUESSED)
    kinds = ("arrow", TABLES, *[parquet.PARQUET] * named)
    found = [parquet.find_files(base, kind) for kind in kinds]
    splits = next((each for each in found if "train" in each), {})
    if not splits:
        names = sorted(info.base_name for info in listing(base))
        saved = [n for n in names if n.startswith("data-") and n.endswith(".arrow")]
        tables = [name for name in names if parquet.is_table(name, TABLES)]
        if any(found) or (not saved and len(tables) != 1):
            return None
        splits["train"] = [f"{base}/{name}" for name in saved or tables]
        parquet.check_numbered(splits["train"])
    refuse_other_kinds(base, splits, splits["train"][0])
    own = read_own(splits, text, labels, separator)
    return replace(own, notes=own.notes + parquet.notes_on(path, splits))


def read_own(splits: dict[str, list[str]], text: str, labels: str, separator: str) -> Own:
    """Reads the first rows of the training set; raises SourceError as `find_own` does."""
    tops = [name.partition(".")[0] for name in (*text.split("+"), labels)]
    named = [*text.split("+"), labels, *tops] if text and labels not in GUESSED else None
    tables = ((path, rows) for path in splits["train"] for rows in _first(path, named) if len(rows))
    first, rows = next(tables, ("", None))
    if rows is None:
        raise SourceError(f"{splits['train'][0]} has no row; give a training set of at least one")
    if "filter_labels" in rows.column_names:
        raise SourceError(
            f"{first} has a column 'filter_labels', which is read from Parquet with the columns "
            f"text and labels alone; write it so, or leave that column out"
        )
    rows = rows.slice(0, SAMPLE_ROWS)
    fields = guess(first, rows, text, labels, separator)
    sample = shaped(first, rows, fields)
    note = f"took {' + '.join(fields.text)} as text, {fields.labels}"
    note += f", separated by {fields.separator!r}," if fields.separator else ""
    number = pc.mean(pc.fill_null(pc.list_value_length(sample["labels"]), 0)).as_py()
    note += f" as labels: {number:.3g} labels a row on average of the first {len(rows)}"
    if fields.pairs:
        note += "; rows of the same text are one point"
    return Own(splits, fields, (note,))


def _first(path: str, columns: list[str] | None) -> Iterator[pa.Table]:
    """Yields the first rows of a file, and perhaps more; of Parquet, these columns (None: all)."""
    if path.endswith(f".{parquet.PARQUET}"):
        yield first_rows(path, columns, SAMPLE_ROWS)
    else:
        yield from tables_of(path)


def _pecos(path: str) -> Own | None:
    base, names = path.rstrip("/"), {info.base_name for info in listing(path)}
    splits = {
        split: [f"{base}/X.{short}.txt"]
        for split, short in PECOS.items()
        if {f"X.{short}.txt", f"Y.{short}.npz"} <= names
    }
    if "train" not in splits:
        return None
    if texts := [name for name in ("Y.txt", "output-items.txt") if name in names]:
        splits["labels"] = [f"{base}/{texts[0]}"]
    note = f"took X.trn.txt as texts, Y.trn.npz as labels, {(texts or ['no file'])[0]} as names"
    return Own(splits, None, (note,))


# -------------------------------------------------------------------------------------- reading


def _with_ids(path: str, labels: pa.Table, rows: pa.Table) -> pa.Table:
    """Adds the ids of labels in `rows`, if there are any, which label_order.py checks."""
    for name in ID_COLUMNS:
        if name in rows.column_names:
            ids = column(path, rows, name)
            if kind_of(ids.type) in ("integer", "number", "string"):
                labels = labels.append_column(name, ids)
    return labels


def label_columns(path: str, rows: pa.Table) -> pa.Table:
    """The columns of a table of labels that are read."""
    known = [name for name in ("label", "text") if name in rows.column_names]
    if not known:
        raise SourceError(
            f"{path} has the columns {rows.column_names!s:.300}; rename the one with the labels, "
            f"in the order of their ids, to 'text' (or to 'label', where points have names)"
        )
    made = {name: column(path, rows, name) for name in known}
    if mixed := [name for name, values in made.items() if values.type == MIXED]:
        raise SourceError(f"{path}: {mixed[0]} is not of one kind; it must be strings")
    return pa.table(made)


def _grouped(pairs: list[tuple[str, pa.Table]]) -> pa.Table:
    """Makes one point of the rows with the same text, in the order of their first rows.

    Each row with an empty text is a point.
    """
    kinds = {kind_of(table["labels"].type): path for path, table in pairs}
    kinds.pop("list of nothing", None)
    if len(kinds) > 1:
        raise SourceError(
            f"labels in {' and in '.join(kinds.values())} are {' and '.join(kinds)}; use one"
        )
    tables = [table for _, table in pairs]
    whole = pa.concat_tables(tables, promote_options="permissive").combine_chunks()
    codes = whole["text"].combine_chunks().dictionary_encode()
    points, empty = codes.indices.to_numpy().astype(np.int64), _is_empty(codes.dictionary)
    alone = np.flatnonzero(empty[points])  # rows whose text is missing have nothing in common
    points[alone] = len(empty) + alone
    _, firsts, points = np.unique(points, return_index=True, return_inverse=True)
    points = np.argsort(np.argsort(firsts))[points]  # now by their first rows
    points = points[pc.list_parent_indices(whole["labels"].combine_chunks()).to_numpy()]
    order = np.argsort(points, kind="stable")
    labels = whole["labels"].combine_chunks().flatten().take(pa.array(order))
    lists = lists_of(len(firsts), points[order], labels)
    texts = whole["text"].take(pa.array(np.sort(firsts)))
    return pa.table({"text": texts, "labels": lists}, metadata=whole.schema.metadata)


def _is_empty(texts: pa.Array) -> NDArray[np.bool_]:
    found = pc.match_substring_regex(texts, r"^\s*$")
    return np.asarray(found.to_numpy(zero_copy_only=False), np.bool_)


def tables_of(path: str, columns: list[str] | None = None, matrix: str = "") -> Iterator[pa.Table]:
    """Reads a file in pieces: these of its columns (None: all), if not more.

    Args:
        matrix: of a file of texts, the file with their labels, as PECOS has it.

    Raises:
        SourceError: the file is not what its name says.
    """
    name = path.removesuffix(".gz")
    kinds = {".csv": csv_rows, ".tsv": csv_rows, ".arrow": _arrow, ".parquet": _parquet}
    ending = name[name.rfind(".") :]
    try:
        if ending == ".txt":
            yield from _texts(path, matrix)
        else:
            yield from kinds.get(ending, _json_lines)(path, columns)
    except (pa.ArrowException, ValueError, OSError, MemoryError) as error:
        if is_transient(error):
            raise
        raise SourceError(f"{path} cannot be read ({reason(error):.300}); correct it") from None


def _json_lines(path: str, columns: list[str] | None) -> Iterator[pa.Table]:
    first = 1
    for lines in chunked(Lines(path)):
        objects = [
            _json_row(line, f"{path}:{number}")
            for number, line in enumerate(lines, first)
            if line.strip()
        ]
        if objects or first == 1:
            yield _from_objects(f"{path}:{first} and below", objects, columns)
        first += len(lines)


def _json_row(line: bytes, where: str) -> dict[str, Any]:
    # Not replaced: two labels that differ only in such bytes would become one.
    try:
        found = json_object(line.decode(), where)
    except UnicodeDecodeError as error:
        part = line[max(error.start - 20, 0) : error.end + 20]
        raise SourceError(f"{where}: {part!r} is not UTF-8; write the file as UTF-8") from None
    if b"\\ud" in line.lower():  # perhaps a lone surrogate, of which no column can be made
        found = json.loads(whole_characters(json.dumps(found, ensure_ascii=False))[0])
    return found


def _from_objects(where: str, objects: list[dict[str, Any]], columns: list[str] | None) -> pa.Table:
    there = dict.fromkeys(name for each in objects for name in each)
    # A dotted name may be a key as it is, or a field of a nested one.
    names = [n if n in there else n.partition(".")[0] for n in columns or ()] or list(there)
    made = {}
    for name in dict.fromkeys(names):
        try:
            made[name] = pa.array([each.get(name) for each in objects])
        except (pa.ArrowException, OverflowError, UnicodeError) as error:
            if columns:
                raise SourceError(
                    f"{where}: {name} is not of one kind ({reason(error):.200}); correct it"
                ) from None
            made[name] = pa.nulls(len(objects), MIXED)  # refused only if it is to be read
    return pa.table(made)


def _arrow(path: str, columns: list[str] | None) -> Iterator[pa.Table]:
    with opened(path) as file, pa.ipc.open_stream(file) as stream:
        leaves(stream.schema)  # a name that is not UTF-8 shows here
        for batch in stream:
            batch.validate(full=True)  # a damaged offset would be read beyond the buffer
            yield pa.Table.from_batches([batch])


def _parquet(path: str, columns: list[str] | None) -> Iterator[pa.Table]:
    schema, metadata = footer(path)
    names = {name if name in schema.names else name.partition(".")[0] for name in columns or ()}
    wanted = [name for name in schema.names if name in names] or schema.names
    for group in range(metadata.num_row_groups):
        rows = read_block(Block(path, 0, 0, group), wanted)
        # One array of strings has less than 2 GiB.
        size = min(SLICE_ROWS, max(1, len(rows) * SLICE_BYTES // max(rows.nbytes, 1)))
        for start in range(0, len(rows), size):
            yield rows.slice(start, size)


def _texts(path: str, labels: str) -> Iterator[pa.Table]:
    """Texts a line; those of PECOS' points with their labels."""
    matrix = None
    if labels:
        with opened(labels) as file:
            matrix = _matrix(labels, file.read())
    first = 0
    for texts in chunked(Lines(path)):
        yield _with_labels(path, texts, matrix, first)
        first += len(texts)
    if matrix is not None and first != matrix.shape[0]:
        raise SourceError(
            f"{path} has {first} lines and {labels} {matrix.shape[0]} rows; make them agree"
        )


def _matrix(path: str, content: bytes) -> Any:
    try:
        matrix = sparse.load_npz(io.BytesIO(content))
        matrix.check_format(full_check=True)  # the conversion below trusts its indices
        matrix = sparse.csr_matrix(matrix)
    except Exception as error:  # numpy, zipfile and zlib each have their own
        raise SourceError(
            f"{path} is no sparse matrix in CSR or CSC, as scipy saves it "
            f"({type(error).__name__}); write it again"
        ) from None
    matrix.eliminate_zeros()
    return matrix


def _with_labels(path: str, texts: list[bytes], matrix: Any, first: int) -> pa.Table:
    columns = {"text": pa.array(texts, pa.large_binary())}
    if matrix is not None:
        rows = matrix[first : first + len(texts)]
        if rows.shape[0] == len(texts):
            columns["labels"] = pa.LargeListArray.from_arrays(
                pa.array(rows.indptr.astype(np.int64)), pa.array(rows.indices.astype(np.int64))
            )
    return pa.table(columns)
