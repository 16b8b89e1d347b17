"""Files of the Extreme Classification Repository: lines to records, errors named file:line.

    texts    a text a line
    labels   `id:value id:value ...` a line; a first line `rows columns` may precede
    filters  `row label` a line
    JSON     an object a line: title, content, target_ind, target_rel

What is parsed is a block of lines (data/sources/lines.py). Label ids are int64 from the first byte.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from renee_ray.data.sources.lines import Block, Int64s, Lines, SourceError, lone_returns, read
from renee_ray.errors import reason

Bools = NDArray[np.bool_]

MAX_ID_DIGITS = 18
MAX_HEADER_DIGITS = 100
MAX_VALUE_BYTES = 16
MAX_LABELS = 2**31
"""A header that says more is taken for damage; the largest sets known have 10**8."""
MAX_INFERRED_LABELS = 10**8
"""Without a header and without label texts, a larger id is taken for damage."""


# -------------------------------------------------------------------------------------- texts


@dataclass(frozen=True)
class Texts:
    """Decoded texts of a block, and what was wrong with them."""

    texts: list[str]
    replaced_lines: int
    """Lines with at least one byte that is not UTF-8."""
    replaced_bytes: int

    def odd(self) -> dict[str, int]:
        """Counts for a conversion's statistics."""
        return {
            "empty_texts": sum(not text.strip() for text in self.texts),
            "replaced_lines": self.replaced_lines,
            "replaced_bytes": self.replaced_bytes,
        }


def texts_of(block: Block) -> Texts:
    """A text a line; bytes that are not UTF-8 are replaced and counted."""
    try:
        whole = block.data.decode("utf-8").removesuffix("\n").split("\n")
        return Texts([text.removesuffix("\r") for text in whole[: len(block)]], 0, 0)
    except UnicodeDecodeError:
        pass  # line by line, to tell how many
    texts: list[str] = []
    bad_lines = bad_bytes = 0
    for line in block:
        text, bad = decoded(line)
        texts.append(text)
        bad_lines += bad > 0
        bad_bytes += bad
    return Texts(texts, bad_lines, bad_bytes)


def decoded(line: bytes) -> tuple[str, int]:
    """The line as text, and how many of its bytes are not UTF-8."""
    try:
        return line.decode("utf-8"), 0
    except UnicodeDecodeError:
        valid = len(line.decode("utf-8", "ignore").encode())
        return line.decode("utf-8", "replace"), len(line) - valid


# ------------------------------------------------------------------------------------- labels


@dataclass(frozen=True)
class Pairs:
    """(row, label) pairs of a block: ascending by row, then label; unique.

    rows: int64 [m], places in the block. labels: int64 [m].
    """

    rows: Int64s
    labels: Int64s
    duplicates: int = 0
    zeros: int = 0
    """Pairs whose value is 0: not positives, dropped."""

    def offsets(self, num_rows: int) -> Int64s:
        """int64 [num_rows + 1]: row i's labels are labels[offsets[i]:offsets[i + 1]]."""
        return np.searchsorted(self.rows, np.arange(num_rows + 1))


def pairs(rows: Int64s, labels: Int64s, zeros: int = 0) -> Pairs:
    """Sorts and removes duplicates, which are counted."""
    ascending = (rows[1:] > rows[:-1]) | ((rows[1:] == rows[:-1]) & (labels[1:] > labels[:-1]))
    if ascending.all():  # as most files are
        return Pairs(rows, labels, 0, zeros)
    order = np.lexsort((labels, rows))
    rows, labels = rows[order], labels[order]
    new = np.ones(len(rows), dtype=bool)
    new[1:] = (rows[1:] != rows[:-1]) | (labels[1:] != labels[:-1])
    return Pairs(rows[new], labels[new], int(len(new) - new.sum()), zeros)


def _table(characters: bytes) -> Bools:
    table = np.zeros(256, dtype=bool)
    table[np.frombuffer(characters, np.uint8)] = True
    return table


_SPACE = _table(b" \t\r\n")
_DIGIT = _table(b"0123456789")
_NONZERO = _table(b"123456789")


