"""Columns of a Parquet source: whatever types they were written with, read as these of records.

A `text` is large_binary here, null where there is none; `records.decode_texts` decodes it. A null
list of labels is an empty one.

A type's kind is what its values are: "string", "integer", "number" (bool or floating), "nothing"
(null), "list of ..." one of these, or "" for any other. Dictionaries, views, widths, fixed sizes
and extensions make no difference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from renee_ray.data.sources.records import Int64s, SourceError, decoded, whole_characters
from renee_ray.data.untrusted import parse_json
from renee_ray.errors import reason

LABELS = ("labels", "filter_labels")
MASK = "attention_mask"
"""A list of 0 and 1 for each token, 0 for padding, as tokenizers write it."""
_IDS = ("list of integer", "list of string", "list of nothing")
_COLUMNS = {
    "text": ("texts", ("string",), "it must be strings"),
    "label": ("labels, which are strings,", ("string",), "it must be strings"),
    "point_id": (
        "ids",
        ("integer",),
        "it must be integers (int64); leave it out and the number of the row is the id",
    ),
    "input_ids": ("tokens", ("list of integer",), "it must be a list of integers"),
    MASK: ("masks", ("list of integer", "list of number"), "it must be a list of 0 and 1"),
    "labels": ("labels", _IDS, "it must be a list of integers or of strings"),
    "filter_labels": ("labels", _IDS, "it must be a list of integers or of strings"),
}
"""Of each column: what is in it, its kinds besides "nothing", and the remedy for another."""
GREATEST = 2**63 - 1
"""The greatest int64."""
_LISTS = (
    pa.types.is_list,
    pa.types.is_large_list,
    pa.types.is_fixed_size_list,
    pa.types.is_list_view,
    pa.types.is_large_list_view,
)
_STRINGS = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_binary_view,
)


class BadRow(Exception):
    """A row that cannot be read; `row` is its place in the column."""

    def __init__(self, row: int, problem: str) -> None:
        super().__init__(problem)
        self.row = row


def kind_of(given: pa.DataType) -> str:
    """Returns what the values of a type are, as the module says."""
    if isinstance(given, pa.BaseExtensionType):
        return kind_of(given.storage_type)
    if pa.types.is_dictionary(given):
        return kind_of(given.value_type)
    if any(is_list(given) for is_list in _LISTS):
        item = kind_of(given.value_type)
        return f"list of {item}" if item and not item.startswith("list") else ""
    if any(is_string(given) for is_string in _STRINGS):
        return "string"
    if pa.types.is_integer(given):
        return "integer"
    if pa.types.is_boolean(given) or pa.types.is_floating(given):
        return "number"
    return "nothing" if pa.types.is_null(given) else ""


def column_title(name: str) -> str:
    """Returns what is in a column, for error messages."""
    return _COLUMNS[name][0]


def checked_kind(path: str, field: pa.Field, multi_hot: bool) -> str:
    """Returns the kind of a column.

    Args:
        multi_hot: lists of labels have a 0 or 1 for every label.

    Raises:
        SourceError: the column may not have this kind.
    """
    kind, (_, kinds, remedy) = kind_of(field.type), _COLUMNS[field.name]
    if field.name in LABELS and multi_hot:
        kinds = ("list of integer", "list of number", "list of nothing")
        remedy = "with labels=multi-hot it must be a list of 0 and 1"
    elif field.name in LABELS and kind == "list of number":
        remedy += "; a 0 or 1 for every label is read with labels=multi-hot"
    if kind not in (*kinds, "nothing"):
        given = f"{field.type!s:.80}"
        raise SourceError(f"{path} has a column {field.name!r} of type {given}; {remedy}")
    return kind


def class_names(path: str, schema: pa.Schema) -> tuple[str, ...] | None:
    """Returns the names of the labels in the metadata that Hugging Face's `datasets` writes.

    Raises:
        SourceError: the metadata is not JSON.
    """
    try:
        feature: Any = parse_json((schema.metadata or {}).get(b"huggingface", b"null"))
    except ValueError as error:
        raise SourceError(
            f"{path} has metadata 'huggingface' that is no JSON ({reason(error):.100}); write the "
            f"file again without"
        ) from None
    for key in ("info", "features", "labels"):
        feature = feature.get(key) if isinstance(feature, dict) else None
    if isinstance(feature, dict):
        feature = feature.get("feature")  # of a Sequence or a List
    if isinstance(feature, list) and len(feature) == 1:
        feature = feature[0]  # a list of features, as it was written once
    if not isinstance(feature, dict) or feature.get("_type") != "ClassLabel":
        return None
    names = feature.get("names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    return tuple(whole_characters(name)[0] for name in names)


def common_kind(first: str, second: str) -> str | None:
    """Returns the kind of a column with these kinds in two files; None if they do not agree."""
    for kind, other in ((first, second), (second, first)):
        less = kind.replace("integer", "number") == other
        if kind in (other, "nothing") or less:
            return other
        if kind == "list of nothing" and other.startswith("list of"):
            return other
    return None


def read_column(name: str, column: pa.ChunkedArray, width: int | None = None) -> pa.Array:
    """Reads a column as one of the types of `records`.

    Empty strings in a list of labels are left out, as between the separators of a CSV.

    Args:
        width: values in a list of labels, each 0 or 1, whose places are the ids; None: the
            values are ids or strings.

    Raises:
        BadRow: a row has a value that cannot be read.
    """
    array = pa.concat_arrays([plain(chunk) for chunk in column.chunks])
    if name == "text":
        return pc.cast(array, pa.large_binary())
    if name in ("label", "point_id"):
        _refuse(array.is_null(), lambda at: at, lambda at: f"has no {name}; fill it in")
        read = _integers if name == "point_id" else _strings
        return read(name, array, lambda at: at)
    if pa.types.is_null(array.type):
        array = pa.nulls(len(array), pa.large_list(pa.int64()))
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy().astype(np.int64)
    offsets, values = np.concatenate([[0], np.cumsum(lengths)]), array.flatten()

    def row_of(at: int) -> int:
        return int(np.searchsorted(offsets, at, side="right")) - 1

    _refuse(values.is_null(), row_of, lambda at: f"has a null in {name}; correct it")
    if name == "input_ids":
        empty = pa.array(lengths == 0)
        _refuse(empty, lambda at: at, lambda at: "has no input_ids; leave the row out")
    elif width is not None:
        return _places(name, lengths, values, width, row_of)
    string = pa.types.is_large_binary(values.type)
    if string and pc.any(empty := pc.equal(pc.binary_length(values), 0)).as_py():
        kept = np.flatnonzero(~empty.to_numpy(zero_copy_only=False))
        offsets, values = np.searchsorted(kept, offsets), values.take(pa.array(kept))
    read = _strings if string else _integers
    return pa.LargeListArray.from_arrays(pa.array(offsets), read(name, values, row_of))


def without_padding(tokens: pa.Array, mask: pa.ChunkedArray) -> pa.Array:
    """Keeps the tokens, large_list<int64>, whose place in the mask holds no 0.

    Raises:
        BadRow: a row's mask is of another length, or leaves no token.
    """
    masks = pa.concat_arrays([plain(chunk) for chunk in mask.chunks])
    if pa.types.is_null(masks.type):
        masks = pa.nulls(len(masks), pa.large_list(pa.int64()))
    lengths = pc.list_value_length(tokens)
    others = pc.fill_null(pc.list_value_length(masks), 0)
    _refuse(
        pc.not_equal(lengths, others),
        lambda at: at,
        lambda at: (
            f"has {lengths[at]} input_ids and {others[at]} values in {MASK}; make them equal"
        ),
    )
    flags = pc.cast(masks.flatten(), pa.float64(), safe=False)
    flags = pc.fill_null(flags, 0).to_numpy() != 0
    offsets = np.concatenate([[0], np.cumsum(flags)])[tokens.offsets.to_numpy()]
    _refuse(
        pa.array(np.diff(offsets) == 0),
        lambda at: at,
        lambda at: f"has no token that {MASK} leaves; leave the row out",
    )
    return pa.LargeListArray.from_arrays(pa.array(offsets), tokens.values.filter(pa.array(flags)))


def plain(array: pa.Array) -> pa.Array:
    """Removes extensions, dictionaries and views: lists become large_list, strings large_binary."""
    if isinstance(array, pa.ExtensionArray):
        return plain(array.storage)
    if pa.types.is_dictionary(array.type):
        return plain(array.dictionary_decode())
    if any(is_list(array.type) for is_list in _LISTS):
        lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy().astype(np.int64)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        return pa.LargeListArray.from_arrays(pa.array(offsets), plain(array.flatten()))
    if any(is_string(array.type) for is_string in _STRINGS):
        return pc.cast(array, pa.large_binary())
    return array


def _refuse(bad: pa.Array, row_of: Callable[[int], int], problem: Callable[[int], str]) -> None:
    """Raises BadRow for the first value that is `bad`, bool [m]."""
    if pc.any(bad).as_py():
        at = int(np.argmax(bad.to_numpy(zero_copy_only=False)))
        raise BadRow(row_of(at), problem(at))


def _integers(name: str, values: pa.Array, row_of: Callable[[int], int]) -> pa.Array:
    if pa.types.is_uint64(values.type):
        _refuse(
            pc.greater(values, pa.scalar(GREATEST, pa.uint64())),
            row_of,
            lambda at: f"has {values[at]} in {name}, which is beyond int64; use a smaller number",
        )
    return pc.cast(values, pa.int64())


def _strings(name: str, values: pa.Array, row_of: Callable[[int], int]) -> pa.Array:
    # Not replaced: two labels that differ only in such bytes would become one.
    try:
        return pc.cast(values, pa.string())
    except pa.ArrowInvalid:
        bad = pa.array([decoded(value)[1] > 0 for value in values.to_pylist()], pa.bool_())
        _refuse(
            bad,
            row_of,
            lambda at: f"has {values[at].as_py()!r:.80} in {name}, which is not UTF-8; correct it",
        )
        raise


def _places(
    name: str, lengths: Int64s, values: pa.Array, width: int, row_of: Callable[[int], int]
) -> pa.Array:
    """Returns the places of the ones in each list."""
    _refuse(
        pa.array((lengths != 0) & (lengths != width)),
        lambda at: at,
        lambda at: (
            f"has {lengths[at]} values in {name} and others have {width}; with "
            f"labels=multi-hot each has one for every label"
        ),
    )
    numbers = values.to_numpy(zero_copy_only=False)
    ones = np.flatnonzero(numbers == 1)
    _refuse(
        pa.array((numbers != 0) & (numbers != 1)),
        row_of,
        lambda at: f"has {values[at]} in {name}; with labels=multi-hot each value is 0 or 1",
    )
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    rows = np.repeat(np.arange(len(lengths)), lengths)[ones]
    offsets = np.searchsorted(rows, np.arange(len(lengths) + 1))
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(ones - starts[ones]))
