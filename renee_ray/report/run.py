"""The report of a run: one self-contained HTML page, made of the files in the run's directory.

    run.json       the configuration, the dataset, and the plan made before the start
    status.json    the state, every start of the workers, their environment (report/status.py)
    history.json   the curves (service/run/history.py)

What an earlier version did not write is left out. The quickstart adds to the page, and has on the
terminal:

    comparison     [{"model": "renee_ray", "P@1": percent, ...}]; a metric may be missing from a row
    examples       [{"text": str, "true": [str], "predicted": [{"label": str, "score": float,
                   "right": bool}]}]
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import RenderableType, group
from rich.table import Table
from rich.text import Text

from renee_ray.config.overrides import changed
from renee_ray.data.dataset import Dataset
from renee_ray.data.storage import absolute, read_json
from renee_ray.errors import ReneeError, printable
from renee_ray.plan.devices import GIB
from renee_ray.report.charts import Chart, Entries, Mark, chart, lines_of
from renee_ray.report.inspection import SHOWN
from renee_ray.report.page import percentages, write_page
from renee_ray.report.status import damaged, duration, read_status
from renee_ray.scoring.metrics import CLASSES

REPORT_FILE = "report.html"
HEADLINE = ("P@1", "P@3", "P@5", "PSP@1", "PSP@5", "recall@100")
NORMAL_95 = 1.96


def write_report(
    run: str,
    path: str = "",
    *,
    title: str = "",
    facts: Mapping[str, str] | None = None,
    comparison: Entries = (),
    examples: Entries = (),
) -> str:
    """Writes the page of the run at `run`, which may still train, and returns where.

    Args:
        path: a file or a URL; empty: RUN/report.html.
        title: empty: the run's name.
        facts: shown first, in the given order; comparison, examples: as above.

    Raises:
        ReneeError: there is no run, a file of it is damaged, or the page cannot be written.
    """
    from jinja2 import TemplateError

    run = absolute(run)
    path = path or f"{run}/{REPORT_FILE}"
    status, saved = read_status(run, time.time()), read_json(f"{run}/run.json") or {}
    history = read_json(f"{run}/history.json") or {}
    try:
        write_page(
            path, "report.html.j2", title=title or run.rpartition("/")[2], facts=facts or {},
            comparison=percentages(comparison), examples=examples,
            **_contents(saved, status, history),
        )  # fmt: skip
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, TemplateError):
        raise damaged(run, "history.json or run.json") from None
    return path


def comparison_table(rows: Entries) -> Table:
    """Shows the comparison for a terminal; the best figure of each column is bold."""
    header, texts, best = percentages(rows).values()
    table = Table(title="Test set, percent", title_justify="left")
    for i, name in enumerate(header):
        table.add_column(Text(name), justify="right" if i else "left", no_wrap=bool(i))
    for i, row in enumerate(texts):
        styles = ("bold green" if (i, j) in best else "" for j in range(len(row)))
        table.add_row(*map(Text, row, styles))
    return table


@group()
def examples_text(examples: Entries) -> Iterator[RenderableType]:
    """Shows the examples for a terminal: a title, then its predictions, the right ones ticked."""
    for example in examples:
        predictions = Table.grid(padding=(0, 1), pad_edge=True)
        for prediction in example["predicted"]:
            right = prediction["right"]
            predictions.add_row(
                Text("✓" if right else "·", style="bold green" if right else "dim"),
                Text(f"{prediction['score']:.2f}", style="dim"),
                Text(printable(prediction["label"]), style="green" if right else ""),
            )
        true = printable("; ".join(example["true"])) or "none"
        predictions.add_row("", Text("true", style="dim"), Text(true, style="dim"))
        yield from (Text(printable(example["text"]), style="bold"), predictions, Text())


def _contents(
    saved: Mapping[str, Any], status: Mapping[str, Any], history: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the values of the template, from run.json, `read_status` and history.json."""
    config, data, plan = saved["config"], saved["dataset"], saved.get("plan")
    starts, steps = status["starts"], history.get("steps", [])
    began = min((each["time_s"] for each in (*starts, *steps[:1])), default=0.0)
    steps = [{**each, "after_s": each["time_s"] - began} for each in steps]
    evals = [_evaluation(each, began) for each in history.get("evals", [])]
    seconds = float(np.nanmax([0.0, *(each["after_s"] for each in (*evals, *steps))]))
    metric = config["evaluation"]["metric"]
    best = max(
        evals, key=lambda each: (each["step"] > 0, each["metrics"].get(metric, 0.0)), default=None
    )
    peaks = [each.get("gpu_peak_gib") or each.get("peak_rss_gib") or 0.0 for each in steps]
    paces = [config["batch_size"] / each["rows_per_second"] for each in steps]
    return {
        "status": status,
        "data": data,
        "plan": plan and {**plan, "gib": plan["total_bytes"] / GIB},
        "measured": {"gib": max(peaks), "step_s": np.median(paces)} if steps else None,
        "seconds": seconds,
        "metric": metric,
        "best": best,
        "headline": dict.fromkeys((metric, *HEADLINE)),
        "by_step": _by_step(steps, evals),
        "by_time": _by_time(steps, evals, list(_marks(starts, steps, began))),
        "evaluations": percentages(
            [{"step": f"{each['step']:,}", **each["metrics"]} for each in evals]
        ),
        "statistics": _statistics(data),
        "counted": SHOWN,
        "settings": list(changed(config)),
        "interval": interval,
        "duration": duration,
    }


