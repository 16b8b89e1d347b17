"""The report of an index: the sweep of its search effort as a page and as a table."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from renee_ray.report.charts import chart, lines_of
from renee_ray.report.page import write_page

SPEED = "queries/s one core"


def write_sweep(path: str, facts: dict[str, Any]) -> None:
    """Writes the `sweep` of index.json, recall over the time of a query, as a page."""
    over = "ms a query, one core"
    sweep = [{**row, over: 1000 / row[SPEED]} for row in facts["sweep"]]
    keys = [key for key in sweep[0] if key not in ("effort", over)]
    recall = [key for key in keys if key.startswith("recall")]
    drawn = chart(
        "Recall of the exact k best", "share", lines_of(sweep, *recall, over=over), over=over,
        dots=True,
    )  # fmt: skip
    flat = facts["effort_name"] == "none"
    names = ["exact", *("index" if flat else str(row["effort"]) for row in sweep)]
    rows = [
        (name, *(f"{row[key]:g}" if key in row else "" for key in keys))
        for name, row in zip(names, [facts["exact"], *sweep], strict=True)
    ]
    write_page(
        path, "index.html.j2", charts=[drawn], rows=rows, facts=facts,
        header=["search" if flat else facts["effort_name"], *keys],
        title=f"{facts['factory']}, {facts['num_labels']:,} labels",
    )  # fmt: skip


def sweep_table(facts: dict[str, Any]) -> Table:
    """Shows an index for a terminal; the effort that is kept has a star."""
    ranges, exact = facts["ranges"], facts["exact"]
    size = sum(each["bytes"] for each in ranges) / facts["num_labels"]
    seconds = sum(each["seconds"] for each in ranges)
    table = Table(
        title=f"{facts['factory']}: {facts['num_labels']:,} labels in {len(ranges)} ranges",
        caption=f"{size:.0f} bytes a label, built in {seconds:.0f} s",
    )
    columns = [key for key in facts["sweep"][0] if key != "effort"]
    for name in (facts["effort_name"], *columns):
        table.add_column(
            name.replace("queries", "q").replace("recall", "R").replace("candidates", "c"),
            justify="right",
        )
    table.add_row("exact", *(f"{exact[key]:g}" if key in exact else "" for key in columns))
    for row in facts["sweep"]:
        kept = all(row[key] == facts[key] for key in ("effort", "candidates"))
        mark = "* " if kept else ""
        table.add_row(f"{mark}{row['effort']}", *(f"{row[key]:g}" for key in columns))
    return table
