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
    sweep, name = facts["sweep"], facts["effort_name"]
    speeds = [row[SPEED] for row in sweep]
    for key in (key for key in sweep[0] if key.startswith("recall")):
        axes.plot(speeds, [row[key] for row in sweep], marker="o", ms=4, label=key)
    axes.axhline(facts["recall"], color="grey", lw=0.8, ls=":", label="asked for, at 10")
    axes.axvline(facts["exact"][SPEED], color="black", lw=0.8, ls="--", label="exact search")
    for row in sweep:
        kept = row["effort"] == facts["effort"]
        axes.annotate(
            f"{name} {row['effort']}" if kept else str(row["effort"]),
            (row[SPEED], row["recall@10" if "recall@10" in row else "recall@1"]),
            xytext=(0, -14), textcoords="offset points", ha="center", fontsize=8,
            weight="bold" if kept else "normal",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("queries a second, one core")
    axes.set_ylabel("recall of the exact k best")
    axes.set_title(f"{facts['factory']}, {facts['num_labels']:,} labels", fontsize=11)
    axes.grid(lw=0.4)
    axes.legend(frameon=False, fontsize=8)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150)
    return out.getvalue()


def sweep_table(facts: dict[str, Any]) -> Table:
    """Shows an index for a terminal; the effort that is kept is marked."""
    ranges = facts["ranges"]
    size = sum(each["bytes"] for each in ranges) / facts["num_labels"]
    seconds = sum(each["seconds"] for each in ranges)
    table = Table(
        title=f"{facts['factory']}: {facts['num_labels']:,} labels in {len(ranges)} ranges",
        caption=f"{size:.0f} bytes a label, built in {seconds:.0f} s",
    )
    columns = [key for key in facts["sweep"][0] if key != "effort"]
    table.add_column(facts["effort_name"], justify="right")
    for name in columns:
        table.add_column(name, justify="right")
    exact = facts["exact"]
    table.add_row("exact", *(f"{exact[key]:g}" if key in exact else "" for key in columns))
    for row in facts["sweep"]:
        mark = " kept" if row["effort"] == facts["effort"] else ""
        table.add_row(f"{row['effort']}{mark}", *(f"{row[key]:g}" for key in columns))
    return table
