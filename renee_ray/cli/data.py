"""Commands that bring data and runs here: convert, inspect, from-renee."""

from __future__ import annotations

from typing import Any

import click
from pyarrow.fs import FileType

from renee_ray.cli.common import (
    PATH,
    call,
    command,
    configured,
    count,
    json_option,
    print_facts,
    say,
)
from renee_ray.config.from_renee import as_yaml, translate
from renee_ray.config.schema import Config, ConvertConfig
from renee_ray.data.storage import absolute, filesystem_of, replace_file
from renee_ray.errors import ReneeError


@command(ConvertConfig, "src", "dst")
def convert(config: ConvertConfig, src: str, dst: str, as_json: bool) -> None:
    """Turn SRC, a folder or a file (CSV, JSON lines, Parquet ...), into a dataset DST."""
    from renee_ray.report.inspection import conversion_text
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
@click.option("--verify", is_flag=True, help="Read everything and compare checksums.")
@count("--samples", 3, "Points shown.", minimum=0)
@json_option
def inspect(dataset: str, verify: bool, samples: int, as_json: bool) -> None:
    """Show what is in DATASET; with --verify, which of its files are not as they were written.

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


class Places(Config):
    """Where `from-renee` reads and writes."""

    data: str = ""
    """The converted dataset; empty: its size is known by the name in --data-dir."""
    output: str = ""
    """The YAML file, or the run directory with --checkpoint; empty: standard output."""


# COMMAND begins with a dash, as an option does.
@click.command("from-renee", context_settings={"ignore_unknown_options": True})
@click.argument("command")
@click.argument("places", nargs=-1)
@click.option("--checkpoint", type=PATH, help="Directory of NAME_RANK_state_dict.pt to import.")
@count("--gpus", None, "GPUs of the command in all; by default 16.")
def from_renee(
    command: str, places: tuple[str, ...], checkpoint: str | None, gpus: int | None
) -> None:
    """Translate COMMAND, flags of microsoft/renee's main.py, into a configuration.

    It is printed, or written to output=FILE. With --checkpoint, its checkpoint is imported as a run
    at output=RUN, for the dataset data=DATASET.
    """
    given = configured(Places, places, "from-renee")
    if checkpoint is not None:
        if not given.data or not given.output:
            raise ReneeError("--checkpoint needs data=DATASET and output=RUN; give both")
        from renee_ray.service.from_renee import import_run

        name = call(import_run, command, checkpoint, given.data, given.output, gpus or 0)
        say(f"{given.output} is a run with the checkpoint {name}")
        return
    points = labels = 0
    if given.data:
        from renee_ray.data.dataset import Dataset

        manifest = Dataset.open(given.data).manifest
        points, labels = manifest.num_points("train"), manifest.num_labels
    made = translate(command, gpus=gpus or 0, data=given.data, points=points, labels=labels)
    _ = made.config  # every value is checked
    for note in made.notes:
        say(note)
    if output := given.output and absolute(given.output):
        filesystem, root = filesystem_of(output)
        if filesystem.get_file_info(root).type != FileType.NotFound:
            raise ReneeError(f"output={given.output} is there already; remove it or name another")
        replace_file(output, as_yaml(made, command).encode())
    else:
        click.echo(as_yaml(made, command), nl=False)
