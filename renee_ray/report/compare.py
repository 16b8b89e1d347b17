"""The page and the terminal's text of a comparison of runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import RenderableType, group
from rich.table import Table
from rich.text import Text

from renee_ray.errors import printable
from renee_ray.report.charts import Chart, chart, lines_of
from renee_ray.report.page import write_page


def write_comparison(
    path: str, facts: Mapping[str, Any], histories: Mapping[str, Mapping[str, Any]]
) -> None:
    """Writes what `service.score.compare` found, and each run's history.json, as a page."""
    write_page(
        path,
        "compare.html.j2",
        title=f"{', '.join(facts['models'][:-1])} and {facts['models'][-1]}",
        facts=facts,
        verdicts=verdicts(facts),
        charts=[each for each in _curves(histories) if each],
        cell=cell,
    )


def verdicts(facts: Mapping[str, Any]) -> list[str]:
    """Says in a sentence for each model but the first whether it differs from the first."""
    first = facts["models"][0]
    return [
        f"{name} differs from {first} in {', '.join(metrics)}."
        if metrics
        else f"{name} does not differ from {first} in any metric, as far as these points can tell."
        for name, metrics in facts["differ"].items()
    ]


def cell(entry: Mapping[str, float], first: bool) -> str:
    """Formats a value with its interval; for others than the first, with the difference's."""
    if first:
        return f"{entry['value']:.1f} ({entry['low']:.1f} to {entry['high']:.1f})"
    low, high = entry["difference_low"], entry["difference_high"]
    return f"{entry['value']:.1f} ({low:+.1f} to {high:+.1f})"


@group()
def comparison_text(facts: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Shows a comparison for a terminal; what differs is bold."""
    names = facts["models"]
    table = Table(
        title=f"{facts['points']:,} points: percent, and 95% intervals of {names[0]} and of the "
        f"differences to it",
        title_justify="left",
    )
    for i, name in enumerate(("", *names)):
        table.add_column(Text(printable(name)), justify="right" if i else "left")
    for metric, entries in facts["metrics"].items():
        style = [metric in facts["differ"].get(name, ()) for name in names]
        cells = [
            Text(cell(entry, not i), style="bold green" if style[i] else "")
            for i, entry in enumerate(entries)
        ]
        table.add_row(metric, *cells)
    yield table
    settings = Table(title="Settings that differ", title_justify="left")
    for name in ("", *names):
        settings.add_column(Text(printable(name)))
    for key, values in facts["settings"].items():
        settings.add_row(key, *(Text(printable(str(value))) for value in values))
    if facts["settings"]:
        yield settings
    yield from (Text(printable(sentence)) for sentence in verdicts(facts))


def _curves(histories: Mapping[str, Mapping[str, Any]]) -> list[Chart | None]:
    def drawn(title: str, unit: str, kind: str, key: str, **how: Any) -> Chart | None:
        lines = [
            line._replace(label=name)
            for name, history in histories.items()
            for line in lines_of(
                [{**e, **e.get("metrics", {})} for e in history.get(kind, ())], key, over="epoch"
            )
        ]
        return chart(title, unit, lines, over="epoch", **how)

    return [
        drawn("P@1 on validation", "%", "evals", "P@1", dots=True),
        drawn("PSP@5 on validation", "%", "evals", "PSP@5", dots=True),
        drawn("Training loss", "loss", "steps", "loss"),
        drawn("Throughput", "rows/s", "steps", "rows_per_second", zero=True),
    ]
