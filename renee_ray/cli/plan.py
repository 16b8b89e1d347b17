"""Commands about what runs take and reach: recipes, plan, expect."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from renee_ray.cli.common import PATH, ConfiguredCommand, call, count, json_option
from renee_ray.cli.output import print_facts
from renee_ray.config.overrides import dotted, make_config, parse_overrides, read_recipe
from renee_ray.config.recipes import find_recipe, recipe_names, recipe_path
from renee_ray.config.schema import EncoderConfig, RunConfig
from renee_ray.config.score import ScoreConfig
from renee_ray.errors import ConfigError
from renee_ray.machine import OPENMP

UNSET = {"data": "-", "output": "-"}


@click.command()
@click.argument("name", default="")
@json_option
def recipes(name: str, as_json: bool) -> None:
    """List the recipes, with what was published for each; or show the file of one, NAME."""
    from renee_ray.report.plan import recipe_facts, recipe_text

    if name and not as_json:
        if find_recipe(name) is None:
            raise ConfigError(f"{name!r:.200} is a file; give the name of a recipe")
        click.echo(Path(recipe_path(name)).read_text(encoding="utf-8"), nl=False)
        return
    found = []
    for each in [name] if name else recipe_names():
        layer, about = read_recipe(each)
        config = make_config(RunConfig, UNSET, layer, where=each)
        facts = recipe_facts(each, config, about)
        if name:
            facts["settings"] = {k: v for k, v in dotted(layer) if k != "recipe"}
        found.append(facts)
    print_facts(found[0] if name else {"recipes": found}, as_json, recipe_text)


@click.command(cls=ConfiguredCommand, keys=RunConfig)
@click.argument("config", type=PATH)
@click.argument("overrides", nargs=-1)
@count("--labels", None, "Labels; by default the dataset's or the recipe's.")
@count("--points", None, "Training points.")
@click.option("--tokens", type=click.FloatRange(min=1), help="Mean tokens of a point.")
@count("--devices", None, "Workers, a device each; by default num_workers.")
@click.option("--device", default="auto", show_default=True, help="Kind: v100, h100, cpu, ...")
@click.option("--calibrate", is_flag=True, help="Measure rates here, for some seconds.")
@json_option
def plan(
    config: str, overrides: tuple[str, ...], labels: int | None, points: int | None,
    tokens: float | None, devices: int | None, device: str, calibrate: bool, as_json: bool,
) -> None:  # fmt: skip
    """Say what a run of CONFIG takes, before it is started: memory, time, network, devices.

    CONFIG is a YAML file or the name of a recipe. `data` may be left out where the recipe or
    --labels tell what a dataset would.
    """
    for key, value in OPENMP.items():  # as in a run's workers, before torch loads
        os.environ.setdefault(key, value)
    layer, about = read_recipe(config)
    given = {"num_workers": devices} if devices else {}
    made = make_config(RunConfig, UNSET, layer, parse_overrides(overrides), given, where=config)
    from renee_ray.plan.devices import NAMES, find_device
    from renee_ray.plan.encoder import find_transformer
    from renee_ray.plan.plan import find_workload, make_plan
    from renee_ray.report.plan import plan_text

    if device not in (*NAMES, "auto"):
        raise ConfigError(f"--device {device!r:.80} is unknown; give one of {', '.join(NAMES)}")
    found = find_device(device)
    measure: Any = None
    if calibrate:
        from renee_ray.benchmarks import calibrate as pieces

        measure = pieces.measure
        if found.kind != find_device("auto").kind:
            raise ConfigError(f"--calibrate measures this machine, which is no {device}")
    workload = find_workload(made, about, labels, points, tokens)
    own = dict(dotted(layer)).get("encoder.name", EncoderConfig().name)
    shape = about.encoder if about and made.encoder.name == own else None
    result = call(
        make_plan, made, workload, find_transformer(made.encoder, shape), found,
        made.max_workers, measure,
    )  # fmt: skip
    print_facts(asdict(result), as_json, lambda _: plan_text(result, about))


@click.command(cls=ConfiguredCommand, keys=ScoreConfig)
@click.argument("run", type=PATH)
@click.argument("overrides", nargs=-1)
@click.option("--recipe", default="", help="Compare with this one; by default the run's own.")
@json_option
def expect(run: str, overrides: tuple[str, ...], recipe: str, as_json: bool) -> None:
    """Score the run at RUN on its dataset, beside what was published for its recipe.

    Takes the last checkpoint, and says in which settings run and recipe differ.
    """
    layer = parse_overrides(overrides, ScoreConfig)
    score = make_config(ScoreConfig, {"checkpoint": "last"}, layer, where="expect")
    from renee_ray.report.plan import expectation_text
    from renee_ray.service.score.expect import expect_run

    print_facts(call(expect_run, run, recipe, score), as_json, expectation_text)
