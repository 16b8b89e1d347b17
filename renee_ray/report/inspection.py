"""What `convert` has made and what `inspect` finds of a dataset, for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import RenderableType, group
from rich.table import Column, Table
from rich.text import Text

from renee_ray.errors import printable

BAR = 40
"""Characters of the longest bar of a histogram."""


@group()
def inspection_text(facts: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Shows the facts of `data.inspection.inspect`."""
    yield Text(
        printable(
            f"{facts['path']}: {facts['labels']:,} labels, {facts['bytes'] / 2**20:,.1f} MiB, "
            f"{facts['tokenizer']}, at most {facts['max_length']} tokens"
        )
    )
    yield _rows(facts)
    tokens = facts["tokens_a_row"]["train"].get("histogram", {})
    yield _histogram("Tokens of a training point", tokens)
    labels = facts["labels_a_point"]["train"].get("histogram", {})
    yield _histogram("Labels of a training point", labels)
    if facts["share_of_labels_by_points"]:
        yield _tail(facts)
    yield Text()
    for sample in facts.get("samples", []):
        yield Text(printable(f"{sample['point_id']}: {sample['text']}"), style="bold")
        more = f" and {sample['more_labels']} more" if sample["more_labels"] else ""
        labels = printable("; ".join(sample["labels"])) or "no labels"
        yield Text(f"    {labels}{more}", style="dim")
    if "problems" in facts:
        found = map(printable, facts["problems"]) if facts["problems"] else ["verified"]
        yield Text("\n".join(["", *found]))


def _rows(facts: Mapping[str, Any]) -> Table:
    names = ("rows", "parts", "tokens:\nmedian", "\n99%", "\nmost", "labels:\nmean", "\nmost")
    table = Table("", *(Column(name, justify="right") for name in names))
    for split, tokens in facts["tokens_a_row"].items():
        labels = facts["labels_a_point"].get(split, {})
        rows = facts["points"].get(split, facts["labels"])
        cells = [tokens.get(key, "") for key in ("p50", "p99", "p100")]
        cells += [labels.get(key, "") for key in ("mean", "p100")]
        table.add_row(split, f"{rows:,}", str(facts["parts"][split]), *map(str, cells))
    return table


def _histogram(title: str, counts: Mapping[str, int]) -> Table:
    table = Table(title=title, title_justify="left", box=None, show_header=False)
    most, total = max(counts.values(), default=1), sum(counts.values())
    for name, rows in counts.items():
        bar = "█" * max(1, round(BAR * rows / most))
        table.add_row(name, f"{rows:,}", f"{rows / total:.1%}", bar)
    return table


def _tail(facts: Mapping[str, Any]) -> Table:
    names = ("points", "of labels", "of (point, label) pairs")
    columns = (Column(name, justify="right") for name in names)
    table = Table(*columns, title="By training points of a label", title_justify="left", box=None)
    pairs = facts["share_of_pairs_by_points"]
    for name, share in facts["share_of_labels_by_points"].items():
        table.add_row(Text(printable(name)), f"{share:.1%}", f"{pairs[name]:.1%}")
    return table


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
