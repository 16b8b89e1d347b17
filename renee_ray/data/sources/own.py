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
import pyarrow.csv as pacsv
from scipy import sparse

from renee_ray.data.sources import parquet
from renee_ray.data.sources.columns import kind_of, plain
from renee_ray.data.sources.fields import MIXED, Fields, column, guess, leaves, shaped
from renee_ray.data.sources.lines import PIECE_BYTES, Lines, chunked, opened
from renee_ray.data.sources.records import (
    Block,
    Piece,
    SourceError,
    decoded,
    lists_of,
    whole_characters,
)
from renee_ray.data.sources.xmlrepo import json_object
from renee_ray.data.storage import is_transient, listing
from renee_ray.errors import reason

TABLES = r"(?:csv|tsv|jsonl|ndjson|json)(?:\.gz)?"
"""Endings of the names of files that are read."""
SAMPLE_ROWS = 1000
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
            first, base = 0, 0 if path == self.splits[split][0] else None
            wanted = [*fields.text, fields.labels] if fields and split != "labels" else None
            matrix = ""
            if fields is None and split in PECOS:
                matrix = f"{path.rpartition('/')[0]}/Y.{PECOS[split]}.npz"
            for rows in tables_of(path, wanted, matrix):
                made = rows
                if split == "labels":
                    base = _check_ids(path, rows, first, base)
                if fields is not None:
                    is_points = split != "labels"
                    made = shaped(path, rows, fields) if is_points else label_columns(path, rows)
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
    named = bool(text or labels not in ("auto", "ids", "multi-hot"))
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
    refuse_other_kinds(base, splits, splits["train"][0])
    own = read_own(splits, text, labels, separator)
    return replace(own, notes=own.notes + parquet.notes_on(path, splits))


def read_own(splits: dict[str, list[str]], text: str, labels: str, separator: str) -> Own:
    """Reads the first rows of the training set; raises SourceError as `find_own` does."""
    tables = ((path, table) for path in splits["train"] for table in tables_of(path) if len(table))
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


def _check_ids(path: str, rows: pa.Table, first: int, base: int | None) -> int | None:
    """Compares a column of ids of labels, if there is one, with the rows' places.

    Args:
        first: rows of the file before these; base: what the file's first id is, or None for any.

    Returns:
        the file's first id, or None where there are no ids.

    Raises:
        SourceError: an id is not its row's.
    """
    name = next((each for each in ("id", "label_id") if each in rows.column_names), None)
    if name is None or "label" in rows.column_names or not len(rows):
        return base
    values = plain(column(path, rows, name))
    if kind_of(values.type) not in ("integer", "string"):
        return base
    found = [
        each.decode("utf-8", "replace") if isinstance(each, bytes) else str(each)
        for each in values.to_pylist()
    ]
    if not all(each.isdecimal() for each in found):  # a code, which is no place
        return base
    base = int(found[0]) if base is None else base
    wrong = next((i for i, each in enumerate(found) if int(each) != base + first + i), None)
    if wrong is not None:
        raise SourceError(
            f"{path}: row {first + wrong} of the labels has {found[wrong]!r:.60} in {name}; give "
            f"all labels in the order of their ids, from 0, or leave that column out"
        )
    return base


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
    """Makes one point of the rows with the same text, in the order of their first rows."""
    kinds = {kind_of(table["labels"].type): path for path, table in pairs}
    kinds.pop("list of nothing", None)
    if len(kinds) > 1:
        raise SourceError(
            f"labels in {' and in '.join(kinds.values())} are {' and '.join(kinds)}; use one"
        )
    tables = [table for _, table in pairs]
    whole = pa.concat_tables(tables, promote_options="permissive").combine_chunks()
    rows = pc.list_parent_indices(whole["labels"].combine_chunks()).to_numpy()
    codes = whole["text"].combine_chunks().dictionary_encode()
    points = codes.indices.to_numpy()[rows]
    order = np.argsort(points, kind="stable")
    labels = whole["labels"].combine_chunks().flatten().take(pa.array(order))
    lists = lists_of(len(codes.dictionary), points[order], labels)
    return pa.table({"text": codes.dictionary, "labels": lists}, metadata=whole.schema.metadata)


def tables_of(path: str, columns: list[str] | None = None, matrix: str = "") -> Iterator[pa.Table]:
    """Reads a file in pieces: these of its columns (None: all), if not more.

    Args:
        matrix: of a file of texts, the file with their labels, as PECOS has it.

    Raises:
        SourceError: the file is not what its name says.
    """
    name = path.removesuffix(".gz")
    kinds = {".csv": _csv, ".tsv": _csv, ".arrow": _arrow, ".parquet": _parquet}
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


def _csv(path: str, columns: list[str] | None) -> Iterator[pa.Table]:
    with opened(path) as file:
        header = file.readline(PIECE_BYTES).decode("utf-8-sig", "replace")
    found = [each for each in ",;\t|" if each in header]
    delimiter = "\t" if path.removesuffix(".gz").endswith(".tsv") else (found or [","])[0]
    parsing = pacsv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    reading = pacsv.ReadOptions(block_size=PIECE_BYTES, use_threads=False)
    with opened(path) as file:
        names = pacsv.open_csv(file, reading, parsing).schema.names
    # Excel leaves columns without a name behind the last.
    wanted = [name for name in names if (name if columns is None else name in columns)]
    if twice := [name for name in wanted if names.count(name) > 1]:
        raise SourceError(f"{path} has two columns {twice[0]!r}; rename one")
    # Not inferred: a text may look like a number or a date.
    strings = pacsv.ConvertOptions(
        column_types=dict.fromkeys(names, pa.large_binary()), include_columns=wanted
    )
    # In one column an empty line is an empty value, but for those at the end.
    parsing.ignore_empty_lines, empty = len(names) > 1 or not header.strip(), 0
    with opened(path) as file:
        for batch in pacsv.open_csv(file, reading, parsing, strings):
            rows = pa.Table.from_batches([batch])
            if not parsing.ignore_empty_lines:
                there = np.flatnonzero(pc.binary_length(rows[0]).to_numpy())
                last = int(there[-1]) + 1 if len(there) else 0
                blank = pa.table({names[0]: pa.array([b""] * empty, rows[0].type)})
                empty = len(rows) - last + (0 if last else empty)
                rows = pa.concat_tables([blank, rows.slice(0, last)]) if last else rows.slice(0, 0)
            if delimiter == "\t":
                _refuse_swallowed(path, rows)
            yield rows


def _refuse_swallowed(path: str, rows: pa.Table) -> None:
    """Raises SourceError for a field with tabs and line ends: a quote has taken lines into it."""
    for values in rows.columns:
        both = pc.and_(pc.match_substring(values, b"\t"), pc.match_substring(values, b"\n"))
        if pc.any(both).as_py():
            value = values.filter(both)[0].as_py().decode("utf-8", "replace")
            raise SourceError(
                f"{path}: a field holds several lines, {value!r:.80}; double the quotes inside "
                f"fields that are quoted, or write CSV"
            )


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
    found = json_object(decoded(line)[0], where)
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
    schema, metadata = parquet.footer(path)
    names = {name if name in schema.names else name.partition(".")[0] for name in columns or ()}
    for group in range(metadata.num_row_groups):
        yield parquet.read_block(Block(path, 0, 0, group), sorted(names) or schema.names)


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
