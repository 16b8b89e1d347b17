"""`renee-ray labels`: the labels of a trained run, which come and go."""

from __future__ import annotations

import json

import click

from renee_ray.cli.common import PATH, call, json_option
from renee_ray.cli.output import print_result, say
from renee_ray.errors import ReneeError, printable


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
        click.echo(json.dumps({"labels": list(listed(run))}))
        return
    for each in listed(run):
        if texts and {"\n", "\r"} & set(each["text"]):
            raise ReneeError(
                f"the text of label {each['id']} of {run} has a line break, which a Y.txt cannot "
                f"hold: all labels after it would shift; list them by --json"
            )
        shown = "\t".join(printable(str(value)) for value in each.values())
        click.echo(each["text"] if texts else shown)


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


def _changing(name: str, what: str, *, restore: bool) -> None:
    """Makes the command `name`."""

    @labels.command(name, help=what)
    @click.argument("run", type=PATH)
    @click.argument("given", nargs=-1, metavar="[ID|NAME]...")
    @click.option("--file", type=PATH, help="File of ids or names, one a line.")
    @json_option
    def change(run: str, given: tuple[str, ...], file: str | None, as_json: bool) -> None:
        from renee_ray.service.labels import retire_labels

        if not given and file is None:
            raise click.UsageError("give labels, by id or name, or --file")
        found = call(lambda: retire_labels(run, given, file or "", say, restore=restore))
        print_result(found, as_json, f"labels of {run}")


_changing("retire", "Hide labels of RUN from every result; their ids stay theirs.", restore=False)
_changing("restore", "Show retired labels of RUN again.", restore=True)
