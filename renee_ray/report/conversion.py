"""The result of `renee-ray convert`, for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import RenderableType, group
from rich.table import Column, Table
from rich.text import Text

from renee_ray.errors import printable

SHOWN = ("points", "tokens_mean", "tokens_max", "at_max_length", "labels_mean", "labels_max")
EXPECTED = {*SHOWN, "label_pairs", "filter_pairs", "least_id", "greatest_id"}
"""Ordinary counts; any other one is a repair, or something to look at."""


@group()
def conversion_text(facts: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Shows a table of the splits, oddities of the source, and hints.

    facts: `dataset`, `labels`, `statistics` by split as in dataset.json, `hints`.
    """
    names = ("points", "tokens:\nmean", "\nmost", "\nat limit", "labels:\nmean", "\nmost")
    title = Text(printable(f"{facts['dataset']}: {facts['labels']:,} labels"))
    table = Table("", *(Column(name, justify="right") for name in names), title=title)
    odd = []
    for split, counts in facts["statistics"].items():
        table.add_row(split, *(f"{counts[key]:,}" if key in counts else "" for key in SHOWN))
        odd += [
            f"{split}: {count:,} {name.replace('_', ' ')}"
            for name, count in counts.items()
            if name not in EXPECTED and isinstance(count, int) and count
        ]
    yield table
    for line in [*odd, *facts["hints"]]:
        yield Text(printable(line))
