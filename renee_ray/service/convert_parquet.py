"""From Parquet to a dataset directory, with bounded memory in every task.

    index      driver   footers only
    strings    tasks    a task a block: its distinct labels, by bucket of their hash   (labels that
    vocabulary tasks    a task a bucket: its distinct labels, sorted; ids follow        are strings)
    partition  tasks    a task a block: labels -> ids, texts -> tokens; rows to scratch files, by
                        bucket of their place in the shuffle; counts of labels, by range of ids
    points     tasks    a task a bucket: its rows in order, cut into parts
    labels     tasks    a task a range: counts summed, texts read or made, cut into parts
    publish    driver   dataset.json, last

A task holds a block, a bucket or a range, never all rows or all labels; each row is read,
tokenised and written once to scratch and once to its place. The driver holds a number a row.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from renee_ray.config import ConvertConfig, ReneeError
from renee_ray.data import dataset as layout
from renee_ray.data import tokenizer
from renee_ray.data.dataset import Part
from renee_ray.data.parquet_source import Block, Int64s, ParquetSource, slices, where
from renee_ray.data.split import split_rows
from renee_ray.data.storage import filesystem_of
from renee_ray.data.xmlrepo import SourceError
from renee_ray.service.label_ids import label_ids, with_vocabulary
from renee_ray.service.parquet_plan import (
    JOURNAL,
    Groups,
    Plan,
    label_columns,
    read_group,
    read_parquet,
    run,
    write_groups,
)

PLACE = "place"
COUNTS = pa.schema({"label": pa.int64(), "train": pa.int64(), "filter": pa.int64()})
BANDS = (0, 1, 5, 20, 100)
BAND_NAMES = ("0", "1", "2-5", "6-20", "21-100", ">100")


def clear_once(dst: str, journal: str) -> None:
    """Removes an earlier dataset, but not the parts of a conversion that is going on."""
    filesystem, root = filesystem_of(journal)
    if filesystem.get_file_info(f"{root}/cleared").type == pafs.FileType.NotFound:
        layout.clear(dst)
        with filesystem.open_output_stream(f"{root}/cleared") as sink:
            sink.write(b"yes")


@dataclass(frozen=True)
class Converted:
    """What the manifest needs of a conversion."""

    num_labels: int
    has_label_texts: bool
    splits: dict[str, tuple[Part, ...]]
    other_texts: tuple[int, ...]
    statistics: dict[str, Any]


def convert_parquet(
    source: ParquetSource,
    dst: str,
    scratch: str,
    vocabulary: tokenizer.Vocabulary,
    config: ConvertConfig,
    on_progress: Callable[[str], None],
) -> Converted:
    """Writes all parts; the caller writes the manifest.

    Raises:
        ReneeError: bad rows (the sentence names file and row).
    """
    plan = _plan(source, dst, scratch, vocabulary, config)
    if source.labels_are_strings:
        plan = with_vocabulary(plan, on_progress)
    elif source.labels is not None:
        plan = replace(plan, num_labels=source.labels.rows)
    plan, totals = _partitioned(plan, on_progress)
    clear_once(dst, f"{scratch}/{JOURNAL}")
    splits: dict[str, list[Part]] = {name: [] for name in layout.SPLITS}
    bands, others = Counter[str](), {}
    tasks = len(plan.points) + len(plan.labels)
    for result in run(_write_parts, plan, tasks, "buckets written", on_progress):
        splits[result["split"]] += [Part(**part) for part in result["parts"]]
        if result["split"] != "labels":
            continue
        for part, number in zip(result["parts"], result["others"], strict=True):
            others[part["first"]] = number
        bands.update(result["bands"])
        _add(totals["labels"], result["totals"])
    ordered = {
        name: tuple(sorted(parts, key=lambda part: part.first)) for name, parts in splits.items()
    }
    assert plan.num_labels is not None
    return Converted(
        plan.num_labels,
        _has_texts(source),
        ordered,
        tuple(others[part.first] for part in ordered["labels"]),
        _statistics(totals, bands),
    )


def _plan(
    source: ParquetSource,
    dst: str,
    scratch: str,
    vocabulary: tokenizer.Vocabulary,
    config: ConvertConfig,
) -> Plan:
    train, validation = split_rows(source.train.rows, config.validation, config.seed)
    if not len(train):
        raise ReneeError(
            f"validation={config.validation} holds out all {source.train.rows} training points; "
            f"lower validation"
        )
    places = np.empty(source.train.rows, dtype=np.int64)
    places[train] = np.arange(len(train))
    places[validation] = -1 - np.arange(len(validation))
    names = ["train"] + (["test"] if source.test else [])
    return Plan(
        source,
        dst,
        scratch,
        vocabulary.serialised,
        tokenizer.size(vocabulary.serialised),
        config.max_length,
        config.part_rows,
        {"train": places},
        tuple((name, block) for name in names for block in source.split(name).blocks),
    )


def _has_texts(source: ParquetSource) -> bool:
    given = source.labels is not None and "text" in source.labels.columns
    return given or source.labels_are_strings


# ----------------------------------------------------------------------------------- partition


def _partitioned(
    plan: Plan, on_progress: Callable[[str], None]
) -> tuple[Plan, dict[str, Counter[str]]]:
    """The plan with what each bucket and each range of labels is to read."""
    points: dict[str, Groups] = {name: defaultdict(list) for name in layout.SPLITS}
    ranges: Groups = defaultdict(list)
    totals: dict[str, Counter[str]] = {name: Counter() for name in layout.SPLITS}
    greatest, any_label = -1, False
    for result in run(_partition, plan, len(plan.blocks), "blocks read", on_progress):
        for name, file, buckets in result["files"]:
            for group, bucket in enumerate(buckets):
                points[name][bucket].append((file, group))
        for group, each in enumerate(result["ranges"]):
            ranges[each].append((result["counts"], group))
        for name, counts in result["totals"].items():
            _add(totals[name], counts)
        greatest = max(greatest, result["greatest"])
        any_label |= result["train_pairs"] > 0
    if not any_label:
        raise SourceError(
            f"{plan.source.train.blocks[0].path} gives no training point a label; there is nothing "
            f"to learn"
        )
    num_labels = greatest + 1 if plan.num_labels is None else plan.num_labels
    tasks = [
        (name, bucket, tuple(groups[bucket]))
        for name, groups in points.items()
        for bucket in sorted(groups)
    ]
    labels = [
        (index, tuple(ranges.get(index, ()))) for index in range(-(-num_labels // plan.bucket_rows))
    ]
    return replace(plan, num_labels=num_labels, points=tuple(tasks), labels=tuple(labels)), totals


def _partition(plan: Plan, i: int) -> dict[str, Any]:
    name, block = plan.blocks[i]
    table = plan.source.split(name)
    files, counts, greatest, pairs = [], [COUNTS.empty_table()], -1, 0
    totals: dict[str, Counter[str]] = defaultdict(Counter)
    first = "input_ids" if "input_ids" in table.columns else "text"
    for number, (rows, piece) in enumerate(slices(block, [first, *label_columns(table)])):
        points, duplicates = _points(plan, block, rows, piece)
        places = plan.places[name][rows] if name in plan.places else rows
        counts.append(_counts(points, places, name))
        for column in ("labels", "filter_labels"):
            values = points[column].combine_chunks().flatten()
            greatest = max(greatest, pc.max(values).as_py() if len(values) else -1)
        pairs += len(points["labels"].combine_chunks().flatten())
        for split, chosen, order in _destinations(name, places):
            mine = points.take(pa.array(chosen)).append_column(PLACE, pa.array(order))
            by_place = np.argsort(order, kind="stable")
            file = f"{split}-{i}-{number}.parquet"
            buckets = write_groups(
                plan, file, mine.take(pa.array(by_place)), order[by_place] // plan.bucket_rows
            )
            files.append((split, file, buckets))
            _add(totals[split], _totals(mine, plan.max_length))
        totals[name]["duplicate_pairs"] += duplicates
    summed = _summed(pa.concat_tables(counts))
    file = f"counts-{i}.parquet"
    ranges = write_groups(plan, file, summed, summed["label"].to_numpy() // plan.bucket_rows)
    return {
        "files": files,
        "counts": file,
        "ranges": ranges,
        "totals": totals,
        "greatest": greatest,
        "train_pairs": pairs if name == "train" else 0,
    }


def _destinations(name: str, places: Int64s) -> Iterator[tuple[str, Int64s, Int64s]]:
    """(split, rows, their positions in it)."""
    if name != "train":
        yield name, np.arange(len(places)), places
        return
    for split, chosen in (("train", places >= 0), ("validation", places < 0)):
        if chosen.any():
            mine = places[chosen]
            yield split, np.flatnonzero(chosen), mine if split == "train" else -1 - mine


def _points(plan: Plan, block: Block, rows: Int64s, piece: pa.Table) -> tuple[pa.Table, int]:
    """Rows as the dataset has them, and how many labels came twice in a row."""
    columns: dict[str, pa.Array] = {"point_id": pa.array(rows)}
    if "input_ids" in piece.column_names:
        columns["input_ids"] = _given_ids(plan, block, rows, piece["input_ids"].combine_chunks())
    else:
        texts = piece["text"].to_pylist()
        columns["input_ids"] = tokenizer.encode(plan.tokenizer, texts, plan.max_length)
    duplicates = 0
    for name in ("labels", "filter_labels"):
        if name in piece.column_names:
            lists = piece[name].combine_chunks()
            ids = label_ids(plan, block, rows, name, lists)
            columns[name], twice = _sorted_lists(_lengths(lists), ids)
            duplicates += twice if name == "labels" else 0
        else:
            nothing = pa.array([], type=pa.int64())
            offsets = pa.array(np.zeros(len(rows) + 1, dtype=np.int32))
            columns[name] = pa.ListArray.from_arrays(offsets, nothing)
    return pa.table(columns, schema=layout.POINTS), duplicates


def _given_ids(plan: Plan, block: Block, rows: Int64s, lists: pa.Array) -> pa.Array:
    """Tokens that the source has already, cut to max_length as a text's would be."""
    values = pc.cast(lists.flatten(), pa.int64()).to_numpy(zero_copy_only=False)
    bad = ~((values >= 0) & (values < plan.vocabulary_size))
    if bad.any():
        at = int(np.argmax(bad))
        row = int(np.searchsorted(np.cumsum(_lengths(lists)), at, side="right"))
        raise SourceError(
            f"{where(block, int(rows[row]) - block.first)} has the token {values[at]} and the "
            f"tokenizer has {plan.vocabulary_size}; give the tokenizer that made the tokens"
        )
    lengths = _lengths(lists)
    kept = np.minimum(lengths, plan.max_length)
    starts = np.cumsum(lengths) - lengths
    offsets = np.concatenate([[0], np.cumsum(kept)])
    places = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], kept)
    cut = (kept > 0) & (kept < lengths)
    places[offsets[1:][cut] - 1] = (starts + lengths)[cut] - 1  # the end-of-text token stays
    return pa.ListArray.from_arrays(
        pa.array(offsets.astype(np.int32)), pa.array(values[places].astype(np.int32))
    )


