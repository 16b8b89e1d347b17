"""Lines of the Extreme Classification Repository: errors name file:line.

    labels   `id:value id:value ...` a line; a first line `rows columns` may precede
    filters  `row label` a line
    JSON     an object a line: title, content, target_ind, target_rel

Label ids are int64 from the first byte. `limit` is the number of labels, or the most there may be.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from renee_ray.data.sources.lines import lone_returns
from renee_ray.data.sources.records import (
    MAX_INFERRED_LABELS,
    Int64s,
    SourceError,
    decoded,
    lists_of,
    whole_characters,
)
from renee_ray.errors import reason

Bools = NDArray[np.bool_]
Where = Callable[[int], str]
"""Names file and line of a line, counted from 0."""

MAX_ID_DIGITS = 18


def _tokens(lines: list[bytes], where: Where) -> tuple[Int64s, pa.Array]:
    """Splits lines at white space: the place of each token's line, and the tokens, large_string."""
    for i, line in enumerate(lines):
        if lone_returns(line):
            raise SourceError(
                f"{where(i)}: a carriage return within the line; end every line with a line feed"
            )
    array = pa.array(lines, pa.large_binary())
    lists = pc.ascii_split_whitespace(pc.cast(array, pa.large_string(), safe=False))  # UTF-8 or not
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


def parse_pairs(lines: list[bytes], where: Where, limit: int) -> tuple[pa.Array, int]:
    """Parses lines `id:value id:value ...`; a bare `id` counts as `id:1`.

    Returns:
        (for each line, [int(i) for i, v in tokens if float(v) != 0], as large_list<int64>,
        number of pairs whose value is 0)

    Raises:
        SourceError: at the first malformed pair, or id that is not in [0, limit).
    """
    rows, tokens = _tokens(lines, where)
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
    bad = ~good | (ids >= limit)
    if bad.any():
        i = int(bad.argmax())
        raise _pair_error(where(int(rows[i])), _text(tokens, i), limit)
    lists = lists_of(len(lines), rows[positive], pa.array(ids[positive]))
    return lists, int(len(ids) - positive.sum())


def _number(text: bytes) -> float | None:
    try:
        value = float(text.decode("ascii"))
    except ValueError:
        return None
    return value if 0 <= value < float("inf") and b"_" not in text else None


def _pair_error(where: str, token: str, limit: int) -> SourceError:
    label, _, value = token.partition(":")
    digits = label.removeprefix("-")
    if not (digits.isascii() and digits.isdigit()) or (
        ":" in token and _number(value.encode()) is None
    ):
        return SourceError(
            f"{where}: malformed pair {token[:80]!r}; write id:value with an integer id and a "
            f"value of at least 0"
        )
    return _out_of_range(where, label[:80], limit)


def _out_of_range(where: str, label: str | int, limit: int) -> SourceError:
    if limit == MAX_INFERRED_LABELS and not str(label).startswith("-"):
        return SourceError(
            f"{where}: label id {label} is implausibly large; correct it, or add a first line "
            f"'rows columns' to the label file, or the label texts, so that the number of labels "
            f"is known"
        )
    return SourceError(
        f"{where}: label id {label} is out of range, ids are from 0 to {limit - 1}; correct the id "
        f"or the number of labels"
    )


def parse_filters(lines: list[bytes], where: Where, limit: int) -> tuple[Int64s, Int64s, Int64s]:
    """Parses lines `row label`; blank ones are skipped.

    Returns:
        (place of the line, row, label) of each pair, int64

    Raises:
        SourceError: a line that is not two integers, or a label that is not in [0, limit).
    """
    places, tokens = _tokens(lines, where)
    values, good = _integers(tokens)
    bad_line = np.zeros(len(lines), dtype=bool)
    bad_line[places[~good]] = True
    bad_line |= ~np.isin(np.bincount(places, minlength=len(lines)), (0, 2))
    if bad_line.any():
        i = int(bad_line.argmax())
        line = lines[i].decode("utf-8", "replace").strip()
        raise SourceError(
            f"{where(i)}: malformed filter line {line[:80]!r}; write two integers, row and label, "
            f"each at least 0"
        )
    rows, labels = values[0::2], values[1::2]
    if (labels >= limit).any():
        i = int((labels >= limit).argmax())
        raise _out_of_range(where(int(places[2 * i])), _text(tokens, 2 * i + 1)[:80], limit)
    return places[0::2], rows, labels


# --------------------------------------------------------------------------------------- JSON


def parse_objects(
    lines: list[bytes], where: Where, limit: int | None
) -> tuple[pa.Table, dict[str, int]]:
    """Parses JSON lines with texts (title, a space, content) and labels (target_ind).

    A target whose target_rel is 0 is left out and counted. Where `limit` is None, as in lbl.json,
    targets are not looked for.

    Returns:
        (columns text, labels; counts of what was odd)

    Raises:
        SourceError: a line that is no JSON object, a title or content that is no string, or
            targets that are not a list of ids in [0, limit).
    """
    texts, labels, replaced, zeros = list[str](), list[list[int]](), list[int](), 0
    for i, line in enumerate(lines):
        text, bad = decoded(line)
        record = json_object(text, where(i))
        text, broken = _text_of(record, where(i))
        texts.append(text)
        replaced.append(bad + broken)
        if limit is not None:
            labels.append(_targets(record, limit, where(i)))
            zeros += len(record["target_ind"]) - len(labels[-1])
    columns = {"text": pa.array(texts, pa.large_string())}
    odd = {"replaced_lines": len(lines) - replaced.count(0), "replaced_bytes": sum(replaced)}
    if limit is not None:
        columns["labels"] = pa.array(labels, pa.large_list(pa.int64()))
        odd["zero_values"] = zeros
    return pa.table(columns), odd


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


def _targets(record: dict[str, Any], limit: int, where: str) -> list[int]:
    targets = record.get("target_ind")
    if not isinstance(targets, list) or not all(type(t) is int for t in targets):
        raise SourceError(f"{where}: target_ind is {targets!r:.60}; write a list of integer ids")
    for target in targets:
        if not 0 <= target < limit:
            raise _out_of_range(where, target, limit)
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