def _evaluation(found: Mapping[str, Any], began: float) -> dict[str, Any]:
    """Puts all figures of an evaluation side by side, with `after_s`, seconds since `began`."""
    after = found.get("time_s", np.nan) - began  # that of a checkpoint has no time
    found = {"points": None, "by_frequency": {}, **found}
    classes = {name: row["recall@5"] for name, row in found["by_frequency"].items()}
    return {**found, **found["metrics"], **classes, "after_s": after}


def _marks(starts: Entries, steps: Entries, began: float) -> Iterator[Mark]:
    for each in starts[1:]:
        after, workers = each["time_s"] - began, each["workers"]
        what = f"{workers} worker{'s' * (workers > 1)} started after step {each['step']:,}"
        yield "restart", after, f"after {duration(after)}: {what}"
    for before, each in zip(({"skipped": 0}, *steps), steps, strict=False):
        if (new := each["skipped"] - before["skipped"]) > 0:
            yield "skipped", each["after_s"], f"{new:,} skipped by step {each['step']:,}"


def interval(percent: float, points: float) -> str:
    """Returns the 95% confidence interval of P@1, of which each point has 0 or 1 (Wilson, 1927)."""
    share, square = percent / 100, NORMAL_95**2 / points
    middle = (share + square / 2) / (1 + square)
    half = np.sqrt(square * (share * (1 - share) + square / 4)) / (1 + square)
    return f"{100 * (middle - half):.1f} to {100 * (middle + half):.1f}"


def _by_step(steps: Entries, evals: Entries) -> list[Chart]:
    memory = lines_of(steps, "peak_rss_gib", "gpu_peak_gib")
    padding = lines_of(steps, "padding", scale=100.0)
    drawn = (
        chart("Training loss", "loss", lines_of(steps, "loss")),
        chart("Precision on validation", "%", lines_of(evals, "P@1", "P@3", "P@5"), dots=True),
        chart("Propensity-scored precision", "%", lines_of(evals, "PSP@1", "PSP@5"), dots=True),
        chart("Recall@5 by label frequency", "%", lines_of(evals, *CLASSES), dots=True),
        chart("Throughput", "rows/s", lines_of(steps, "rows_per_second"), zero=True),
        chart("Padding, share of tokens", "%", padding, zero=True),
        chart("Peak memory of a worker", "GiB", memory, zero=True),
    )
    return [each for each in drawn if each]


def _by_time(steps: Entries, evals: Entries, marks: Sequence[Mark]) -> list[Chart]:
    precision = lines_of(evals, "P@1", "P@5", over="after_s")
    loss, done = (lines_of(steps, key, over="after_s") for key in ("loss", "step"))
    drawn = (
        chart("Training loss", "loss", loss, over="s", marks=marks),
        chart("Precision on validation", "%", precision, over="s", dots=True, marks=marks),
        chart("Steps", "steps", done, over="s", zero=True, marks=marks),
    )
    return [each for each in drawn if each]


def _statistics(data: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the counts of the dataset's splits; where it is gone or another one now, a few."""
    with contextlib.suppress(ReneeError, OSError):
        manifest = Dataset.without_check(data["path"]).manifest
        if manifest.hash == data["manifest_hash"]:
            return manifest.statistics
    return {"train": {"points": data["num_points"]}, "labels": {"points": data["num_labels"]}}