def _lengths(lists: pa.Array) -> Int64s:
    return pc.list_value_length(lists).to_numpy(zero_copy_only=False).astype(np.int64)


def _sorted_lists(lengths: Int64s, values: Int64s) -> tuple[pa.ListArray, int]:
    """Each row's values ascending and once, and how many were left out for that."""
    rows = np.repeat(np.arange(len(lengths)), lengths)
    order = np.lexsort((values, rows))
    rows, values = rows[order], values[order]
    kept = np.ones(len(values), dtype=bool)
    kept[1:] = (rows[1:] != rows[:-1]) | (values[1:] != values[:-1])
    offsets = np.concatenate([[0], np.cumsum(np.bincount(rows[kept], minlength=len(lengths)))])
    lists = pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values[kept]))
    return lists, int((~kept).sum())


def _counts(points: pa.Table, places: Int64s, name: str) -> pa.Table:
    """Of a slice: points of the training file with each label, and those, not held out, that
    have it as a filter label."""
    if name != "train":
        return COUNTS.empty_table()
    trained = points.filter(pa.array(places >= 0))
    pieces = []
    for table, column, target in (
        (points, "labels", "train"),
        (trained, "filter_labels", "filter"),
    ):
        labels, counts = np.unique(
            table[column].combine_chunks().flatten().to_numpy(), return_counts=True
        )
        zeros = np.zeros_like(labels)
        both = {"label": labels, "train": zeros, "filter": zeros, target: counts}
        pieces.append(pa.table(both, schema=COUNTS))
    return pa.concat_tables(pieces)


