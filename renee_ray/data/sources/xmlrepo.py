"""Files of the Extreme Classification Repository: lines to records, errors named file:line.

    texts    a text a line
    labels   `id:value id:value ...` a line; a first line `rows columns` may precede
    filters  `row label` a line
    JSON     an object a line: title, content, target_ind, target_rel

What is parsed is a batch of lines (lines.py). Label ids are int64 from the first byte.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from renee_ray.data.sources.lines import LineBatch, Lines, lone_returns, read
from renee_ray.data.sources.records import (
    MAX_INFERRED_LABELS,
    Int64s,
    Records,
    SourceError,
    decode_texts,
    decoded,
    lists_of,
    whole_characters,
)
from renee_ray.errors import reason

Bools = NDArray[np.bool_]

MAX_ID_DIGITS = 18
MAX_HEADER_DIGITS = 100
MAX_LABELS = 2**31
"""A header that says more is taken for damage; the largest sets known have 10**8."""


# ------------------------------------------------------------------------------------- points


def parse_texts(texts: LineBatch) -> Records:
    """Parses lines that are a text each."""
    column, replaced = decode_texts(texts.contents())
    return Records(texts.first, {"text": column}, texts.where, replaced)


def parse_points(texts: LineBatch, labels: LineBatch, num_labels: int | None) -> Records:
    """Parses texts, and the lines of their labels as `parse_pairs` does."""
    points = parse_texts(texts)
    lists, zeros = parse_pairs(labels, num_labels)
    return replace(points, columns=points.columns | {"labels": lists}, zeros=zeros)


def _tokens(batch: LineBatch) -> tuple[Int64s, pa.Array]:
    """Splits lines at white space: the place of each token's line, and the tokens, large_string."""
    if len(inner := lone_returns(batch.data)):
        row = int(np.searchsorted(batch.starts, inner[0], side="right")) - 1
        raise SourceError(
            f"{batch.where(row)}: a carriage return within the line; end every line with a line "
            f"feed"
        )
    lines = pc.cast(batch.contents(), pa.large_string(), safe=False)  # UTF-8 or not
    lists = pc.ascii_split_whitespace(lines)
    tokens, rows = lists.flatten(), pc.list_parent_indices(lists).to_numpy()
    there = pc.greater(pc.binary_length(tokens), 0)
    return rows[there.to_numpy(zero_copy_only=False)], tokens.filter(there)


def _integers(texts: pa.Array) -> tuple[Int64s, Bools]:
    """Returns each text as an integer, or the greatest int64, and whether it is one."""
    good, longer = pc.ascii_is_decimal(texts), pc.greater(pc.binary_length(texts), MAX_ID_DIGITS)
    short = pc.if_else(pc.and_not(good, longer), texts, pa.scalar("0", texts.type))
    values = pc.if_else(longer, np.iinfo(np.int64).max, pc.cast(short, pa.int64()))
    return values.to_numpy(), good.to_numpy(zero_copy_only=False)


def _text(tokens: pa.Array, i: int) -> str:
    return pc.cast(tokens[i], pa.large_binary()).as_py().decode("utf-8", "replace")


def parse_pairs(batch: LineBatch, num_labels: int | None) -> tuple[pa.Array, int]:
    """Parses lines `id:value id:value ...`; a bare `id` counts as `id:1`.

    Returns:
        (for each line, [int(i) for i, v in tokens if float(v) != 0], as large_list<int64>,
        number of pairs whose value is 0)

    Raises:
        SourceError: at the first malformed pair, negative id, or id not below `num_labels`
            (None: not known, any id up to a bound).
    """
    rows, tokens = _tokens(batch)
    one, colon = (pa.scalar(each, pa.large_string()) for each in ("1", ":"))
    bare = pc.binary_join_element_wise(tokens, one, colon)
    valued = pc.if_else(pc.match_substring(tokens, ":"), tokens, bare)
    parts = pc.split_pattern(valued, ":", max_splits=1)
    ids, good = _integers(pc.list_element(parts, 0))
    texts = pc.cast(pc.list_element(parts, 1), pa.large_binary()).dictionary_encode()
    numbers = [_number(text) for text in texts.dictionary.to_pylist()]
    places = texts.indices.to_numpy()
    positive = np.array([bool(number) for number in numbers], bool)[places]
    good &= np.array([number is not None for number in numbers], bool)[places]
    limit = MAX_INFERRED_LABELS if num_labels is None else num_labels
    bad = ~good | (ids >= limit)
    if bad.any():
        i = int(bad.argmax())
        raise _pair_error(batch.where(int(rows[i])), _text(tokens, i), num_labels)
    lists = lists_of(len(batch), rows[positive], pa.array(ids[positive]))
    return lists, int(len(ids) - positive.sum())


