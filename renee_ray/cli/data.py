"""Commands on datasets: convert, inspect."""

from __future__ import annotations

from typing import Any

import click

from renee_ray.cli.common import PATH, ConfiguredCommand, call, configured, count, json_option
from renee_ray.cli.output import print_facts, say
from renee_ray.config.schema import ConvertConfig
from renee_ray.errors import ReneeError


@click.command(cls=ConfiguredCommand, keys=ConvertConfig)
@click.argument("src", type=PATH)
@click.argument("dst", type=PATH)
@click.argument("overrides", nargs=-1)
@json_option
def convert(src: str, dst: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Turn a folder SRC (CSV, JSON lines, Parquet, XML repository ...) into a dataset DST."""
    config = configured(ConvertConfig, overrides, "convert")
    from renee_ray.report.conversion import conversion_text
    from renee_ray.service.convert import convert as service

    manifest = call(service.convert, src, dst, config, say)
    facts: dict[str, Any] = {
        "dataset": dst,
        "labels": manifest.num_labels,
        **{split: manifest.num_points(split) for split in ("train", "validation", "test")},
        "statistics": manifest.statistics,
        "hints": service.hints(manifest, config),
    }
    print_facts(facts, as_json, conversion_text)


@click.command()
@click.argument("dataset", type=PATH)
@click.option("--verify", is_flag=True, help="Read everything and check every invariant.")
@count("--samples", 3, "Points shown.", minimum=0)
@json_option
def inspect(dataset: str, verify: bool, samples: int, as_json: bool) -> None:
    """Show what is in DATASET; with --verify, every way in which it is not as it should be.

    Exit status 1 if --verify finds any.
    """
    from renee_ray.data.dataset import Dataset
    from renee_ray.data.inspection import inspect as run
    from renee_ray.report.inspection import inspection_text

    opened = (Dataset.without_check if verify else Dataset.open)(dataset)
    facts = run(opened, samples=samples, verify=verify)
    print_facts(facts, as_json, inspection_text)
    if problems := facts.get("problems"):
        number = f"{len(problems)} problem" + ("s" if len(problems) > 1 else "")
        raise ReneeError(f"{dataset} has {number}: convert its source again")
