"""Makes points as the dataset has them of blocks of records: label ids and tokens."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from renee_ray.data import dataset as layout
from renee_ray.data import tokenizer
from renee_ray.data.sources.records import Int64s, Records, SourceError, odd_texts
from renee_ray.service.convert.conversion import Conversion
from renee_ray.service.convert.label_ids import LabelIds


def read_points(conversion: Conversion, i: int) -> Iterator[tuple[pa.Table, dict[str, int]]]:
    """Yields (rows of block i as the dataset has them, counts of what was odd), in pieces.

    Raises:
        SourceError: a bad row.
    """
    split, block, _ = conversion.blocks[i]
    table = conversion.source.splits[split]
    ids = LabelIds.of_block(conversion, i)
    for records in table.read(block, table.columns):
        yield _points(conversion, records, ids)


def _points(
    conversion: Conversion, records: Records, ids: LabelIds
) -> tuple[pa.Table, dict[str, int]]:
    columns, number = {"point_id": records.numbers()}, len(records)
    columns["labels"], duplicates = _sorted_lists(number, *ids.of(records, "labels"))
    columns["filter_labels"], _ = _sorted_lists(number, *ids.of(records, "filter_labels"))
    odd = {"duplicate_pairs": duplicates}
    if "input_ids" in records.columns:
        columns["input_ids"] = given_tokens(conversion, records)
    else:
        texts = records.columns["text"].to_pylist()
        columns["input_ids"] = conversion.encode(texts)
        odd |= odd_texts(texts, records.replaced)
    return pa.table(columns, schema=layout.POINTS), odd


def _sorted_lists(num_rows: int, rows: Int64s, values: Int64s) -> tuple[pa.ListArray, int]:
    """Sorts the values of each row; returns the lists and the number of duplicates left out.

    Args:
        rows: the place of each value's row.
    """
    width = int(values.max(initial=0)) + 1
    keys = np.unique(rows * width + values)
    offsets = np.searchsorted(keys, np.arange(num_rows + 1) * width).astype(np.int32)
    lists = pa.ListArray.from_arrays(pa.array(offsets), pa.array(keys % width))
    return lists, len(values) - len(keys)


def given_tokens(conversion: Conversion, records: Records) -> pa.Array:
    """Cuts the tokens that the source has to max_length, as those of a text would be."""
    lists, num_tokens = (
        records.columns["input_ids"],
        tokenizer.size(conversion.vocabulary.serialised),
    )
    values = lists.flatten().to_numpy()
    lengths = pc.list_value_length(lists).to_numpy()
    bad = ~((values >= 0) & (values < num_tokens))
    if bad.any():
        at = int(np.argmax(bad))
        row = int(np.searchsorted(np.cumsum(lengths), at, side="right"))
        raise SourceError(
            f"{records.where(row)} has the token {values[at]} and the tokenizer has {num_tokens}; "
            f"give the tokenizer that made the tokens"
        )
    kept = np.minimum(lengths, conversion.config.max_length)
    starts = np.cumsum(lengths) - lengths
    offsets = np.concatenate([[0], np.cumsum(kept)])
    places = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], kept)
    cut = kept < lengths
    places[offsets[1:][cut] - 1] = (starts + lengths)[cut] - 1  # the end-of-text token stays
    return pa.ListArray.from_arrays(
        pa.array(offsets.astype(np.int32)), pa.array(values[places].astype(np.int32))
    )
