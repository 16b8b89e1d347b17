"""Output of commands: sentences to standard error, results to standard output."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import click
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from renee_ray.errors import printable, redacted

progress = Console(stderr=True)


def say(text: str, style: str | None = None) -> None:
    """Writes a sentence to standard error, on one line however narrow the terminal."""
    shown = printable(redacted(text))
    progress.print(shown, style=style, markup=False, highlight=False, soft_wrap=True)


def print_facts(
    facts: dict[str, Any], as_json: bool, shown: Callable[[dict[str, Any]], RenderableType]
) -> None:
    """Writes facts to standard output: one JSON object, or `shown(facts)`, which is for people."""
    if as_json:
        click.echo(json.dumps(facts))
    else:
        Console().print(shown(facts), highlight=False)


def print_result(content: dict[str, Any], as_json: bool, title: str) -> None:
    """Writes a result to standard output: one JSON object, or a table and lines."""
    if as_json:
        click.echo(json.dumps(content))
        return
    flat = dict(_flatten(content))
    metrics = {k: v for k, v in flat.items() if "@" in k}
    if metrics:
        Console().print(_metric_table(metrics, title))
    rest = {k: v for k, v in flat.items() if k not in metrics}
    for key, value in rest.items():
        click.echo(printable(f"{key:28} {value}"))


def _flatten(content: dict[str, Any], prefix: str = "") -> Any:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flatten(value, "" if key in ("metrics",) else f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _metric_table(metrics: dict[str, float], title: str) -> Table:
    families = list(dict.fromkeys(name.partition("@")[0] for name in metrics))
    ks = sorted({int(name.partition("@")[2]) for name in metrics})
    table = Table(title=Text(printable(title)))
    table.add_column("")
    for k in ks:
        table.add_column(f"@{k}", justify="right")
    for family in families:
        cells = (metrics.get(f"{family}@{k}") for k in ks)
        table.add_row(family, *("" if v is None else f"{v:.2f}" for v in cells))
    return table
