"""Own data: which column is the text and which the labels, and columns as a source has them.

Names and first rows decide. Where two readings are equally likely, the error asks for the key.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from renee_ray.data.sources.columns import kind_of, plain
from renee_ray.data.sources.records import SourceError, lists_of
from renee_ray.data.untrusted import parse_json
from renee_ray.errors import reason

TEXTS = (
    "text", "title", "content", "body", "document", "sentence", "abstract", "description",
    "query", "question", "review",
)  # fmt: skip
LABELS = (
    "labels", "label", "tags", "tag", "categories", "category", "classes", "class", "topics",
    "topic", "keywords", "targets",
)  # fmt: skip
"""Names of columns that are taken without a key; the first of each is preferred."""
SEPARATORS = ("|", ";", ",", "\t")
NO_SEPARATOR = "none"
TABS = ("\\t", "tab")
"""What a shell hands on where a tab was meant."""
MIXED = pa.list_(pa.list_(pa.null()))
"""Type of a column of JSON with values of several types: of no kind."""


@dataclass(frozen=True)
class Fields:
    """What is taken for what. A dotted name is a field of a nested one.

    text: columns whose texts are joined by a space.
    separator: between the labels of a row, which is a string; empty: a row has a list or one label.
    is_single: a row has one label because no separator was found in the first rows.
    are_ids: labels that are strings are ids.
    pairs: rows are pairs of a text and a label; those of the same text are one point.
    """

    text: tuple[str, ...]
    labels: str
    separator: str
    is_single: bool
    are_ids: bool
    pairs: bool


def leaves(schema: pa.Schema) -> dict[str, str]:
    """Returns the kind (columns.py) of each column; fields of nested ones have dotted names."""

    def below(prefix: str, field: pa.Field) -> Iterator[tuple[str, str]]:
        name = f"{prefix}{field.name}"
        if pa.types.is_struct(field.type):
            for each in field.type:
                yield from below(f"{name}.", each)
        else:
            yield name, kind_of(field.type)

    return dict(pair for field in schema for pair in below("", field))


def guess(path: str, rows: pa.Table, text: str, labels: str, separator: str) -> Fields:
    """Decides what is what in a table that begins with `rows`.

    Args:
        text, labels, separator: the keys of the configuration, for what is not to be guessed.

    Raises:
        SourceError: no column or two may be it, or there is no such column.
    """
    kinds = leaves(rows.schema)
    named = labels if labels not in ("auto", "ids", "multi-hot") else ""
    for name in [*text.split("+"), named]:
        if name and name not in kinds:
            raise SourceError(f"{path} has no column {name!r}; it has {list(kinds)!s:.300}")
    texts = tuple(text.split("+")) if text else ()
    taken = named or _only(
        _like(LABELS, {name: kinds[name] for name in kinds if name not in texts})
    )
    strings = {name: kind for name, kind in kinds.items() if kind == "string" and name != taken}
    mixed = {name: kind for name, kind in kinds.items() if not kind and name != taken}
    texts = texts or tuple(filter(None, [_only(_like(TEXTS, strings | mixed) or list(strings))]))
    taken = taken or _only([name for name in kinds if name not in texts]) * bool(texts)
    if not texts or not taken:
        raise SourceError(_asked(path, rows, kinds, texts, taken))
    kind, values = kinds[taken], column(path, rows, taken)
    is_guessed, separator = not separator, "\t" if separator in TABS else separator
    if separator not in ("", NO_SEPARATOR) and kind not in ("string", "nothing"):
        raise SourceError(f"{path}: {taken} is not strings; leave separator= out")
    if kind == "string" and is_guessed:
        separator = _separator(path, taken, _strings(path, taken, values))
    separator = "" if separator == NO_SEPARATOR else separator
    exclusive = b'"ClassLabel"' in (rows.schema.metadata or {}).get(b"huggingface", b"")
    pairs = not separator and kind in ("string", "integer") and not exclusive
    is_single = is_guessed and not separator
    return Fields(texts, taken, separator, is_single, labels == "ids", pairs)


def _like(names: Sequence[str], kinds: dict[str, str]) -> list[str]:
    found = [name for name in kinds if name.lower().rpartition(".")[2] in names]
    return [name for name in found if name == names[0]] or found


def _only(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ""


def _asked(
    path: str, rows: pa.Table, kinds: dict[str, str], texts: Sequence[str], taken: str
) -> str:
    """Asks for the columns that are not known.

    Proposes a usual name, then what has most words, or is a list or has most separators.
    """

    def count(name: str, marks: str) -> int:
        if kinds[name] != "string":
            return 0
        values = pc.cast(plain(column(path, rows, name)), pa.large_binary())
        return sum(pc.sum(pc.count_substring(values, mark)).as_py() or 0 for mark in marks)

    def text_first(name: str) -> tuple[bool, int]:
        return name not in _like(TEXTS, kinds), -count(name, " ")

    def labels_first(name: str) -> tuple[bool, bool, int]:
        usual = name in _like(LABELS, kinds)
        return not usual, not kinds[name].startswith("list"), -count(name, "|;,")

    free = [name for name in kinds if name not in (*texts, taken)]
    strings = sorted((name for name in free if kinds[name] == "string"), key=text_first)
    chosen = list(texts) or strings[:1]
    others = sorted((name for name in free if name not in chosen), key=labels_first)
    labels = [taken] if taken else others[:1]
    if not chosen or not labels:
        missing = "labels" if chosen else "the text"
        raise SourceError(f"{path}: of {list(kinds)!s:.300}, no column can hold {missing}")
    unknown = " and ".join(["the text"] * (not texts) + ["the labels"] * (not taken))
    given = f"text={shlex.quote('+'.join(chosen))} labels={shlex.quote(labels[0])}"
    return (
        f"{path}: which column of {list(kinds)!s:.300} holds {unknown}? Give, for example, {given} "
        f"(text=A+B joins two columns)"
    )


_BRACKETS = re.compile(r"\[\s*(['\"]|.*,).*\]|\{\s*['\"].*\}")


def _separator(path: str, name: str, values: pa.Array) -> str:
    """Finds the separator of labels in their first rows; empty if each row has one label."""
    texts = [value for value in values.to_pylist() if value]
    if lists := [value for value in texts if _BRACKETS.fullmatch(value)]:
        raise SourceError(
            f"{path}: {name} holds lists in brackets, as {lists[0]!r:.60}; write labels with a "
            f"separator, or the file as JSON lines"
        )
    found = [each for each in SEPARATORS if any(each in value for value in texts)]
    if len(found) > 1:
        raise SourceError(
            f"{path}: labels in {name} may be separated by {' or '.join(map(repr, found))}; give "
            f"separator={found[0]!r}, or separator={NO_SEPARATOR} where a row has one label"
        )
    numbers = all(each.isdigit() for value in texts for each in value.split())
    return found[0] if found else " " if numbers and any(" " in t.strip() for t in texts) else ""


def column(path: str, rows: pa.Table, name: str) -> pa.Array:
    """Returns a column, or a field of a nested one; nulls where no row has the field."""
    whole = name in rows.column_names
    first, *rest = [name] if whole else name.split(".")
    if first not in rows.column_names:
        raise SourceError(f"{path} has no column {name!r}; it has {rows.column_names!s:.300}")
    array = rows[first].combine_chunks()
    for part in rest:
        known = pa.types.is_struct(array.type) and array.type.get_field_index(part) >= 0
        array = pc.struct_field(array, part) if known else pa.nulls(len(array))
    return array


def _strings(path: str, name: str, values: pa.Array) -> pa.Array:
    try:
        return pc.cast(plain(values), pa.large_string())
    except pa.ArrowInvalid as error:
        raise SourceError(f"{path}: {name} is not UTF-8 ({reason(error):.100})") from None


def shaped(path: str, rows: pa.Table, fields: Fields) -> pa.Table:
    """Makes the columns `text` and `labels` of a source of rows.

    Raises:
        SourceError: a column is missing or of another kind, or a label is no id.
    """
    text = None
    for name in fields.text:
        values = column(path, rows, name)
        if kind_of(values.type) not in ("string", "nothing"):
            raise _not_read(path, name, values.type, "strings")
        values = pc.fill_null(pc.cast(plain(values), pa.large_binary()), b"")
        text = values if text is None else _joined(text, values)
    labels = column(path, rows, fields.labels)
    if kind_of(labels.type) == "string":
        labels = _split(path, _strings(path, fields.labels, labels), fields)
    elif kind_of(labels.type) in ("integer", "nothing"):
        given = np.flatnonzero(labels.is_valid().to_numpy(zero_copy_only=False))
        labels = lists_of(len(labels), given, labels.drop_null())
    elif not kind_of(labels.type).startswith("list"):
        raise _not_read(path, fields.labels, labels.type, "strings, integers or lists of them")
    return pa.table({"text": text, "labels": labels}, metadata=_class_names(rows, fields.labels))


def _not_read(path: str, name: str, given: pa.DataType, wanted: str) -> SourceError:
    kind = "not of one kind" if given == MIXED else f"of type {given!s:.80}"
    return SourceError(f"{path}: {name} is {kind}; it must be {wanted}")


def _joined(first: pa.Array, second: pa.Array) -> pa.Array:
    """Joins texts by a space where neither is empty."""
    both = pc.and_(pc.greater(pc.binary_length(first), 0), pc.greater(pc.binary_length(second), 0))
    space, nothing = (pa.scalar(each, pa.large_binary()) for each in (b" ", b""))
    between = pc.if_else(both, space, nothing)
    return pc.binary_join_element_wise(first, between, second, nothing)


def _split(path: str, values: pa.Array, fields: Fields) -> pa.Array:
    """Splits strings into lists of labels; spaces around a label, and empty ones, are dropped."""
    values = pc.fill_null(values, "")
    several = r"[|;,\t]|^\s*\d+(\s+\d+)+\s*$"
    odd = pc.match_substring_regex(values, several) if fields.is_single else None
    if odd is not None and pc.any(odd).as_py():
        raise SourceError(
            f"{path}: {fields.labels} has {values.filter(odd)[0].as_py()!r:.60}, and the first "
            f"rows have no separator; give separator=, or separator={NO_SEPARATOR} where a row has "
            f"one label"
        )
    lists = pc.split_pattern(values, fields.separator) if fields.separator else None
    rows = np.arange(len(values)) if lists is None else pc.list_parent_indices(lists).to_numpy()
    flat = pc.utf8_trim_whitespace(values if lists is None else lists.flatten())
    there = pc.greater(pc.binary_length(flat), 0)
    flat, rows = flat.filter(there), rows[there.to_numpy(zero_copy_only=False)]
    if fields.are_ids:
        try:
            flat = pc.cast(flat, pa.int64())
        except pa.ArrowInvalid as error:
            raise SourceError(
                f"{path}: {fields.labels} has a label that is no id ({reason(error):.100}); leave "
                f"labels=ids out if they are names"
            ) from None
    return lists_of(len(values), rows, flat)


def _class_names(rows: pa.Table, labels: str) -> dict[bytes, bytes] | None:
    """Returns Hugging Face's metadata with the feature of the column of labels alone."""
    try:
        found = parse_json((rows.schema.metadata or {})[b"huggingface"])["info"]["features"][labels]
    except (ValueError, LookupError, TypeError):
        return None
    one = isinstance(found, dict) and "names" in found
    features = {"labels": [found] if one else found}
    return {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
