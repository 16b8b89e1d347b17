"""Recipes, plans and expectations as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from renee_ray.config.recipes import About, Cost
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
    verdict = (
        f"{'fits' if plan.fits else 'does NOT fit'} {plan.limit_bytes / GIB:.1f} GiB of {where}"
    )
    memory = plan.memory | {"in all": plan.total_bytes}
    step = plan.step | {"in all": plan.step_s}
    unknown = "give --points"
    run = {
        "steps an epoch": f"{plan.epoch_steps:,}" if plan.epoch_steps else unknown,
        "hours an epoch": f"{plan.epoch_hours:.2f}" if plan.epoch_hours else unknown,
        "hours of the run": f"{plan.run_hours:.1f}" if plan.run_hours else unknown,
        "sent by a worker in a step": f"{sum(plan.network_bytes.values()) / 2**20:.1f} MiB",
        "checkpoint": f"{plan.checkpoint_bytes / GIB:.2f} GiB, {plan.checkpoint_s:.0f} s",
        "host memory for its copy": f"{plan.host_copy_bytes / GIB:.2f} GiB",
        "fewest devices that it fits": str(plan.fewest_devices or "none, however many"),
    }
    saving = {
        f"{change} saves": f"{saved / GIB:.1f} GiB a worker, {added * 1e3:+.0f} ms a step"
        for change, saved, added in plan.changes
    }
    rates = "measured" if plan.calibrated else "estimated"
    return Group(
        Text(f"{plan.num_workers} x {plan.device}, {plan.precision}: {verdict}", style="bold"),
        _rows("Memory of a worker, GiB", {k: f"{v / GIB:.3f}" for k, v in memory.items() if v}),
        _rows(f"Step, ms, {rates}", {k: f"{v * 1e3:.1f}" for k, v in step.items() if v}),
        _rows("Run", run | saving),
        _rows("Published", {c.source: cost_text(c) for c in about.costs} if about else {}),
    )


def expectation_text(found: Mapping[str, Any]) -> RenderableType:
    """Shows a run's metrics beside the published ones, and what differs."""
    table = Table()
    for name in ("", "published", "run", "gap", "run, texts as points"):
        table.add_column(name, justify="right")
    for metric, published in found["expected"].items():
        own, augmented = found["metrics"][metric], found.get("augmented", {}).get(metric)
        compared = augmented if found["propensities"] == "augmented" and augmented else own
        shown = "" if augmented is None else f"{augmented:.2f}"
        gap = f"{compared - published:+.2f}"
        table.add_row(metric, f"{published:.2f}", f"{own:.2f}", gap, shown)
    unlike = {what: f"{own}, there {theirs}" for what, own, theirs in found["differences"]}
    return Group(
        Text(printable(f"recipe {found['recipe']}; published: {found['source']}")),
        Text(
            f"step {found['step']} of the run, {found['points']:,} points of split={found['split']}"
        ),
        table,
        _rows("What differs", unlike or {"nothing": ""}),
    )


def _rows(title: str, rows: Mapping[str, str]) -> RenderableType:
    """Shows rows of two cells below a title; nothing where there are none."""
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in rows.items():
        table.add_row(Text(printable(name)), Text(printable(value), justify="right"))
    return table if rows else Text()