@dataclass(frozen=True)
class _Tokens:
    """Runs of non-blank bytes: starts, stops int64 [t]; rows int64 [t], places in the block."""

    data: NDArray[np.uint8]
    starts: Int64s
    stops: Int64s
    rows: Int64s

    @classmethod
    def of(cls, block: Block) -> _Tokens:
        data = np.frombuffer(block.data, np.uint8)
        if len(inner := lone_returns(block.data)):
            row = int(np.searchsorted(block.starts, inner[0], side="right")) - 1
            raise SourceError(
                f"{block.where(row)}: a carriage return within the line; end every line with a "
                f"line feed"
            )
        inside = np.zeros(len(data) + 2, dtype=bool)
        inside[1:-1] = ~_SPACE[data]
        edges = np.flatnonzero(inside[1:] != inside[:-1])
        starts, stops = edges[0::2], edges[1::2]
        rows = np.searchsorted(block.starts, starts, side="right") - 1
        return cls(data, starts, stops, rows)

    def text(self, i: int) -> str:
        return self.data[self.starts[i] : self.stops[i]].tobytes().decode("utf-8", "replace")

    def count(self, table: Bools, starts: Int64s, stops: Int64s) -> Int64s:
        """How many bytes of each [start, stop) are in `table`."""
        total = np.zeros(len(self.data) + 1, dtype=np.int64)
        np.cumsum(table[self.data], dtype=np.int64, out=total[1:])
        return total[stops] - total[starts]

    def integers(self, stops: Int64s) -> tuple[Int64s, Bools]:
        """Each token up to `stops` as an integer, and whether it is one."""
        lengths = stops - self.starts
        good = lengths > 0
        values = np.zeros(len(lengths), dtype=np.int64)
        for place in range(min(int(lengths.max(initial=0)), MAX_ID_DIGITS + 1)):
            here = slice(None) if place < lengths.min() else np.flatnonzero(place < lengths)
            digits = self.data[self.starts[here] + place] - np.uint8(ord("0"))
            good[here] &= digits <= 9
            if place < MAX_ID_DIGITS:
                values[here] = values[here] * 10 + digits
        # A longer one is out of range or malformed: which of the two, its error's text decides.
        values[good & (lengths > MAX_ID_DIGITS)] = np.iinfo(np.int64).max
        return values, good

    def same_text(self, starts: Int64s) -> bytes | None:
        """What every token holds from `starts` on, if it is the same in all of them."""
        lengths = self.stops - starts
        if len(starts) == 0 or not lengths.min() == lengths.max() <= MAX_VALUE_BYTES:
            return None
        first = self.data[starts[0] : self.stops[0]]
        for place, byte in enumerate(first):
            if not (self.data[starts + place] == byte).all():
                return None
        return first.tobytes()


def parse_pairs(block: Block, num_labels: int | None) -> Pairs:
    """The labels of lines `id:value id:value ...`; a bare `id` counts as `id:1`.

    Equals, for each line, sorted({int(i) for i, v in tokens if float(v) != 0}).

    Raises:
        SourceError: at the first malformed pair, negative id, or id not below `num_labels`
            (None: not known, any id up to a bound).
    """
    tokens = _Tokens.of(block)
    colons = np.flatnonzero(tokens.data == ord(":"))
    owners = np.searchsorted(tokens.starts, colons, side="right") - 1
    num_colons = np.bincount(owners, minlength=len(tokens.starts))
    id_stops = tokens.stops.copy()
    id_stops[owners] = colons
    ids, good = tokens.integers(id_stops)
    positive, valued = _values(tokens, id_stops, num_colons > 0)
    good &= (num_colons <= 1) & valued
    limit = MAX_INFERRED_LABELS if num_labels is None else num_labels
    bad = ~good | (ids >= limit)
    if bad.any():
        raise _pair_error(block, tokens, int(bad.argmax()), num_labels)
    return pairs(tokens.rows[positive], ids[positive], int(len(ids) - positive.sum()))


