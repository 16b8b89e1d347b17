"""Rows of CSV and TSV files, and the stray quotes that would take several rows for one.

A field that begins with a quote ends at the next one. Where a text begins with a quote that is a
part of it, the rows up to the next quote are in its field, and pyarrow reads them without an error.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from renee_ray.data.sources.lines import MAX_LINE_BYTES, PIECE_BYTES, opened
from renee_ray.data.sources.records import SourceError


def csv_rows(path: str, columns: list[str] | None) -> Iterator[pa.Table]:
    """Reads a file in pieces, as `own.tables_of`.

    Raises:
        SourceError: two columns have a name that is read, or a stray quote has swallowed rows.
    """
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
    strings = pacsv.ConvertOptions(column_types=dict.fromkeys(names, pa.large_binary()))
    # In one column an empty line is an empty value, but for those at the end.
    parsing.ignore_empty_lines, empty = len(names) > 1 or not header.strip(), 0
    quotes = _Quotes(path, delimiter)
    with opened(path) as file:
        for batch in pacsv.open_csv(file, reading, parsing, strings):
            rows = pa.Table.from_batches([batch])
            if not parsing.ignore_empty_lines:
                there = np.flatnonzero(pc.binary_length(rows[0]).to_numpy())
                last = int(there[-1]) + 1 if len(there) else 0
                blank = pa.table({names[0]: pa.array([b""] * empty, rows[0].type)})
                empty = len(rows) - last + (0 if last else empty)
                rows = pa.concat_tables([blank, rows.slice(0, last)]) if last else rows.slice(0, 0)
            quotes.check(rows)  # of columns, too, that are not read
            # Where none is there, the error that follows names all.
            yield rows.select([names.index(name) for name in wanted] or [*range(len(names))])


class _Quotes:
    """Looks for stray quotes in a file, as its rows are read.

    A field with whole rows in it has a shape: its first line has the delimiters that are missing
    in its own row, each further line those of a row, and the last one those before its column.
    In TSV, whose writers seldom quote, that is enough. Elsewhere texts of several lines may have
    this shape by chance, and the quotes decide: one that ends a field has a delimiter or a line end
    behind it.
    """

    def __init__(self, path: str, delimiter: str) -> None:
        self.path, self.delimiter = path, delimiter
        self.seen, self.looked_at = 1, 0  # records of the file; the first is the header
        self.misplaced = _misplaced_quotes(path, delimiter)

    def check(self, rows: pa.Table) -> None:
        """Raises SourceError where the next rows of the file have swallowed others."""
        self.seen += len(rows)
        value = self._of_rows_shape(rows)
        if value is None:
            return
        if self.delimiter == "\t":
            raise SourceError(
                f"{self.path}: a field holds several lines, {value!r:.80}; double the quotes "
                f"inside fields that are quoted, or write CSV"
            )
        number, self.looked_at = self.seen - self.looked_at, self.seen
        if line := next(filter(None, islice(self.misplaced, number)), 0):
            raise SourceError(
                f"{self.path}:{line}: a quote that is no field's end follows a field of several "
                f"lines; double the quotes inside fields, and quote texts that begin with one"
            )

    def _of_rows_shape(self, rows: pa.Table) -> str | None:
        mark, last = self.delimiter.encode(), rows.num_columns - 1
        for place, values in enumerate(rows.columns):
            both = pc.and_(pc.match_substring(values, mark), pc.match_substring(values, b"\n"))
            for value in values.filter(both).to_pylist():
                if _has_shape_of_rows(value, mark, place, last):
                    return str(value, "utf-8", "replace")
        return None


def _has_shape_of_rows(value: bytes, mark: bytes, place: int, last: int) -> bool:
    """Whether a field at `place` of the columns 0..last may hold rows, as `_Quotes` says."""
    first, *others = [line.count(mark) for line in value.splitlines() if line.strip()] or [0]
    if not others or first != last - place:
        return False
    # A quote that nothing ends takes the last row whole.
    return others[-1] in (place, last) and all(count == last for count in others[:-1])


def _misplaced_quotes(path: str, delimiter: str) -> Iterator[int]:
    """Yields, for each record, the line of a misplaced quote that ends several lines, or 0."""
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))
    with opened(path) as file:
        text = io.TextIOWrapper(file, "latin-1", newline="")
        records = csv.reader(text, delimiter=delimiter, strict=True)
        while True:
            begin = records.line_num + 1
            try:
                if next(records):  # not an empty line
                    yield 0
            except StopIteration:
                return
            except csv.Error:
                yield records.line_num if records.line_num > begin else 0
