"""The report of an index: the sweep of its search effort as a plot and as a table."""

from __future__ import annotations

import io
from typing import Any

from rich.table import Table

from renee_ray.errors import ReneeError, reason

SPEED = "queries/s one core"


def draw_sweep(facts: dict[str, Any]) -> bytes:
    """Draws recall over queries a second, for `sweep` and `exact` of index.json; a PNG file.

    Raises:
        ReneeError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ReneeError(
            f"the plot of an index needs matplotlib ({reason(error):.80}); "
            f"pip install 'renee_ray[index]'"
        ) from error
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.add_subplot()
    sweep = facts["sweep"]
    speeds = [row[SPEED] for row in sweep]
    for key in (key for key in sweep[0] if key.startswith("recall")):
        axes.plot(speeds, [row[key] for row in sweep], marker="o", ms=4, label=key)
    axes.axhline(facts["recall"], color="grey", lw=0.8, ls=":", label="asked for, at 10")
    axes.axvline(facts["exact"][SPEED], color="black", lw=0.8, ls="--", label="exact search")
    for row in sweep:
        at = row[SPEED], min(value for key, value in row.items() if key.startswith("recall"))
        weight = "bold" if row["effort"] == facts["effort"] else "normal"
        axes.annotate(
            str(row["effort"]), at, (0, -14), textcoords="offset points", ha="center",
            fontsize=8, weight=weight,
        )  # fmt: skip
    axes.margins(y=0.12)
    axes.set_xscale("log")
    axes.set_xlabel("queries a second, one core")
    axes.set_ylabel("recall of the exact k best")
    axes.set_title(f"{facts['factory']}, {facts['num_labels']:,} labels, by {facts['effort_name']}")
    axes.grid(lw=0.4)
    axes.legend(frameon=False, fontsize=8)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150)
    return out.getvalue()


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
        table.add_column(name.replace("queries", "q").replace("recall", "R"), justify="right")
    table.add_row("exact", *(f"{exact[key]:g}" if key in exact else "" for key in columns))
    for row in facts["sweep"]:
        mark = "* " if row["effort"] == facts["effort"] else ""
        table.add_row(f"{mark}{row['effort']}", *(f"{row[key]:g}" for key in columns))
    return table
