"""The statistics of a conversion, which the manifest keeps for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from renee_ray.data.rows import list_lengths
from renee_ray.data.sources.records import Int64s

BANDS = (0, 1, 5, 20, 100)
BAND_NAMES = ("0", "1", "2-5", "6-20", "21-100", ">100")


def totals_of(points: pa.Table, max_length: int) -> dict[str, int]:
    """Counts some points of a split."""
    labels = list_lengths(points["labels"])
    return {
        **text_totals(points, max_length),
        "label_pairs": int(labels.sum()),
        "labels_max": int(labels.max(initial=0)),
        "without_labels": int((labels == 0).sum()),
        "filter_pairs": int(list_lengths(points["filter_labels"]).sum()),
    }


def text_totals(table: pa.Table, max_length: int) -> dict[str, int]:
    """Counts some texts."""
    sizes = list_lengths(table["input_ids"])
    return {
        "rows": len(sizes),
        "tokens": int(sizes.sum()),
        "tokens_max": int(sizes.max(initial=0)),
        "at_max_length": int((sizes == max_length).sum()),
    }


def add(total: Counter[str], more: Mapping[str, int]) -> None:
    """Adds counts to a total; of those named *_max the greater one remains."""
    for name, value in more.items():
        total[name] = max(total[name], value) if name.endswith("_max") else total[name] + value


def bands_of(counts: Int64s) -> dict[str, int]:
    """Counts labels, and pairs with them, in each band of training points a label (`counts`)."""
    bands = np.searchsorted(BANDS, counts)
    labels = np.bincount(bands, minlength=len(BAND_NAMES))
    pairs = np.bincount(bands, weights=counts, minlength=len(BAND_NAMES))
    named = {name: int(n) for name, n in zip(BAND_NAMES, labels, strict=True)}
    return named | {f"pairs {name}": int(n) for name, n in zip(BAND_NAMES, pairs, strict=True)}


def statistics_of(totals: dict[str, Counter[str]], bands: Counter[str]) -> dict[str, Any]:
    """Makes the statistics of a manifest of the totals of each split and of the labels.

    What was odd in the lines or rows of train (duplicate_pairs, zero_values, empty_texts,
    replaced_lines, replaced_bytes) is of its whole source, the points held out for validation
    included. least_id and greatest_id are of the labels that some point has.
    """
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
