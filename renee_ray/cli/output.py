"""Output of commands: sentences to standard error, results to standard output."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import click
from rich.console import Console, RenderableType
from rich.table import Column, Table
from rich.text import Text

from renee_ray.config.overrides import dotted
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
    flat = {key.removeprefix("metrics."): value for key, value in dotted(content)}
    if metrics := {k: v for k, v in flat.items() if "@" in k}:
        Console().print(_metric_table(metrics, title))
    for key, value in flat.items():
        if key not in metrics:
            shown = f"{value:.6g}" if isinstance(value, float) else value
            click.echo(printable(f"{key:28} {shown}"))


def _metric_table(metrics: dict[str, float], title: str) -> Table:
    families = list(dict.fromkeys(name.partition("@")[0] for name in metrics))
    ks = sorted({int(name.partition("@")[2]) for name in metrics})
    columns = (Column(f"@{k}", justify="right") for k in ks)
    table = Table("", *columns, title=Text(printable(title)))
    for family in families:
        cells = (metrics.get(f"{family}@{k}") for k in ks)
        table.add_row(family, *("" if v is None else f"{v:.2f}" for v in cells))
    return table
