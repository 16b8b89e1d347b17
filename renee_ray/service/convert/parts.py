"""Writes the parts of a dataset, from buckets of points and ranges of labels.

points    tasks    a task a bucket: its rows in order, cut into parts
labels    tasks    a task a range: counts summed, texts read, cut into parts
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from renee_ray.data import dataset as layout
from renee_ray.data.dataset import Manifest, Part
from renee_ray.data.sources.records import odd_texts
from renee_ray.errors import Progress
from renee_ray.service.convert.conversion import Conversion, keys_of, read_groups, run
from renee_ray.service.convert.partition import Partitioned, given_tokens
from renee_ray.service.convert.statistics import add, bands_of, statistics_of, text_totals


def write_parts(conversion: Conversion, found: Partitioned, on_progress: Progress) -> Manifest:
    """Writes all parts, and makes the manifest that names them.

    Raises:
        SourceError: a bad text of a label.
    """
    keys = {name: keys_of(conversion.files.get(name, ())) for name in layout.SPLITS}
    keys["labels"] = range(-(-found.rows["labels"] // conversion.bucket_rows))
    tasks = [(name, key, found.part_rows[name]) for name in layout.SPLITS for key in keys[name]]
    splits: dict[str, list[Part]] = {name: [] for name in layout.SPLITS}
    bands, others, hashes = Counter[str](), dict[int, int](), list[str]()
    scratch = conversion.scratch
    for result in run(_write, conversion, tasks, scratch, "buckets written", on_progress):
        splits[result["split"]] += [Part(**part) for part in result["parts"]]
        if result["split"] != "labels":
            continue
        for part, number in zip(result["parts"], result["others"], strict=True):
            others[part["first"]] = number
        bands.update(result["bands"])
        hashes.append(result["hash"])
        add(found.totals["labels"], result["totals"])
    ordered = {
        name: tuple(sorted(parts, key=lambda part: part.first)) for name, parts in splits.items()
    }
    config, vocabulary = conversion.config, conversion.vocabulary
    return Manifest(
        format_version=layout.FORMAT_VERSION,
        tokenizer=config.tokenizer,
        vocabulary_hash=vocabulary.hash,
        max_length=config.max_length,
        pad_id=vocabulary.pad_id,
        num_labels=found.rows["labels"],
        has_label_texts=_text_column(conversion) is not None,
        propensity_a=config.propensity_a,
        propensity_b=config.propensity_b,
        splits=ordered,
        other_texts=tuple(others[part.first] for part in ordered["labels"]),
        statistics=statistics_of(found.totals, bands),
        labels_hash=layout.add_hashes(hashes),
    )


def _text_column(conversion: Conversion) -> str | None:
    """Returns the column of the labels' table that holds their texts or tokens, if there is one."""
    table = conversion.source.labels
    columns = () if table is None else table.columns
    return next((name for name in ("text", "label", "input_ids") if name in columns), None)


def _write(conversion: Conversion, task: tuple[str, int, int]) -> dict[str, Any]:
    split, key, part_rows = task
    if split == "labels":
        return _write_labels(conversion, key, part_rows)
    return _write_points(conversion, split, key, part_rows)


def _write_points(
    conversion: Conversion, split: str, bucket: int, part_rows: int
) -> dict[str, Any]:
    table = pa.concat_tables(rows for _, rows in read_groups(conversion, split, bucket))
    points = table["point_id"].to_numpy()
    order = np.argsort(conversion.shuffle.keys(points) if split == "train" else points)
    table = table.take(pa.array(order))
    parts = []
    for start in range(0, len(table), part_rows):
        first = bucket * conversion.bucket_rows + start
        path = layout.part_path(split, first // part_rows)
        rows = table.slice(start, part_rows)
        parts.append(asdict(layout.write_part(conversion.dst, path, first, rows)))
    return {"split": split, "parts": parts}


def _write_labels(conversion: Conversion, index: int, part_rows: int) -> dict[str, Any]:
    first, num_labels = index * conversion.bucket_rows, conversion.source.num_labels
    assert num_labels is not None
    size = min(conversion.bucket_rows, num_labels - first)
    counts, filters = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
    for _, found in read_groups(conversion, "counts", index):
        at = found["label"].to_numpy() - first
        counts[at] += found["train"].to_numpy()
        filters[at] += found["filter"].to_numpy()
    texts, tokens, totals = _label_texts(conversion, first, first + size)
    parts, others = [], []
    for start in range(0, size, part_rows):
        here = slice(start, min(start + part_rows, size))
        columns = {
            "label_id": pa.array(np.arange(first + here.start, first + here.stop)),
            "text": texts[here],
            "input_ids": tokens[here],
            "train_count": pa.array(counts[here]),
            "is_point": pa.array(filters[here] > 0),
        }
        table = pa.table(columns, schema=layout.LABELS)
        add(totals, text_totals(table, conversion.config.max_length))
        path = layout.part_path("labels", (first + start) // part_rows)
        parts.append(asdict(layout.write_part(conversion.dst, path, first + start, table)))
        others.append(int((filters[here] == 0).sum()))
    return {
        "split": "labels",
        "parts": parts,
        "others": others,
        "bands": bands_of(counts),
        "totals": totals,
        "hash": layout.hash_labels(first, texts),
    }


def _label_texts(
    conversion: Conversion, start: int, stop: int
) -> tuple[pa.Array, pa.Array, Counter[str]]:
    """Reads the texts of labels [start, stop); empty ones where the source has none.

    Returns:
        (the texts, their tokens, counts of what was odd in them)
    """
    table, column = conversion.source.labels, _text_column(conversion)
    nothing = pa.array([""] * (stop - start), pa.string())
    if table is None or column is None:
        (ids,) = conversion.encode([""]).to_pylist()
        return nothing, pa.array([ids] * len(nothing), pa.list_(pa.int32())), Counter()
    texts, tokens, replaced = list[str](), list[pa.Array](), [np.zeros(0, np.int64)]
    for block in table.blocks:
        if block.first < stop and block.first + block.rows > start:
            for records in table.read(block, [column]):
                here = slice(max(start - records.first, 0), max(stop - records.first, 0))
                if column == "input_ids":
                    tokens.append(given_tokens(conversion, records)[here])
                    continue
                texts += records.columns[column][here].to_pylist()
                replaced.append(records.replaced[here])
    if column == "input_ids":
        return nothing, pa.concat_arrays(tokens), Counter()
    odd = odd_texts(texts, np.concatenate(replaced))
    return pa.array(texts, pa.string()), conversion.encode(texts), Counter(odd)
