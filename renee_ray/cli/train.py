"""Commands that train and watch: quickstart, train, status, checkpoints."""

from __future__ import annotations

import json
import os
import re
import time

import click
from rich.console import Console

from renee_ray.cli.common import PATH, ConfiguredCommand, call, json_option
from renee_ray.cli.output import print_facts, print_result, say
from renee_ray.config.grammar import Layer
from renee_ray.config.overrides import make_config, parse_overrides, read_yaml
from renee_ray.config.schema import RunConfig
from renee_ray.data.storage import absolute
from renee_ray.errors import ReneeError


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
    if config is None or re.match(r"[\w.]+=", config):
        given = parse_overrides([*([config] if config else []), *overrides])
        made = call(automatic, given)
    else:
        made = make_config(RunConfig, read_yaml(config), parse_overrides(overrides), where=config)
    from renee_ray.service.train.train import train as run

    found = call(lambda: run(made, say, force=force))
    print_result(found, as_json, f"run {made.output}")


def automatic(given: Layer) -> RunConfig:
    """Makes the configuration of a run of which nothing but the overrides is given."""
    wanted = make_config(RunConfig, given, where="the command line")  # what is missing is said
    from renee_ray.data.dataset import Dataset
    from renee_ray.plan.settings import choose
    from renee_ray.service.run.directory import RUN_FILE, RunDirectory

    if RunDirectory(absolute(wanted.output)).read(RUN_FILE) is not None:
        return wanted  # it goes on with the settings that it has
    import torch

    gpus = 0 if wanted.use_gpu == "no" else torch.cuda.device_count()
    cores = len(os.sched_getaffinity(0))
    settings, lines = choose(Dataset.open(wanted.data).manifest, gpus, cores)
    for line in lines:
        say(line)
    return make_config(RunConfig, settings, given)


@click.command()
@click.argument("run", type=PATH)
@click.option("--watch", is_flag=True, help="Show it again every ten seconds, until Ctrl-C.")
@json_option
def status(run: str, watch: bool, as_json: bool) -> None:
    """Show how the run at RUN is: running, finished, waiting, failed or unknown, and how far.

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