def _summed(counts: pa.Table) -> pa.Table:
    found = counts.group_by("label").aggregate([("train", "sum"), ("filter", "sum")])
    return (
        found.select(["label", "train_sum", "filter_sum"])
        .sort_by("label")
        .cast(pa.schema({"label": pa.int64(), "train_sum": pa.int64(), "filter_sum": pa.int64()}))
        .rename_columns(COUNTS.names)
    )


# --------------------------------------------------------------------------------------- parts


def _write_parts(plan: Plan, i: int) -> dict[str, Any]:
    if i < len(plan.points):
        return _write_points(plan, i)
    return _write_labels(plan, i - len(plan.points))


def _write_points(plan: Plan, i: int) -> dict[str, Any]:
    split, bucket, pieces = plan.points[i]
    table = pa.concat_tables(read_group(plan, *piece) for piece in pieces)
    table = table.take(pc.array_sort_indices(table[PLACE])).drop_columns([PLACE])
    parts = []
    for start in range(0, len(table), plan.part_rows):
        first = bucket * plan.bucket_rows + start
        path = layout.part_path(split, first // plan.part_rows)
        rows = table.slice(start, plan.part_rows).cast(layout.POINTS)
        parts.append(asdict(layout.write_part(plan.dst, path, first, rows)))
    return {"split": split, "parts": parts}


def _write_labels(plan: Plan, i: int) -> dict[str, Any]:
    index, pieces = plan.labels[i]
    assert plan.num_labels is not None
    first = index * plan.bucket_rows
    size = min(plan.bucket_rows, plan.num_labels - first)
    counts, filters = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
    for piece in pieces:
        found = read_group(plan, *piece)
        at = found["label"].to_numpy() - first
        counts[at] += found["train"].to_numpy()
        filters[at] += found["filter"].to_numpy()
    bands = np.bincount(np.searchsorted(BANDS, counts), minlength=len(BAND_NAMES))
    pairs = np.bincount(np.searchsorted(BANDS, counts), weights=counts, minlength=len(BAND_NAMES))
    totals: Counter[str] = Counter()
    parts, others = [], []
    for start in range(0, size, plan.part_rows):
        stop = min(start + plan.part_rows, size)
        texts = _label_texts(plan, first + start, first + stop)
        columns = {
            "label_id": pa.array(np.arange(first + start, first + stop)),
            "text": texts,
            "input_ids": _encoded(plan, texts),
            "train_count": pa.array(counts[start:stop]),
            "is_point": pa.array(filters[start:stop] > 0),
        }
        table = pa.table(columns, schema=layout.LABELS)
        _add(totals, _text_totals(table, plan.max_length))
        path = layout.part_path("labels", (first + start) // plan.part_rows)
        parts.append(asdict(layout.write_part(plan.dst, path, first + start, table)))
        others.append(int((filters[start:stop] == 0).sum()))
    named = {name: int(n) for name, n in zip(BAND_NAMES, bands, strict=True)}
    weighted = {f"pairs {name}": int(n) for name, n in zip(BAND_NAMES, pairs, strict=True)}
    return {
        "split": "labels",
        "parts": parts,
        "others": others,
        "bands": named | weighted,
        "totals": totals,
    }


def _label_texts(plan: Plan, start: int, stop: int) -> pa.Array:
    """Texts of labels [start, stop): the table's, else the labels themselves, else empty."""
    table = plan.source.labels
    if table is not None and _has_texts(plan.source):
        column = "text" if "text" in table.columns else "label"
        shards = [(block.path, block.group, block.first) for block in table.blocks]
    elif plan.source.labels_are_strings:
        column, shards = "label", list(plan.vocabulary)
    else:
        return pa.array([""] * (stop - start), pa.string())
    ends = [first for _, _, first in shards[1:]] + [plan.num_labels]
    pieces = []
    for (path, group, first), end in zip(shards, ends, strict=True):
        if first < stop and (end or 0) > start:
            texts = read_parquet(path, group, [column])[column]
            lo = max(start - first, 0)
            pieces.append(texts.slice(lo, stop - first - lo).combine_chunks().cast(pa.string()))
    return pc.fill_null(pa.concat_arrays(pieces), "")


def _encoded(plan: Plan, texts: pa.Array) -> pa.Array:
    if _has_texts(plan.source):
        return tokenizer.encode(plan.tokenizer, texts.to_pylist(), plan.max_length)
    (ids,) = tokenizer.encode(plan.tokenizer, [""], plan.max_length).to_pylist()
    offsets = np.arange(len(texts) + 1, dtype=np.int32) * len(ids)
    return pa.ListArray.from_arrays(
        pa.array(offsets), pa.array(np.tile(np.array(ids, np.int32), len(texts)))
    )


# ---------------------------------------------------------------------------------- statistics


def _totals(points: pa.Table, max_length: int) -> dict[str, int]:
    labels = _lengths(points["labels"].combine_chunks())
    return {
        **_text_totals(points, max_length),
        "label_pairs": int(labels.sum()),
        "labels_max": int(labels.max(initial=0)),
        "without_labels": int((labels == 0).sum()),
        "filter_pairs": int(_lengths(points["filter_labels"].combine_chunks()).sum()),
    }


def _text_totals(table: pa.Table, max_length: int) -> dict[str, int]:
    sizes = _lengths(table["input_ids"].combine_chunks())
    return {
        "rows": len(sizes),
        "tokens": int(sizes.sum()),
        "tokens_max": int(sizes.max(initial=0)),
        "at_max_length": int((sizes == max_length).sum()),
    }


def _add(total: Counter[str], more: dict[str, int]) -> None:
    for name, value in more.items():
        total[name] = max(total[name], value) if name.endswith("_max") else total[name] + value


def _statistics(totals: dict[str, Counter[str]], bands: Counter[str]) -> dict[str, Any]:
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