def _number(text: bytes) -> float | None:
    try:
        value = float(text.decode("ascii"))
    except ValueError:
        return None
    return value if 0 <= value < float("inf") and b"_" not in text else None


def _pair_error(where: str, token: str, num_labels: int | None) -> SourceError:
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
    """Returns (rows, columns) if the first line of a label file is a header, else None.

    A file of bare ids can begin with a row of two labels: it is no header if the lines, the
    first included, are as many as the texts and its first number says otherwise.
    """
    if lines.rows == 0:
        return None
    fields = read(lines, 0, 1).data.split()
    if len(fields) != 2 or not all(f.isdigit() and len(f) <= MAX_HEADER_DIGITS for f in fields):
        return None
    rows, columns = map(int, fields)
    if columns > MAX_LABELS:
        raise SourceError(
            f"{lines.path}:1: the header says {columns} labels, above the limit of {MAX_LABELS}; "
            f"correct it"
        )
    with_pairs = lines.rows > 1 and b":" in read(lines, 1, min(lines.rows, 100)).data
    if not with_pairs and lines.rows == num_texts and rows != num_texts:
        return None
    return rows, columns


def parse_filters(batch: LineBatch, num_rows: int, num_labels: int) -> Records:
    """Parses the pairs of lines `row label`; blank lines are skipped.

    Raises:
        SourceError: a line that is not two integers, a row or a label out of range.
    """
    places, tokens = _tokens(batch)
    values, good = _integers(tokens)
    bad_line = np.zeros(len(batch), dtype=bool)
    bad_line[places[~good]] = True
    bad_line |= ~np.isin(np.bincount(places, minlength=len(batch)), (0, 2))
    if bad_line.any():
        raise _filter_error(batch, int(bad_line.argmax()))
    rows, labels = values[0::2], values[1::2]
    bad = (rows >= num_rows) | (labels >= num_labels)
    if bad.any():
        i = int(bad.argmax())
        where = batch.where(int(places[2 * i]))
        if labels[i] >= num_labels:
            raise SourceError(_range_message(where, _text(tokens, 2 * i + 1), num_labels))
        raise SourceError(
            f"{where}: row {_text(tokens, 2 * i)} is out of range, the split has {num_rows} points "
            f"(rows count from 0); correct the row or remove the line"
        )
    pairs = {"row": pa.array(rows), "label": pa.array(labels)}
    return Records(batch.first, pairs, batch.where)


def _filter_error(batch: LineBatch, i: int) -> SourceError:
    line = batch.data[batch.starts[i] : batch.starts[i + 1]].decode("utf-8", "replace").strip()
    return SourceError(
        f"{batch.where(i)}: malformed filter line {line[:80]!r}; write two integers, row and "
        f"label, each at least 0"
    )


# --------------------------------------------------------------------------------------- JSON


def parse_objects(batch: LineBatch, num_labels: int | None, *, with_labels: bool = True) -> Records:
    """Parses JSON lines with texts (title, a space, content) and labels (target_ind).

    A target whose target_rel is 0 is left out and counted. Without `with_labels`, as in
    lbl.json, targets are not looked for.

    Raises:
        SourceError: a line that is no JSON object, a title or content that is no string, or
            targets that are not a list of ids in range.
    """
    texts, labels, replaced, zeros = list[str](), list[list[int]](), list[int](), 0
    for i, line in enumerate(batch):
        decoded_line, bad = decoded(line)
        record = json_object(decoded_line, batch.where(i))
        text, broken = _text_of(record, batch.where(i))
        texts.append(text)
        replaced.append(bad + broken)
        if with_labels:
            labels.append(_targets(record, num_labels, batch.where(i)))
            zeros += len(record["target_ind"]) - len(labels[-1])
    columns = {"text": pa.array(texts, pa.large_string())}
    if with_labels:
        columns["labels"] = pa.array(labels, pa.large_list(pa.int64()))
    counts = np.array(replaced, np.int64)
    return Records(batch.first, columns, batch.where, counts, zeros if with_labels else None)


def json_object(line: str, where: str) -> dict[str, Any]:
    """Parses a line that is a JSON object; `where` is what an error names."""
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
    """Returns the text, and how many characters were replaced in it."""
    parts = []
    for name in ("title", "content"):
        value = record.get(name)
        if value is not None and not isinstance(value, str):
            raise SourceError(f"{where}: {name} is {value!r:.60}; write a string")
        parts.append(value or "")
    text = " ".join(part for part in parts if part)
    return whole_characters(text)


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
