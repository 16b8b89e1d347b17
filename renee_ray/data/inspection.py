"""Summarises a dataset, and verifies that its files are as they were written.

A few threads read every part once and keep only its counts.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa

from renee_ray.data import tokenizer
from renee_ray.data.dataset import Dataset, DatasetError, Part
from renee_ray.data.rows import list_lengths
from renee_ray.errors import ReneeError, reason

POINT_SPLITS = ("train", "validation", "test")
QUANTILES = (0.5, 0.9, 0.99, 1.0)
SHOWN_LABELS = 10
SHOWN_TEXT, SHOWN_LABEL_TEXT = 400, 80
"""Characters that are shown of a point's text and of a label's."""


def inspect(dataset: Dataset, *, samples: int = 3, verify: bool = False) -> dict[str, Any]:
    """Returns facts of a dataset, fit for JSON.

    Args:
        samples: training points that are shown with their texts.
        verify: read everything and compare checksums; without, a part that cannot be read ends the
            inspection.

    Returns:
        {path, tokenizer, max_length, labels, points, parts, bytes, tokens_a_row, labels_a_point,
        share_of_labels_by_points, share_of_pairs_by_points}, with {samples} unless there are
        problems, and with `verify` {problems: sentences}.

    Raises:
        DatasetError: without `verify`, a part is damaged.
    """
    manifest, problems = dataset.manifest, list(dataset.wrong_files()) if verify else []
    tokens = {split: Counter[int]() for split in manifest.splits}
    labels = {split: Counter[int]() for split in manifest.splits}
    for split, parts in manifest.splits.items():
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for counted, wrong in pool.map(functools.partial(_scan, dataset, verify), parts):
                tokens[split].update(counted[0])
                labels[split].update(counted[1])
                problems += wrong
    facts = _facts(dataset, tokens, labels)
    if not problems:
        facts["samples"] = _samples(dataset, samples)
    return facts | ({"problems": problems} if verify else {})


def _scan(
    dataset: Dataset, verify: bool, part: Part
) -> tuple[tuple[Counter[int], Counter[int]], list[str]]:
    """Returns how many rows of a part have so many tokens, and labels; and what is wrong."""
    problems = []
    try:
        if verify and dataset.checksum(part) != part.sha256:
            where = dataset.where(part.path)
            problems = [f"{where} has bytes that changed: its SHA-256 is not the manifest's"]
        columns = ["input_ids"] if part.path.startswith("labels/") else ["input_ids", "labels"]
        table = dataset.read_part(part, None if verify else columns)
    except (OSError, DatasetError) as error:
        if not verify:
            raise
        return (Counter(), Counter()), [*problems, str(error)]
    return (_counted(table, "input_ids"), _counted(table, "labels")), problems


def _counted(table: pa.Table, name: str) -> Counter[int]:
    """Counts the lists of each length in a column, if it is there."""
    if name not in table.column_names:
        return Counter()
    lengths, counts = np.unique(list_lengths(table[name]), return_counts=True)
    return Counter(dict(zip(lengths.tolist(), counts.tolist(), strict=True)))


def _facts(
    dataset: Dataset, tokens: dict[str, Counter[int]], labels: dict[str, Counter[int]]
) -> dict[str, Any]:
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
        "tokens_a_row": {split: _distribution(counted) for split, counted in tokens.items()},
        "labels_a_point": {split: _distribution(labels[split]) for split in POINT_SPLITS},
        "share_of_labels_by_points": of_labels.get("share_of_labels_by_train_count", {}),
        "share_of_pairs_by_points": of_labels.get("share_of_pairs_by_train_count", {}),
    }


def _distribution(counted: Counter[int]) -> dict[str, Any]:
    """Returns mean, quantiles and a histogram by powers of two of values given by their counts."""
    if not (total := counted.total()):
        return {}
    counts = np.zeros(max(counted) + 1, dtype=np.int64)
    counts[[*counted]] = [*counted.values()]
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
    return [
        {
            "point_id": row["point_id"],
            "text": shortened(text, SHOWN_TEXT),
            "labels": [label_text(dataset, label) for label in row["labels"][:SHOWN_LABELS]],
            "more_labels": max(len(row["labels"]) - SHOWN_LABELS, 0),
        }
        for row, text in zip(rows.to_pylist(), texts_of(dataset, rows), strict=True)
    ]


def texts_of(dataset: Dataset, points: pa.Table) -> list[str]:
    """Decodes the texts of points, where the tokenizer can be had."""
    try:
        # The name comes from the dataset, not from the user, so nothing is fetched.
        found = tokenizer.load(dataset.manifest.tokenizer, fetch=False)
        return tokenizer.decode(found.serialised, points["input_ids"].to_pylist())
    except ReneeError as error:
        return [f"(not decoded: {reason(error)})"] * len(points)


def label_text(dataset: Dataset, label: int) -> str:
    """Returns what is shown of a label: its text, or its number."""
    if label >= dataset.manifest.num_labels:  # it was added since
        return f"label {label}"
    text = dataset.read_rows("labels", label, label + 1, ["text"])["text"][0].as_py()
    return shortened(text, SHOWN_LABEL_TEXT) or f"label {label}"


def shortened(text: str, limit: int) -> str:
    """Cuts a text to about `limit` characters, and then says how long it is."""
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text):,} characters)"
