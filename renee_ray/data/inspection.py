"""Summarises a dataset, and verifies it against its manifest and schemas.

A few threads read every part once and keep only its counts. Checks between parts compare sums
that do not depend on order: of hashed point ids, and of hashed labels over all (point, label)
pairs. So no list of points and no count for each label is kept. The only array over labels has a
byte for each, for `is_point`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from renee_ray.data import tokenizer
from renee_ray.data.dataset import (
    MANIFEST,
    Dataset,
    DatasetError,
    add_hashes,
    hash_labels,
    schema_of,
)
from renee_ray.data.rows import list_lengths
from renee_ray.data.split import splitmix64
from renee_ray.errors import ReneeError, reason

POINT_SPLITS = ("train", "validation", "test")
QUANTILES = (0.5, 0.9, 0.99, 1.0)
SHOWN_LABELS = 10
SHOWN_TEXT, SHOWN_LABEL_TEXT = 400, 80
"""Characters that are shown of a point's text and of a label's."""


@dataclass
class _Counts:
    rows: int = 0
    tokens: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """int64 [n]: rows of each length."""
    labels: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """int64 [n]: points of each number of labels."""
    ids: int = 0
    """Sum of the hashed point ids, modulo 2**64."""
    pairs: int = 0
    """Sum of the hashed label over (point, label) pairs, modulo 2**64; labels: by train_count."""
    labels_hash: str = "0"
    problems: list[str] = field(default_factory=list)

    def add(self, other: _Counts) -> None:
        self.rows += other.rows
        self.tokens = _added(self.tokens, other.tokens)
        self.labels = _added(self.labels, other.labels)
        self.ids = (self.ids + other.ids) % 2**64
        self.pairs = (self.pairs + other.pairs) % 2**64
        self.labels_hash = add_hashes([self.labels_hash, other.labels_hash])
        self.problems += other.problems


def inspect(dataset: Dataset, *, samples: int = 3, verify: bool = False) -> dict[str, Any]:
    """Returns facts of a dataset, fit for JSON.

    Args:
        samples: training points that are shown with their texts.
        verify: read everything, checksums included, and check every invariant; without, a
            part that cannot be read ends the inspection.

    Returns:
        {path, tokenizer, max_length, labels, points, parts, bytes, tokens_a_row, labels_a_point,
        share_of_labels_by_points, share_of_pairs_by_points}, with {samples} unless there are
        problems, and with `verify` {problems: sentences}.

    Raises:
        DatasetError: without `verify`, a part is damaged.
    """
    is_point = np.zeros(dataset.manifest.num_labels if verify else 0, dtype=bool)
    problems = list(dataset.wrong_files()) if verify else []
    counts = {}
    for split in (*POINT_SPLITS, "labels"):  # labels last: they are compared with is_point
        counts[split] = _Counts()
        indices = range(len(dataset.manifest.splits[split]))
        scan = functools.partial(_scan, dataset, split, verify=verify, is_point=is_point)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for each in pool.map(scan, indices):
                counts[split].add(each)
        problems += counts[split].problems
        if problems:  # filter labels may be unknown, so is_point can't be checked against them
            is_point = is_point[:0]
    if verify:
        problems += _between_parts(dataset, counts)
    facts = _facts(dataset, counts)
    if not problems:
        facts["samples"] = _samples(dataset, samples)
    return facts | ({"problems": problems} if verify else {})


# ---------------------------------------------------------------------------------------- scan


def _scan(
    dataset: Dataset, split: str, index: int, verify: bool, is_point: NDArray[np.bool_]
) -> _Counts:
    part = dataset.manifest.splits[split][index]
    if not verify:
        columns = ["input_ids"] if split == "labels" else ["input_ids", "labels"]
        return _count(dataset.read_part(part, columns))
    try:
        changed = dataset.checksum(part) != part.sha256
    except OSError:
        changed = False  # reading it says why
    counts = _Counts()
    where = dataset.where(part.path)
    if changed:
        counts.problems.append(f"{where} has bytes that changed: its SHA-256 is not the manifest's")
    try:
        table = dataset.read_part(part, check=False)
    except DatasetError as error:
        counts.problems.append(str(error))
        return counts
    if not table.schema.equals(schema_of(split)):
        counts.problems.append(f"{where} has the columns {_named(table.schema)}")
        return counts
    if nulls := [name for name in table.column_names if _has_nulls(table[name])]:
        counts.problems.append(f"{where} has nulls in {nulls[0]}")
        return counts
    counts.add(_count(table))
    check = _label_problems if split == "labels" else _point_problems
    for problem in check(dataset, split, index, table, is_point):
        counts.problems.append(f"{where} {problem}")
    if split == "labels":
        train_counts = table["train_count"].to_numpy().astype(np.uint64)
        counts.pairs = _wrapped(_hash(table["label_id"].to_numpy()) * train_counts)
        counts.labels_hash = hash_labels(part.first, table["text"])
    else:
        counts.ids = _wrapped(_hash(table["point_id"].to_numpy()))
        counts.pairs = _wrapped(_hash(pc.list_flatten(table["labels"]).to_numpy()))
    return counts


def _count(table: pa.Table) -> _Counts:
    counts = _Counts(len(table), np.bincount(list_lengths(table["input_ids"])))
    if "labels" in table.column_names:
        counts.labels = np.bincount(list_lengths(table["labels"]))
    return counts


def _point_problems(
    dataset: Dataset, split: str, index: int, table: pa.Table, is_point: NDArray[np.bool_]
) -> Iterator[str]:
    num_labels = dataset.manifest.num_labels
    yield from _token_problems(dataset, table)
    ids = table["point_id"].to_numpy()
    if split != "train":
        yield from _rows_where(np.diff(ids, prepend=-1) <= 0, ids, "point_id", "not ascending")
    for name in ("labels", "filter_labels"):
        rows = pc.list_parent_indices(table[name]).to_numpy()
        labels = pc.list_flatten(table[name]).to_numpy()
        outside = (labels < 0) | (labels >= num_labels)
        yield from _rows_where(outside, labels, name, f"not in [0, {num_labels})", rows)
        same_row = np.diff(rows, prepend=-1) == 0
        unsorted = same_row & (np.diff(labels, prepend=0) <= 0)
        yield from _rows_where(unsorted, labels, name, "not above the one before", rows)
        if split == "train" and name == "filter_labels" and len(is_point):
            is_point[labels[~outside]] = True


def _label_problems(
    dataset: Dataset, split: str, index: int, table: pa.Table, is_point: NDArray[np.bool_]
) -> Iterator[str]:
    manifest = dataset.manifest
    part, other_texts = manifest.splits[split][index], manifest.other_texts[index]
    yield from _token_problems(dataset, table)
    ids, counts = table["label_id"].to_numpy(), table["train_count"].to_numpy()
    numbers = np.arange(part.first, part.first + len(ids))
    yield from _rows_where(ids != numbers, ids, "label_id", "not its row")
    yield from _rows_where(counts < 0, counts, "train_count", "negative")
    flags = table["is_point"].to_numpy()
    if len(is_point):
        yield from _rows_where(
            flags != is_point[numbers], flags, "is_point", "not what the filter labels of train say"
        )
    if int((~flags).sum()) != other_texts:
        yield (
            f"has {int((~flags).sum())} labels that are no points and the manifest says "
            f"{other_texts}"
        )


def _token_problems(dataset: Dataset, table: pa.Table) -> Iterator[str]:
    longest = dataset.manifest.max_length
    sizes = list_lengths(table["input_ids"])
    wrong = (sizes == 0) | (sizes > longest)
    yield from _rows_where(wrong, sizes, "tokens", f"not in [1, {longest}]")
    rows = pc.list_parent_indices(table["input_ids"]).to_numpy()
    ids = pc.list_flatten(table["input_ids"]).to_numpy()
    yield from _rows_where(ids < 0, ids, "input_ids", "negative", rows)


def _rows_where(
    wrong: NDArray[np.bool_],
    values: NDArray[Any],
    name: str,
    what: str,
    rows: NDArray[np.int64] | None = None,
) -> Iterator[str]:
    """Yields a sentence on the first place of `wrong` and the number of others, if there is one."""
    places = np.flatnonzero(wrong)
    if len(places) == 0:
        return
    first = places[0]
    row = first if rows is None else rows[first]
    more = f" (and {len(places) - 1} more)" if len(places) > 1 else ""
    yield f"row {row}: {name} holds {values[first]}, {what}{more}"


# ------------------------------------------------------------------------------- between parts


def _between_parts(dataset: Dataset, counts: dict[str, _Counts]) -> Iterator[str]:
    """Yields problems that only all parts together show; none where a part could not be read."""
    if any(len(counts[s].problems) or counts[s].rows != dataset.manifest.num_points(s)
           for s in counts):  # fmt: skip
        return
    train, validation = counts["train"], counts["validation"]
    points = train.rows + validation.rows
    test = counts["test"]
    held = (train.ids + validation.ids + test.ids) % 2**64 == _ids_below(points + test.rows)
    if not held and test.ids != _ids_below(test.rows):
        yield f"{dataset.path}: the ids of test are not each of [0, {test.rows}) once"
    if not held and (train.ids + validation.ids) % 2**64 != _ids_below(points):
        yield (
            f"{dataset.path}: the ids of train and validation are not each of [0, {points}) once"
        )
    if (train.pairs + validation.pairs) % 2**64 != counts["labels"].pairs:
        yield (
            f"{dataset.path}: train_count of some label is not its number of points in train and "
            f"validation"
        )
    if dataset.manifest.labels_hash != counts["labels"].labels_hash:
        yield f"{dataset.where(MANIFEST)} has a labels_hash that is not that of the label texts"


def _ids_below(n: int) -> int:
    """Sums the hashes of [0, n), modulo 2**64."""
    block = 2**20
    return sum(_wrapped(_hash(np.arange(i, min(i + block, n)))) for i in range(0, n, block)) % 2**64


def _hash(ids: NDArray[np.int64]) -> NDArray[np.uint64]:
    return splitmix64(ids.astype(np.uint64))


def _wrapped(values: NDArray[np.uint64]) -> int:
    return int(values.sum(dtype=np.uint64))


# --------------------------------------------------------------------------------------- facts


def _facts(dataset: Dataset, counts: dict[str, _Counts]) -> dict[str, Any]:
    manifest = dataset.manifest
    of_labels = manifest.statistics.get("labels", {})
    return {
        "path": dataset.path,
        "tokenizer": manifest.tokenizer,
        "max_length": manifest.max_length,
        "labels": manifest.num_labels,
        "points": {split: manifest.num_points(split) for split in POINT_SPLITS},
        "parts": {split: len(parts) for split, parts in manifest.splits.items()},
        "bytes": sum(part.size for parts in manifest.splits.values() for part in parts),
        "tokens_a_row": {split: _distribution(counts[split].tokens) for split in counts},
        "labels_a_point": {s: _distribution(counts[s].labels) for s in POINT_SPLITS},
        "share_of_labels_by_points": of_labels.get("share_of_labels_by_train_count", {}),
        "share_of_pairs_by_points": of_labels.get("share_of_pairs_by_train_count", {}),
    }


def _distribution(counts: NDArray[np.int64]) -> dict[str, Any]:
    """Returns mean, quantiles and a histogram by powers of two of values given by their counts."""
    total = int(counts.sum())
    if total == 0:
        return {}
    reached = np.cumsum(counts) / total
    quantiles = {f"p{round(q * 100)}": int(np.searchsorted(reached, q - 1e-12)) for q in QUANTILES}
    histogram, low = {}, 0
    while low < len(counts):
        high = max(2 * low - 1, 0) if low else 0
        name = str(low) if high <= low else f"{low}-{high}"
        if rows := int(counts[low : high + 1].sum()):
            histogram[name] = rows
        low = high + 1
    mean = float(counts @ np.arange(len(counts))) / total
    return {"mean": round(mean, 2), **quantiles, "histogram": histogram}


def _samples(dataset: Dataset, samples: int) -> list[dict[str, Any]]:
    """Returns the first training points, decoded where the tokenizer can be had."""
    rows = dataset.read_rows("train", 0, min(samples, dataset.manifest.num_points("train")))
    try:
        # The name comes from the dataset, not from the user, so nothing is fetched.
        found = tokenizer.load(dataset.manifest.tokenizer, fetch=False)
        decoded = tokenizer.decode(found.serialised, rows["input_ids"].to_pylist())
    except ReneeError as error:
        decoded = [f"(not decoded: {reason(error)})"] * len(rows)
    return [
        {
            "point_id": row["point_id"],
            "text": shortened(text, SHOWN_TEXT),
            "labels": [_label_text(dataset, label) for label in row["labels"][:SHOWN_LABELS]],
            "more_labels": max(len(row["labels"]) - SHOWN_LABELS, 0),
        }
        for row, text in zip(rows.to_pylist(), decoded, strict=True)
    ]


def _label_text(dataset: Dataset, label: int) -> str:
    text = dataset.read_rows("labels", label, label + 1, ["text"])["text"][0].as_py()
    return shortened(text, SHOWN_LABEL_TEXT) or f"label {label}"


def shortened(text: str, limit: int) -> str:
    """Cuts a text to about `limit` characters, and then says how long it is."""
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text):,} characters)"


def _has_nulls(column: pa.ChunkedArray) -> bool:
    inside = pc.list_flatten(column).null_count if pa.types.is_list(column.type) else 0
    return column.null_count + inside > 0


def _added(a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.int64]:
    out = np.zeros(max(len(a), len(b)), dtype=np.int64)
    out[: len(a)] += a
    out[: len(b)] += b
    return out


def _named(schema: pa.Schema) -> str:
    return ", ".join(f"{each.name} {each.type}" for each in schema)