def _values(tokens: _Tokens, id_stops: Int64s, has_value: Bools) -> tuple[Bools, Bools]:
    """For each token, is its value positive, and is it a finite number of at least 0."""
    starts = np.minimum(id_stops + 1, tokens.stops)
    if has_value.all() and (same := tokens.same_text(starts)) is not None:
        value = _number(same)
        return np.full(len(starts), bool(value)), np.full(len(starts), value is not None)
    digits = tokens.count(_DIGIT, starts, tokens.stops)
    dots = tokens.count(_table(b"."), starts, tokens.stops)
    plain = (digits > 0) & (dots <= 1) & (digits + dots == tokens.stops - starts)
    positive = ~has_value | (tokens.count(_NONZERO, starts, tokens.stops) > 0)
    valued = ~has_value | plain
    for i in np.flatnonzero(has_value & ~plain).tolist():  # 1e-3 and the like: rare
        value = _number(tokens.data[starts[i] : tokens.stops[i]].tobytes())
        valued[i] = value is not None
        positive[i] = bool(value)
    return positive, valued


def _number(text: bytes) -> float | None:
    try:
        value = float(text.decode("ascii"))
    except ValueError:
        return None
    return value if 0 <= value < float("inf") and b"_" not in text else None


def _pair_error(block: Block, tokens: _Tokens, i: int, num_labels: int | None) -> SourceError:
    where, token = block.where(int(tokens.rows[i])), tokens.text(i)
    label, _, value = token.partition(":")
    digits = label.removeprefix("-")
    if not (digits.isascii() and digits.isdigit()) or (
        ":" in token and _number(value.encode()) is None
    ):
        return SourceError(
            f"{where}: malformed pair {token[:80]!r}; write id:value with an integer id and a "
            f"value of at least 0"
        )
    return SourceError(_range_message(where, label[:80], num_labels))


def _range_message(where: str, label: str | int, num_labels: int | None) -> str:
    if str(label).startswith("-"):
        return f"{where}: label id {label} is negative; ids count from 0"
    if num_labels is None:
        return (
            f"{where}: label id {label} is implausibly large; add a first line 'rows columns' to "
            f"the label file, or the label texts, so that the number of labels is known"
        )
    return (
        f"{where}: label id {label} is out of range, there are {num_labels} labels (ids count "
        f"from 0); correct the id or the number of labels"
    )


def header_of(lines: Lines, num_texts: int) -> tuple[int, int] | None:
    """(rows, columns) if the first line of a label file says so, else None.

    A file of bare ids can begin with a row of two labels: it is no header if the lines, the
    first included, are as many as the texts and its first number says otherwise.
    """
    if lines.rows == 0:
        return None
    fields = _bare_integers(lines, 0)
    if len(fields) != 2:
        return None
    rows, columns = fields
    if columns > MAX_LABELS:
        raise SourceError(
            f"{lines.path}:1: the header says {columns} labels, above the limit of {MAX_LABELS}; "
            f"correct it"
        )
    with_pairs = lines.rows > 1 and b":" in read(lines, 1, min(lines.rows, 100)).data
    if not with_pairs and lines.rows == num_texts and rows != num_texts:
        return None
    return rows, columns


def _bare_integers(lines: Lines, row: int) -> list[int]:
    fields = read(lines, row, row + 1).data.split()
    return [int(f) for f in fields] if all(map(_is_count, fields)) else []


def _is_count(field: bytes) -> bool:
    return field.isdigit() and len(field) <= MAX_HEADER_DIGITS


def parse_filters(block: Block, num_rows: int, num_labels: int) -> tuple[Int64s, Int64s]:
    """(rows, labels), int64 [m]: the lines `row label` as they stand; blank lines are skipped.

    Raises:
        SourceError: a line that is not two integers, a row or a label out of range.
    """
    tokens = _Tokens.of(block)
    values, good = tokens.integers(tokens.stops)
    bad_line = np.zeros(len(block), dtype=bool)
    bad_line[tokens.rows[~good]] = True
    bad_line |= ~np.isin(np.bincount(tokens.rows, minlength=len(block)), (0, 2))
    if bad_line.any():
        raise _filter_error(block, int(bad_line.argmax()))
    rows, labels = values[0::2], values[1::2]
    bad = (rows >= num_rows) | (labels >= num_labels)
    if bad.any():
        i = int(bad.argmax())
        where = block.where(int(tokens.rows[2 * i]))
        if labels[i] >= num_labels:
            raise SourceError(_range_message(where, tokens.text(2 * i + 1), num_labels))
        raise SourceError(
            f"{where}: row {tokens.text(2 * i)} is out of range, the split has {num_rows} points "
            f"(rows count from 0); correct the row or remove the line"
        )
    return rows, labels


