"""The page and the terminal's text of a search for settings, as service/tune.py returns it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from renee_ray.errors import printable
from renee_ray.report.charts import MAX_LINES, Line, chart, lines_of
from renee_ray.report.page import write_page


def write_tuning(path: str, facts: Mapping[str, Any]) -> None:
    """Writes a page: all trials, the curves of the best, and the metric over each setting."""
    told = [(i, each) for i, each in enumerate(facts["trials"]) if each["results"]]
    told.sort(key=lambda each: (each[0] != facts["best"], -each[1]["value"]))
    lines: list[Line] = []
    for i, each in told[:MAX_LINES]:
        renamed = [{**result, f"trial {i}": result["value"]} for result in each["results"]]
        lines += lines_of(renamed, f"trial {i}", over="epoch")
    curve = chart(f"{facts['metric']} on validation", "%", lines, over="epoch", dots=True)
    panels = {key: [each["settings"][key] for _, each in told] for key in facts["space"]}
    write_page(
        path, "tuning.html.j2", facts=facts,
        title=f"Trial {facts['best']} of {len(facts['trials'])} is the best",
        curve=curve, told=told, panels=panels, shown=_shown, ranks=_ranks,
    )  # fmt: skip


def tuning_text(facts: Mapping[str, Any]) -> Table:
    """Shows a search for a terminal; the best trial is bold."""
    best = f"best: {printable(facts['yaml'])}\n"
    best += "(trial 0, unless another is ahead by a standard error)"
    table = Table("trial", "state", facts["metric"], "settings", caption=Text(best))
    for i, trial in enumerate(facts["trials"]):
        settings = " ".join(f"{key}={_shown(value)}" for key, value in trial["settings"].items())
        style = "bold green" if i == facts["best"] else ""
        cells = Text(printable(settings))
        table.add_row(str(i), trial["state"], _shown(trial["value"]), cells, style=style)
    return table


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _ranks(values: list[Any]) -> list[float]:
    """Returns the place of each value among all in order, in [0, 1]: numbers first, then others."""
    keys = [(0, v, "") if isinstance(v, int | float) else (1, 0, repr(v)) for v in values]
    order = sorted(set(keys))
    return [(order.index(each) + 0.5) / len(order) for each in keys]
