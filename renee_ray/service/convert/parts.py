"""From a source, text files or Parquet, to the parts of a dataset, with bounded memory everywhere.

    prepare    tasks    what the source needs first: convert_text.py, label_ids.py
    partition  tasks    a task a block: labels -> ids, texts -> tokens; rows to scratch files, by
                        bucket of the shuffle; counts of labels, by range of ids
    points     tasks    a task a bucket: its rows in order, cut into parts
    labels     tasks    a task a range: counts summed, texts read or made, cut into parts
    publish    driver   dataset.json, last

A task holds a block, a bucket or a range, never all rows or all labels; each row is read,
tokenised and written once to scratch and once to its place. The driver holds some numbers a block.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from renee_ray.config.schema import ConvertConfig
from renee_ray.data import dataset as layout
from renee_ray.data import tokenizer
from renee_ray.data.dataset import MAX_LABELS, Part
from renee_ray.data.sources.lines import Int64s, SourceError
from renee_ray.data.sources.parquet import ParquetSource
from renee_ray.data.sources.raw import Raw, RawSplit
from renee_ray.data.split import shuffle_of
from renee_ray.errors import ReneeError
from renee_ray.service.convert.label_ids import refuse_multi_hot, with_vocabulary
from renee_ray.service.convert.parquet import parquet_labels, parquet_points
from renee_ray.service.convert.plan import (
    Groups,
    Plan,
    bucket_rows,
    keys_of,
    part_rows,
    read_groups,
    run,
    write_groups,
)
from renee_ray.service.convert.text import text_blocks, text_labels, text_points, with_filters

COUNTS = pa.schema({"label": pa.int64(), "train": pa.int64(), "filter": pa.int64()})
BANDS = (0, 1, 5, 20, 100)
BAND_NAMES = ("0", "1", "2-5", "6-20", "21-100", ">100")
POINTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Converted:
    """What the manifest needs of a conversion."""

    num_labels: int
    has_label_texts: bool
    splits: dict[str, tuple[Part, ...]]
    other_texts: tuple[int, ...]
    labels_hash: str
    statistics: dict[str, Any]


def write_parts(
    source: Raw | ParquetSource,
    dst: str,
    scratch: str,
    vocabulary: tokenizer.Vocabulary,
    config: ConvertConfig,
    before_writing: Callable[[list[str]], None],
    on_progress: Callable[[str], None],
) -> Converted:
    """Writes all parts; the caller writes the manifest.

    Args:
        before_writing: called with the paths of all parts that will be written, when all points
            have been read and found good.

    Raises:
        ReneeError: bad rows (the sentence names file and line or row).
    """
    plan = _plan(source, dst, scratch, vocabulary, config)
    prepare = with_filters if isinstance(source, Raw) else with_vocabulary
    plan = prepare(plan, on_progress)
    plan, totals, paths = _partitioned(plan, config, on_progress)
    before_writing(paths)
    splits: dict[str, list[Part]] = {name: [] for name in layout.SPLITS}
    bands, others, hashes = Counter[str](), {}, []
    for result in run(_write_parts, plan, len(plan.tasks), "buckets written", on_progress):
        splits[result["split"]] += [Part(**part) for part in result["parts"]]
        if result["split"] != "labels":
            continue
        for part, number in zip(result["parts"], result["others"], strict=True):
            others[part["first"]] = number
        bands.update(result["bands"])
        hashes.append(result["hash"])
        _add(totals["labels"], result["totals"])
    ordered = {
        name: tuple(sorted(parts, key=lambda part: part.first)) for name, parts in splits.items()
    }
    assert plan.num_labels is not None
    return Converted(
        plan.num_labels,
        source.has_label_texts,
        ordered,
        tuple(others[part.first] for part in ordered["labels"]),
        layout.add_hashes(hashes),
        _statistics(totals, bands),
    )


def _plan(
    source: Raw | ParquetSource,
    dst: str,
    scratch: str,
    vocabulary: tokenizer.Vocabulary,
    config: ConvertConfig,
) -> Plan:
    splits = {"train": source.train} | ({"test": source.test} if source.test else {})
    blocks = [
        (name, block)
        for name, split in splits.items()
        for block in (text_blocks(split) if isinstance(split, RawSplit) else split.blocks)
    ]
    starts = np.array([block.first for name, block in blocks if name == "train"])
    rows, size = source.train.rows, bucket_rows(config.part_rows)
    shuffle, held = shuffle_of(rows, starts, size, config.validation, config.seed)
    if held[-1] == rows:
        raise ReneeError(
            f"validation={config.validation} holds out all {rows} training points of "
            f"{blocks[0][1].path}; lower validation"
        )
    before = [*held[:-1].tolist(), *[0] * (len(blocks) - len(starts))]
    return Plan(
        source,
        dst,
        scratch,
        vocabulary.serialised,
        tokenizer.size(vocabulary.serialised),
        config.max_length,
        size,
        shuffle,
        tuple((*block, number) for block, number in zip(blocks, before, strict=True)),
        {},
        num_labels=source.num_labels,
    )


# ----------------------------------------------------------------------------------- partition


def _partitioned(
    plan: Plan, config: ConvertConfig, on_progress: Callable[[str], None]
) -> tuple[Plan, dict[str, Counter[str]], list[str]]:
    """The plan with what each bucket and range of labels is to read, and paths of all parts."""
    files: dict[str, list[Groups]] = defaultdict(list)
    totals: dict[str, Counter[str]] = {name: Counter() for name in layout.SPLITS}
    least, greatest, any_label = MAX_LABELS, -1, False
    for result in run(_partition, plan, len(plan.blocks), "blocks read", on_progress):
        for what, groups in result["files"]:
            files[what].append(tuple(groups))
        for name, counts in result["totals"].items():
            _add(totals[name], counts)
        least, greatest = min(least, result["least"]), max(greatest, result["greatest"])
        any_label |= result["train_pairs"] > 0
    if not any_label:
        raise SourceError(
            f"{plan.source.labelled_path} gives no training point a label; there is nothing to "
            f"learn"
        )
    if config.labels == "auto":
        duplicates = sum(total["duplicate_pairs"] for total in totals.values())
        refuse_multi_hot(plan.source, greatest, duplicates)
    totals["labels"]["least_id"], totals["labels"]["greatest_id"] = least, greatest
    num_labels = greatest + 1 if plan.num_labels is None else plan.num_labels
    sorted_files = {what: tuple(sorted(groups)) for what, groups in files.items()}
    tasks = [(name, key) for name in POINTS for key in keys_of(sorted_files.get(name, ()))]
    tasks += [("labels", key) for key in range(-(-num_labels // plan.bucket_rows))]
    rows = {name: totals[name]["rows"] for name in POINTS} | {"labels": num_labels}
    sizes = {name: part_rows(config.part_rows, n, plan.bucket_rows) for name, n in rows.items()}
    plan = replace(
        plan,
        num_labels=num_labels,
        files=plan.files | sorted_files,
        tasks=tuple(tasks),
        part_rows=sizes,
    )
    paths = [
        layout.part_path(name, index)
        for name, n in rows.items()
        for index in range(-(-n // sizes[name]))
    ]
    return plan, totals, paths


def _partition(plan: Plan, i: int) -> dict[str, Any]:
    name, _, held = plan.blocks[i]
    files, counts, pairs = [], [COUNTS.empty_table()], 0
    least, greatest = MAX_LABELS, -1
    totals: dict[str, Counter[str]] = defaultdict(Counter)
    read = text_points if isinstance(plan.source, Raw) else parquet_points
    for number, (points, odd) in enumerate(read(plan, i)):
        for column in ("labels", "filter_labels"):
            values = points[column].combine_chunks().flatten()
            if len(values):
                ends = pc.min_max(values)
                least = min(least, ends["min"].as_py())
                greatest = max(greatest, ends["max"].as_py())
            pairs += len(values) if column == "labels" else 0
        for split, rows, buckets in _destinations(plan, name, points["point_id"].to_numpy(), held):
            mine = points.take(pa.array(rows))
            if groups := write_groups(plan, f"{split}-{i}-{number}", mine, buckets):
                files.append((split, groups))
            held += len(rows) if split == "validation" else 0
            _add(totals[split], _totals(mine, plan.max_length))
            if name == "train":
                counts.append(_counts(mine, split))
        _add(totals[name], odd)
    summed = _summed(pa.concat_tables(counts))
    keys = summed["label"].to_numpy() // plan.bucket_rows
    if groups := write_groups(plan, f"counts-{i}", summed, keys):
        files.append(("counts", groups))
    return {
        "files": files,
        "totals": totals,
        "least": least,
        "greatest": greatest,
        "train_pairs": pairs if name == "train" else 0,
    }


def _destinations(
    plan: Plan, name: str, points: Int64s, held: int
) -> Iterator[tuple[str, Int64s, Int64s]]:
    """(split, places among `points` of its rows in their order there, their buckets).

    held: rows of the split held out before these.
    """
    if name != "train":
        yield name, np.arange(len(points)), points // plan.bucket_rows
        return
    out = plan.shuffle.held_out(points)
    kept = np.flatnonzero(~out)
    keys = plan.shuffle.keys(points[kept])
    order = np.argsort(keys)
    yield "train", kept[order], plan.shuffle.buckets(keys[order])
    places = held + np.arange(out.sum())
    yield "validation", np.flatnonzero(out), places // plan.bucket_rows


def _counts(points: pa.Table, split: str) -> pa.Table:
    """Points with each label, and those, not held out, that have it as a filter label."""
    pieces = []
    for column, target in (("labels", "train"), ("filter_labels", "filter")):
        if target == "filter" and split == "validation":
            continue
        labels, counts = np.unique(
            points[column].combine_chunks().flatten().to_numpy(), return_counts=True
        )
        zeros = np.zeros_like(labels)
        both = {"label": labels, "train": zeros, "filter": zeros, target: counts}
        pieces.append(pa.table(both, schema=COUNTS))
    return pa.concat_tables(pieces)


def _summed(counts: pa.Table) -> pa.Table:
    found = counts.group_by("label").aggregate([("train", "sum"), ("filter", "sum")])
    columns = found.select(["label", "train_sum", "filter_sum"]).rename_columns(COUNTS.names)
    return columns.sort_by("label").cast(COUNTS)


# --------------------------------------------------------------------------------------- parts


def _write_parts(plan: Plan, i: int) -> dict[str, Any]:
    what, key = plan.tasks[i]
    return _write_labels(plan, key) if what == "labels" else _write_points(plan, what, key)


def _write_points(plan: Plan, split: str, bucket: int) -> dict[str, Any]:
    table = pa.concat_tables(rows for _, rows in read_groups(plan, split, bucket))
    points = table["point_id"].to_numpy()
    order = np.argsort(plan.shuffle.keys(points) if split == "train" else points)
    table = table.take(pa.array(order))
    parts = []
    size = plan.part_rows[split]
    for start in range(0, len(table), size):
        first = bucket * plan.bucket_rows + start
        path = layout.part_path(split, first // size)
        rows = table.slice(start, size)
        parts.append(asdict(layout.write_part(plan.dst, path, first, rows)))
    return {"split": split, "parts": parts}


def _write_labels(plan: Plan, index: int) -> dict[str, Any]:
    assert plan.num_labels is not None
    first = index * plan.bucket_rows
    size = min(plan.bucket_rows, plan.num_labels - first)
    counts, filters = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
    for _, found in read_groups(plan, "counts", index):
        at = found["label"].to_numpy() - first
        counts[at] += found["train"].to_numpy()
        filters[at] += found["filter"].to_numpy()
    texts, totals = _label_texts(plan, first, first + size)
    parts, others, rows = [], [], plan.part_rows["labels"]
    for start in range(0, size, rows):
        here = slice(start, min(start + rows, size))
        texts_of_part = texts[here]
        columns = {
            "label_id": pa.array(np.arange(first + here.start, first + here.stop)),
            "text": texts_of_part,
            "input_ids": _encoded(plan, texts_of_part),
            "train_count": pa.array(counts[here]),
            "is_point": pa.array(filters[here] > 0),
        }
        table = pa.table(columns, schema=layout.LABELS)
        _add(totals, _text_totals(table, plan.max_length))
        path = layout.part_path("labels", (first + start) // rows)
        parts.append(asdict(layout.write_part(plan.dst, path, first + start, table)))
        others.append(int((filters[here] == 0).sum()))
    bands = np.searchsorted(BANDS, counts)
    labels = np.bincount(bands, minlength=len(BAND_NAMES))
    pairs = np.bincount(bands, weights=counts, minlength=len(BAND_NAMES))
    named = {name: int(n) for name, n in zip(BAND_NAMES, labels, strict=True)}
    weighted = {f"pairs {name}": int(n) for name, n in zip(BAND_NAMES, pairs, strict=True)}
    return {
        "split": "labels",
        "parts": parts,
        "others": others,
        "bands": named | weighted,
        "totals": totals,
        "hash": layout.hash_labels(first, texts),
    }


def _label_texts(plan: Plan, start: int, stop: int) -> tuple[pa.Array, Counter[str]]:
    """Texts of labels [start, stop), empty where the source has none, and what was odd in them."""
    if not plan.source.has_label_texts:
        return pa.array([""] * (stop - start), pa.string()), Counter()
    read = text_labels if isinstance(plan.source, Raw) else parquet_labels
    texts, odd = read(plan, start, stop)
    return texts, Counter(odd)


def _encoded(plan: Plan, texts: pa.Array) -> pa.Array:
    if plan.source.has_label_texts:
        return tokenizer.encode(plan.tokenizer, texts.to_pylist(), plan.max_length)
    (ids,) = tokenizer.encode(plan.tokenizer, [""], plan.max_length).to_pylist()
    offsets = np.arange(len(texts) + 1, dtype=np.int32) * len(ids)
    return pa.ListArray.from_arrays(
        pa.array(offsets), pa.array(np.tile(np.array(ids, np.int32), len(texts)))
    )


# ---------------------------------------------------------------------------------- statistics


def _totals(points: pa.Table, max_length: int) -> dict[str, int]:
    labels = _lengths(points["labels"])
    return {
        **_text_totals(points, max_length),
        "label_pairs": int(labels.sum()),
        "labels_max": int(labels.max(initial=0)),
        "without_labels": int((labels == 0).sum()),
        "filter_pairs": int(_lengths(points["filter_labels"]).sum()),
    }


def _text_totals(table: pa.Table, max_length: int) -> dict[str, int]:
    sizes = _lengths(table["input_ids"])
    return {
        "rows": len(sizes),
        "tokens": int(sizes.sum()),
        "tokens_max": int(sizes.max(initial=0)),
        "at_max_length": int((sizes == max_length).sum()),
    }


def _lengths(lists: pa.ChunkedArray) -> Int64s:
    return pc.list_value_length(lists).to_numpy().astype(np.int64)


def _add(total: Counter[str], more: Mapping[str, int]) -> None:
    for name, value in more.items():
        total[name] = max(total[name], value) if name.endswith("_max") else total[name] + value


def _statistics(totals: dict[str, Counter[str]], bands: Counter[str]) -> dict[str, Any]:
    """Counts for people. What was odd in the lines or rows of train (duplicate_pairs, zero_values,
    empty_texts, replaced_lines, replaced_bytes) is of its whole source, the points held out for
    validation included. least_id and greatest_id: of the labels that some point has."""
    statistics: dict[str, Any] = {}
    for split, total in totals.items():
        one: dict[str, float] = dict(total)
        rows = one.pop("rows", 0)
        one["points"] = rows
        one["tokens_mean"] = round(one.pop("tokens", 0) / max(rows, 1), 2)
        if split != "labels":
            one["labels_mean"] = round(one.get("label_pairs", 0) / max(rows, 1), 3)
        statistics[split] = one
    for key, prefix in (
        ("share_of_labels_by_train_count", ""),
        ("share_of_pairs_by_train_count", "pairs "),
    ):
        counts = [bands[prefix + name] for name in BAND_NAMES]
        shares = [round(count / max(sum(counts), 1), 4) for count in counts]
        statistics["labels"][key] = dict(zip(BAND_NAMES, shares, strict=True))
    return statistics
