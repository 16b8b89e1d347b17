"""The page and the terminal's text of a search for settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from renee_ray.errors import printable
from renee_ray.report.run import SERIES, Line, chart, write_page


def write_tuning(path: str, facts: Mapping[str, Any]) -> None:
    """Writes what `service.tune.tune` found as a page: all trials, curves, value by setting."""
    curve = chart(f"{facts['metric']} on validation", "%", _curves(facts), mark=True)
    write_page(
        path,
        "tuning.html.j2",
        facts=facts,
        rows=_rows(facts),
        curve=curve,
        panels=[_panel(facts, key) for key in facts["space"]],
    )


def tuning_text(facts: Mapping[str, Any]) -> RenderableType:
    """Shows a search for a terminal; the best trial is bold, its changed settings below."""
    rows = _rows(facts)
    table = Table(
        title=f"{facts['metric']} of {facts['points']:,} validation points, percent",
        title_justify="left",
    )
    for name in ("trial", "state", "epochs", facts["metric"]):
        table.add_column(name, justify="left" if name == "state" else "right")
    for row in rows:
        style = "bold green" if row["best"] else ""
        table.add_row(
            *(Text(row[name], style=style) for name in ("name", "state", "epochs", "value"))
        )
    best = rows[[row["best"] for row in rows].index(True)]
    lines = [f"  {key}={text}" for key, text in best["settings"].items()]
    return Group(
        table, Text(printable("\n".join([f"trial {best['name']}:", *lines]))),
        Text(printable(f"best: {facts['yaml']}\nreport: {facts['report']}")),
    )  # fmt: skip


def _rows(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the cells of each trial, in the order of their numbers."""
    return [
        {
            "name": str(i),
            "best": i == facts["best"],
            "state": trial["state"],
            "reason": trial["reason"],
            "epochs": f"{trial['results'][-1]['epoch']:.1f}" if trial["results"] else "",
            "value": "" if trial["value"] is None else f"{trial['value']:.2f}",
            "settings": {key: _shown(value) for key, value in trial["settings"].items()},
        }
        for i, trial in enumerate(facts["trials"])
    ]


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _curves(facts: Mapping[str, Any]) -> list[Line]:
    """Returns the curves of the best trials, as many as a chart has lines for."""
    trials = list(enumerate(facts["trials"]))
    trials.sort(key=lambda each: (each[0] != facts["best"], -(each[1]["value"] or 0)))
    return [
        Line(
            f"trial {i}",
            np.array([result["epoch"] for result in trial["results"]]),
            np.array([result["value"] for result in trial["results"]]),
        )
        for i, trial in trials[: len(SERIES)]
        if trial["results"]
    ]


def _panel(facts: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Returns the dots of a chart of the metric over a setting; x and y are shares of its axes."""
    trials = [(i, each) for i, each in enumerate(facts["trials"]) if each["value"] is not None]
    values = [each["settings"][key] for _, each in trials]
    numeric = all(isinstance(each, int | float) for each in values)
    ticks = sorted(set(values)) if numeric else list(dict.fromkeys(values))
    log = key in facts["log"]
    places = [
        (math.log(value) if log else value) if numeric else ticks.index(value) for value in values
    ]
    heights = [each["value"] for _, each in trials]
    return {
        "key": key,
        "low": _shown(ticks[0]),
        "high": _shown(ticks[-1]),
        "bottom": f"{min(heights):.1f}",
        "top": f"{max(heights):.1f}",
        "dots": [
            {
                "x": x, "y": y, "best": i == facts["best"],
                "finished": trial["state"] == "finished",
                "title": f"trial {i}, {trial['state']}: {_shown(trial['settings'][key])}, "
                f"{facts['metric']} {trial['value']:.2f}",
            }
            for (i, trial), x, y in zip(trials, _shares(places), _shares(heights), strict=True)
        ],
    }  # fmt: skip


def _shares(values: list[Any]) -> list[float]:
    """Maps numbers to [0, 1]; to the middle where all are equal."""
    low, high = min(values), max(values)
    return [(value - low) / (high - low) if high > low else 0.5 for value in values]
