"""`renee-ray labels`: the labels of a trained run, which come and go."""

from __future__ import annotations

import json

import click

from renee_ray.cli.common import PATH, call, json_option
from renee_ray.cli.output import print_result, say
from renee_ray.errors import printable


@click.group()
def labels() -> None:
    """Add labels to a trained run, retire them, or list them (docs/labels.md)."""


@labels.command("list")
@click.argument("run", type=PATH)
@click.option("--texts", is_flag=True, help="Write the texts alone, as a Y.txt for `convert`.")
@json_option
def list_labels(run: str, texts: bool, as_json: bool) -> None:
    """Write id, state, training points and text of each label of RUN, a line each."""
    from renee_ray.service.labels import list_labels as listed

    if as_json:
        click.echo(json.dumps({"labels": [each._asdict() for each in listed(run)]}))
        return
    for each in listed(run):
        shown = each.text if texts else "\t".join(map(str, each))
        click.echo(shown if texts else "\t".join(map(printable, shown.split("\t", 3))))


@labels.command()
@click.argument("run", type=PATH)
@click.argument("new", type=PATH)
@json_option
def add(run: str, new: str, as_json: bool) -> None:
    """Give the labels of the file NEW ids behind the last label of RUN, and rows by their texts.

    NEW is a .txt file with a label a line, or CSV, TSV, JSON lines or Parquet with columns
    `label`, the name, and `text`.
    """
    from renee_ray.service.labels import add_labels

    print_result(call(add_labels, run, new, say), as_json, f"labels of {run}")


def _change(run: str, given: tuple[str, ...], file: str, as_json: bool, restore: bool) -> None:
    from renee_ray.service.labels import retire_labels

    if not given and not file:
        raise click.UsageError("give labels, by id or name, or --file")
    found = call(lambda: retire_labels(run, given, file, say, restore=restore))
    print_result(found, as_json, f"labels of {run}")


FILE = click.option("--file", type=PATH, default=None, help="File of ids or names, one a line.")


@labels.command()
@click.argument("run", type=PATH)
@click.argument("given", nargs=-1, metavar="[ID|NAME]...")
@FILE
@json_option
def retire(run: str, given: tuple[str, ...], file: str | None, as_json: bool) -> None:
    """Hide labels of RUN from every result; their ids stay theirs."""
    _change(run, given, file or "", as_json, restore=False)


@labels.command()
@click.argument("run", type=PATH)
@click.argument("given", nargs=-1, metavar="[ID|NAME]...")
@FILE
@json_option
def restore(run: str, given: tuple[str, ...], file: str | None, as_json: bool) -> None:
    """Show retired labels of RUN again."""
    _change(run, given, file or "", as_json, restore=True)
