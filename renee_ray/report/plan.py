"""Recipes, plans and expectations as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from renee_ray.config.about import About, Cost
from renee_ray.config.schema import RunConfig
from renee_ray.errors import printable
from renee_ray.plan.devices import GIB
from renee_ray.plan.plan import Plan

METRICS = ("P@1", "PSP@1")
"""Published metrics in the list of recipes; its JSON has all."""


def recipe_facts(name: str, config: RunConfig, about: About | None) -> dict[str, Any]:
    """Returns what the list of recipes says of one: key settings, and what is published."""
    published = about.model_dump(exclude={"encoder"}) if about else {}
    return {
        "name": name,
        "encoder": config.encoder.name,
        "batch_size": config.batch_size,
        "epochs": config.epochs,
        "precision": config.classifier.precision,
        **published,
    }


def recipe_text(facts: Mapping[str, Any]) -> RenderableType:
    """Shows the list of recipes, two lines each."""
    heading = f"{'recipe':30}{'labels':>12}{'batch':>7}{'epochs':>8}"
    text = Text(heading + "".join(f"{metric:>8}" for metric in METRICS) + "\n", style="bold")
    for row in facts["recipes"]:
        expected = row.get("expected", {})
        numbers = f"{row.get('labels', 0):12,}{row['batch_size']:7}{row['epochs']:8}"
        shown = (f"{expected[m]:8.2f}" if m in expected else " " * 8 for m in METRICS)
        costs = (cost_text(Cost(**cost)) for cost in row.get("costs", []))
        text.append(f"{row['name']:30}{numbers}{''.join(shown)}\n", style="not bold")
        text.append(f"    {'; '.join([row['encoder'], *costs])}\n", style="not bold dim")
    return text


def cost_text(cost: Cost) -> str:
    parts = (
        (cost.hours, "h"), (cost.epoch_minutes, "min an epoch"), (cost.memory_gib, "GiB"),
    )  # fmt: skip
    return f"{', '.join(f'{n:g} {unit}' for n, unit in parts if n)} on {cost.hardware}"


def plan_text(plan: Plan, about: About | None) -> RenderableType:
    """Shows a plan, beside what was published for its recipe."""
    where = "this machine" if plan.device == "cpu" else "the device"
    verdict = "fits" if plan.fits else "does NOT fit"
    limit = f"{verdict} {plan.limit_bytes / GIB:.1f} GiB of {where}"
    return Group(
        Text(f"{plan.num_workers} x {plan.device}, {plan.precision}: {limit}", style="bold"),
        _rows("Memory of a worker, GiB", _memory(plan)),
        _rows(f"Step, ms ({'measured' if plan.calibrated else 'estimated'} rates)", _step(plan)),
        _rows("Run", _run(plan)),
        _rows("Would save", [
            (change, f"{saved / GIB:.1f} GiB a worker, {added * 1e3:+.0f} ms a step")
            for change, saved, added in plan.changes
        ]),
        _rows("Published", [(c.source, cost_text(c)) for c in about.costs] if about else []),
    )  # fmt: skip


def _memory(plan: Plan) -> list[tuple[str, str]]:
    parts = [(name, f"{size / GIB:.3f}") for name, size in plan.memory.items() if size]
    return [*parts, ("in all", f"{plan.total_bytes / GIB:.3f}")]


def _step(plan: Plan) -> list[tuple[str, str]]:
    parts = [(name, f"{seconds * 1e3:.1f}") for name, seconds in plan.step.items() if seconds]
    return [*parts, ("in all", f"{plan.step_s * 1e3:.1f}")]


def _run(plan: Plan) -> list[tuple[str, str]]:
    sent = sum(plan.network_bytes.values())
    unknown = "give --points"
    fewest = plan.fewest_devices or "none, however many"
    return [
        ("steps an epoch", f"{plan.epoch_steps:,}" if plan.epoch_steps else unknown),
        ("hours an epoch", f"{plan.epoch_hours:.2f}" if plan.epoch_hours else unknown),
        ("hours of the run", f"{plan.run_hours:.1f}" if plan.run_hours else unknown),
        ("sent by a worker in a step", f"{sent / 2**20:.1f} MiB"),
        ("checkpoint", f"{plan.checkpoint_bytes / GIB:.2f} GiB, {plan.checkpoint_s:.0f} s"),
        ("host memory for its copy", f"{plan.host_copy_bytes / GIB:.2f} GiB"),
        ("fewest devices that it fits", str(fewest)),
    ]


def expectation_text(found: Mapping[str, Any]) -> RenderableType:
    """Shows a run's metrics beside the published ones, and what differs."""
    table = _table("", right=("published", "run", "gap", "run, texts as points"))
    for metric, published in found["expected"].items():
        own, augmented = found["metrics"][metric], found.get("augmented", {}).get(metric)
        compared = augmented if found["propensities"] == "augmented" and augmented else own
        shown = "" if augmented is None else f"{augmented:.2f}"
        gap = f"{compared - published:+.2f}"
        table.add_row(metric, f"{published:.2f}", f"{own:.2f}", gap, shown)
    differences = [(what, f"{own}, there {theirs}") for what, own, theirs in found["differences"]]
    return Group(
        Text(
            printable(f"{found['recipe']}: {found['source']}; step {found['step']}"), style="bold"
        ),
        table,
        _rows("What differs", differences or [("nothing", "")]),
    )


def _table(*left: str, right: Iterable[str] = ()) -> Table:
    table = Table()
    for name in left:
        table.add_column(name, no_wrap=True)
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _rows(title: str, rows: list[tuple[str, str]]) -> RenderableType:
    """Shows rows of two cells below a title; nothing where there are none."""
    if not rows:
        return Text()
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in rows:
        table.add_row(Text(printable(name)), Text(printable(value)))
    return table
