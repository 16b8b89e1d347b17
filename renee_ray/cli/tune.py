"""The command that searches for settings: tune."""

from __future__ import annotations

import click

from renee_ray.cli.common import PATH, ConfiguredCommand, call, json_option
from renee_ray.cli.output import print_facts, say
from renee_ray.config.overrides import make_config, parse_overrides, read_yaml
from renee_ray.config.tune import TuneConfig


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
