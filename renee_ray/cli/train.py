"""Commands that plan, train, tune and watch: recipes, plan, train, status, checkpoints, expect."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from renee_ray.cli.common import (
    PATH,
    ConfiguredCommand,
    call,
    count,
    json_option,
    print_facts,
    print_result,
    say,
)
from renee_ray.config.grammar import COMMAND_LINE, Layer
from renee_ray.config.overrides import dotted, make_config, parse_overrides, read_recipe, read_yaml
from renee_ray.config.recipes import find_recipe, recipe_names, recipe_path
from renee_ray.config.schema import EncoderConfig, RunConfig
from renee_ray.config.score import ScoreConfig
from renee_ray.config.tune import TuneConfig
from renee_ray.data.storage import absolute
from renee_ray.errors import ConfigError, ReneeError
from renee_ray.machine import OPENMP


@click.command(cls=ConfiguredCommand, keys=RunConfig)
@click.argument("overrides", nargs=-1)
@json_option
def quickstart(overrides: tuple[str, ...], as_json: bool) -> None:
    """Convert, train and evaluate a small dataset, in a few minutes on two cores.

    Dataset and recipe come with the package. Everything goes to `output` (by default
    ./quickstart), the report to report.html in it. `data` cannot be set.
    """
    from renee_ray.report.run import comparison_table, examples_text
    from renee_ray.service.quickstart import quickstart as run

    found = call(run, parse_overrides(overrides), say)
    if as_json:
        click.echo(json.dumps(found))
        return
    console = Console()
    console.print()
    console.print(comparison_table(found["comparison"]))
    console.print("\nTest points and their five best labels, right ones ticked:\n", highlight=False)
    console.print(examples_text(found["examples"]))
    click.echo(f"report: {found['report']}")


@click.command(cls=ConfiguredCommand, keys=RunConfig)
@click.argument("config", type=PATH, required=False)
@click.argument("overrides", nargs=-1)
@click.option("--force", is_flag=True, help="Train even if the plan says that it cannot fit.")
@click.option("--profile", is_flag=True, help="Trace ten steps of each rank: observe.profile=true.")
@json_option
def train(
    config: str | None, overrides: tuple[str, ...], force: bool, profile: bool, as_json: bool
) -> None:
    """Train as CONFIG and the overrides say; resumes a run that is at `output`.

    CONFIG is a YAML file, or the name of a recipe that comes with the package: see `recipes`.
    Without it, settings are chosen that fit the dataset, and said (docs/training.md).
    """
    if profile:
        overrides += ("observe.profile=true",)
    alone, chosen = without_configuration(config, overrides), list[str]()
    if config is None or alone is not None:
        made, chosen = call(automatic, parse_overrides(alone or []))
    else:
        given = parse_overrides(overrides)
        made = checked(make_config(RunConfig, read_yaml(config), given, where=config), given)
    from renee_ray.service.train.train import train as run

    found = call(lambda: run(made, say, force=force, chosen=chosen))
    print_result(found, as_json, f"run {made.output}")


ANYTHING: dict[str, Any] = {"encoder": {"bag": {"dim": 1}}}
"""Stands for the settings that are chosen: with it, overrides alone are checked as they can be.
encoder.name=none is not wrong: a bag may be chosen."""


def without_configuration(config: str | None, overrides: Sequence[str]) -> list[str] | None:
    """Returns all overrides where no CONFIG is given, whose place the first of them takes."""
    if config is None or re.match(r"[\w.]+=", config):
        return [*([config] if config else []), *overrides]
    return None


def checked(config: RunConfig, given: Layer) -> RunConfig:
    """Returns a configuration with `given`, in which no key of what is not trained may stand.

    Those of a recipe may, beside an encoder.bag.dim=0 or an encoder.frozen=true.
    """
    encoder, key = config.encoder, ""
    if not encoder.bag.dim:
        key, remedy = _first(given, r"encoder\.bag\.(?!dim$)"), "add encoder.bag.dim=512"
        reason = "without a bag"
    if not (key or encoder.trains_transformer or encoder.lora.rank or encoder.bottleneck):
        key, remedy = _first(given, r"encoder\.(learning_rate|weight_decay)$"), "leave it out"
        reason = "where of the encoder a bag alone is trained, by encoder.bag.learning_rate"
    if key:
        raise ConfigError(f"{key} has no effect {reason}; {remedy}")
    return config


def _first(given: Layer, pattern: str) -> str:
    return next((key for key in given.places if re.match(pattern, key)), "")


def automatic(given: Layer) -> tuple[RunConfig, list[str]]:
    """Makes the configuration of a run of which nothing but the overrides is given.

    Returns:
        it, and a sentence for each choice, for run.json; none where a run goes on.
    """
    wanted = make_config(RunConfig, ANYTHING, given, where=COMMAND_LINE)  # what is missing is said
    from renee_ray.data.dataset import Dataset
    from renee_ray.plan.devices import usable_gpus
    from renee_ray.plan.settings import add_norm, choose, choose_from
    from renee_ray.service.run.directory import RUN_FILE, RunDirectory

    if "evaluation.tail" in given.places and "evaluation.tails" not in given.places:
        given.add("evaluation.tails", [], given.places["evaluation.tail"])
    known = {key: value for key, value in dotted(wanted.model_dump()) if key in given.places}
    directory = RunDirectory(absolute(wanted.output))
    if directory.read(RUN_FILE) is not None:  # it goes on with the settings that it has
        return checked(make_config(RunConfig, directory.config().model_dump(), given), given), []
    gpus, cores = usable_gpus() if wanted.use_gpu != "no" else 0, len(os.sched_getaffinity(0))
    dataset = Dataset.open(wanted.data)
    machine = dataset.manifest, gpus, cores, known
    if wanted.start:
        start = RunDirectory(absolute(wanted.start)).config()
        settings, lines = choose_from(start, *machine)
    else:
        settings, lines = choose(*machine)
        made = checked(make_config(RunConfig, settings, given), given)
        lines += add_norm(settings, made, dataset, known)
    for line in lines:
        say(line)
    return checked(make_config(RunConfig, settings, given), given), lines


@click.command()
@click.argument("run", type=PATH)
@click.option("--watch", is_flag=True, help="Show it again every ten seconds, until Ctrl-C.")
@json_option
def status(run: str, watch: bool, as_json: bool) -> None:
    """Show how far the run at RUN is, and whether it runs, waits, has ended or failed.

    Reads the files of the run's directory alone, so it needs no Ray and disturbs nothing.
    """
    from renee_ray.report.status import read_status, status_text

    while True:
        found = read_status(run.rstrip("/"), time.time())
        print_facts(found, as_json, status_text)
        if not watch:
            return
        time.sleep(10)


@click.command()
@click.argument("run", type=PATH)
@click.argument("dst", type=PATH, required=False)
@json_option
def report(run: str, dst: str | None, as_json: bool) -> None:
    """Write the page of the run at RUN to DST, by default RUN/report.html.

    `train` does so at its end; this does it again, or for a run that still trains. Reads the files
    of the run's directory alone, as `status` does.
    """
    from renee_ray.report.run import write_report

    found = {"report": write_report(run.rstrip("/"), dst or "")}
    click.echo(json.dumps(found) if as_json else f"report: {found['report']}")


@click.command()
@click.argument("run", type=PATH)
@click.option("--verify", is_flag=True, help="Read everything and compare checksums.")
@json_option
def checkpoints(run: str, verify: bool, as_json: bool) -> None:
    """List the checkpoints of the run at RUN: size, step, metrics, and whether they are whole.

    Exit status 1 if any is not.
    """
    from renee_ray.report.checkpoints import checkpoint_table, list_checkpoints
    from renee_ray.service.run.directory import RunDirectory

    metric = RunDirectory(run).config().evaluation.metric
    rows = list_checkpoints(run, verify=verify)
    facts = {"run": run, "checkpoints": rows}
    print_facts(facts, as_json, lambda _: checkpoint_table(rows, metric, verify))
    if bad := [row["name"] for row in rows if row["problem"]]:
        raise ReneeError(
            f"{run} has {len(bad)} checkpoint{'s' * (len(bad) > 1)} that cannot be used "
            f"({', '.join(bad)}); `renee-ray train` goes on from the newest whole one"
        )


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
            known = dict(dotted(config.model_dump(mode="json")))
            facts["settings"] = {k: known[k] for k, _ in dotted(layer) if k != "recipe"}
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
    given, more = parse_overrides(overrides), {"num_workers": devices} if devices else {}
    made = checked(make_config(RunConfig, UNSET, layer, given, more, where=config), given)
    from renee_ray.plan.devices import NAMES, find_device, local_device, usable_gpus
    from renee_ray.plan.encoder import find_transformer
    from renee_ray.plan.plan import find_workload, make_plan
    from renee_ray.report.plan import plan_text

    if device not in (*NAMES, "auto"):
        raise ConfigError(f"--device {device!r:.80} is unknown; give one of {', '.join(NAMES)}")
    # --devices may be those of a larger machine with the same GPU.
    found = find_device(device, made.use_gpu, 1 if devices else made.min_workers)
    measure: Any = None
    if calibrate:
        from renee_ray.benchmarks import calibrate as pieces

        measure = pieces.measure
        here = local_device(usable_gpus() > 0).name
        if found.name != here:
            raise ConfigError(
                f"--calibrate measures this machine's {here}, and the plan is for {found.name}; "
                f"leave --calibrate out"
            )
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
    layer = parse_overrides(overrides)
    score = make_config(ScoreConfig, {"checkpoint": "last"}, layer, where="expect")
    from renee_ray.report.plan import expectation_text
    from renee_ray.service.score.evaluate import expect_run

    print_facts(call(expect_run, run, recipe, score), as_json, expectation_text)


@click.command(cls=ConfiguredCommand, keys=TuneConfig)
@click.argument("config", type=PATH)
@click.argument("overrides", nargs=-1)
@json_option
def tune(config: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Search for settings that are better than CONFIG's, on the validation split alone.

    CONFIG is a YAML file, or the name of a recipe. Each trial is a run in a directory below
    `output`; the best configuration is written there too, as best.yaml. The same command again goes
    on with a search that was cut off, or that now has more trials or hours. docs/tuning.md says
    what is searched: a key that is given is not.
    """
    given = parse_overrides(overrides)
    made = make_config(TuneConfig, read_yaml(config), given, where=config)
    from renee_ray.report.tuning import tuning_text
    from renee_ray.service.tune import search

    print_facts(call(search, made, set(given.places), say), as_json, tuning_text)