def _filter_error(block: Block, i: int) -> SourceError:
    line = block.data[block.starts[i] : block.starts[i + 1]].decode("utf-8", "replace").strip()
    return SourceError(
        f"{block.where(i)}: malformed filter line {line[:80]!r}; write two integers, row and "
        f"label, each at least 0"
    )


# --------------------------------------------------------------------------------------- JSON


def parse_objects(
    block: Block, num_labels: int | None, with_labels: bool = True
) -> tuple[Texts, Pairs]:
    """Texts (title, a space, content) and labels (target_ind) of JSON lines.

    A target whose target_rel is 0 is dropped and counted. Without `with_labels`, as in
    lbl.json, targets are not looked for and the pairs are empty.

    Raises:
        SourceError: a line that is no JSON object, a title or content that is no string, or
            targets that are not a list of ids in range.
    """
    texts: list[str] = []
    rows: list[int] = []
    labels: list[int] = []
    bad_lines = bad_bytes = zeros = 0
    for i, line in enumerate(block):
        decoded_line, bad = decoded(line)
        record = _object(decoded_line, block.where(i))
        text, broken = _text_of(record, block.where(i))
        texts.append(text)
        bad_lines += bad > 0 or broken > 0
        bad_bytes += bad + broken
        if with_labels:
            targets = _targets(record, num_labels, block.where(i))
            zeros += len(record["target_ind"]) - len(targets)
            labels += targets
            rows += [i] * len(targets)
    found = pairs(np.array(rows, dtype=np.int64), np.array(labels, dtype=np.int64), zeros)
    return Texts(texts, bad_lines, bad_bytes), found


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SourceError(
            f"{where}: bad JSON ({reason(error)}) in {line[:60]!r}; write one JSON object a line"
        ) from None
    if not isinstance(record, dict):
        raise SourceError(f"{where}: {line[:60]!r} is no JSON object; write one a line")
    return record


def _text_of(record: dict[str, Any], where: str) -> tuple[str, int]:
    """The text, and how many characters were replaced in it."""
    parts = []
    for name in ("title", "content"):
        value = record.get(name)
        if value is not None and not isinstance(value, str):
            raise SourceError(f"{where}: {name} is {value!r:.60}; write a string")
        parts.append(value or "")
    text = " ".join(part for part in parts if part)
    return whole_characters(text)


def whole_characters(text: str) -> tuple[str, int]:
    """The text, and how many lone surrogates (from \\ud800 escapes) were replaced in it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        broken = sum("\ud800" <= character <= "\udfff" for character in text)
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), broken
    return text, 0


def _targets(record: dict[str, Any], num_labels: int | None, where: str) -> list[int]:
    targets = record.get("target_ind")
    if not isinstance(targets, list) or not all(type(t) is int for t in targets):
        raise SourceError(f"{where}: target_ind is {targets!r:.60}; write a list of integer ids")
    limit = MAX_INFERRED_LABELS if num_labels is None else num_labels
    for target in targets:
        if not 0 <= target < limit:
            raise SourceError(_range_message(where, target, num_labels))
    relevance = record.get("target_rel")
    if relevance is None:
        return targets
    if (
        not isinstance(relevance, list)
        or len(relevance) != len(targets)
        or not all(type(r) in (int, float) and 0 <= r < float("inf") for r in relevance)
    ):
        raise SourceError(
            f"{where}: target_rel is {relevance!r:.60}; write a number of at least 0 for each of "
            f"the {len(targets)} targets, or leave it out"
        )
    return [t for t, r in zip(targets, relevance, strict=True) if r != 0]
