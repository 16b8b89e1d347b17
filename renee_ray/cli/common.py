"""Pieces that all commands share: configuration keys, paths, options, the call of the service; and
their output: sentences to standard error, results to standard output."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click
from rich.console import Console, RenderableType
from rich.table import Column, Table
from rich.text import Text

from renee_ray.config.overrides import dotted, keys_of, make_config, parse_overrides
from renee_ray.config.schema import Config
from renee_ray.errors import ReneeError, printable, redacted
from renee_ray.signals import unwinding

T = TypeVar("T")
C = TypeVar("C", bound=Config)


class ConfiguredCommand(click.Command):
    """A command whose help lists the keys of its configuration model."""

    def __init__(self, *args: Any, keys: type[Config] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.keys = keys

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.keys is None:
            return
        with formatter.section("Keys (key=value, after the positional arguments)"):
            formatter.write_dl(
                [
                    (f"{key}: {kind} = {default}" if default != "required" else f"{key}: {kind}",
                     meaning)
                    for key, kind, default, meaning in keys_of(self.keys)
                ],
                col_max=44,
            )  # fmt: skip


def command(keys: type[Config], *paths: str) -> Callable[[Callable[..., None]], click.Command]:
    """Makes a command of paths, then `key=value`: a function (config, as_json, each path by name).

    Its name and its help are the function's.
    """

    def decorate(function: Callable[..., None]) -> click.Command:
        name = function.__name__

        def run(overrides: tuple[str, ...], **arguments: Any) -> None:
            function(config=configured(keys, overrides, name), **arguments)

        made = json_option(click.argument("overrides", nargs=-1)(run))
        for path in reversed(paths):
            made = click.argument(path, type=PATH)(made)
        return click.command(name, cls=ConfiguredCommand, keys=keys, help=function.__doc__)(made)

    return decorate


def configured(model: type[C], overrides: Sequence[str], command: str) -> C:
    """Makes a command's configuration from its `key=value` arguments alone."""
    return make_config(model, parse_overrides(overrides), where=command)


class PathType(click.ParamType):
    """A path or a URL; an empty one, of a variable that is not set, is refused."""

    name = "text"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if param is not None and not value.strip():
            raise ReneeError(f"{param.human_readable_name} is empty; give a path")
        return value


PATH = PathType()


def flag(name: str, kind: click.ParamType, default: Any, text: str) -> Callable[[Any], Any]:
    """A flag whose default is shown if it has one."""
    shown = default is not None
    return click.option(name, type=kind, default=default, show_default=shown, help=text)


def count(name: str, default: int | None, text: str, minimum: int = 1) -> Callable[[Any], Any]:
    """A flag that is a number, `minimum` at least."""
    return flag(name, click.IntRange(min=minimum), default, text)


def json_option(function: Any) -> Any:
    """Adds the flag --json."""
    return click.option(
        "--json", "as_json", is_flag=True, help="Write one JSON object to standard output."
    )(function)


def call(function: Callable[..., T], *arguments: Any) -> T:
    """Calls the service; a first signal is KeyboardInterrupt, and Ray's notices go to stderr."""
    with contextlib.redirect_stdout(sys.stderr), unwinding():
        return function(*arguments)


progress = Console(stderr=True)


def say(text: str, style: str | None = None) -> None:
    """Writes a sentence to standard error, on one line however narrow the terminal."""
    shown = printable(redacted(text))
    progress.print(shown, style=style, markup=False, highlight=False, soft_wrap=True)


def print_facts(
    facts: dict[str, Any], as_json: bool, shown: Callable[[dict[str, Any]], RenderableType]
) -> None:
    """Writes facts to standard output: one JSON object, or `shown(facts)`, which is for people."""
    if as_json:
        click.echo(json.dumps(facts))
    else:
        Console().print(shown(facts), highlight=False)


def print_result(content: dict[str, Any], as_json: bool, title: str) -> None:
    """Writes a result to standard output: one JSON object, or a table and lines."""
    if as_json:
        click.echo(json.dumps(content))
        return
    flat = {key.removeprefix("metrics."): value for key, value in dotted(content)}
    if metrics := {k: v for k, v in flat.items() if "@" in k}:
        Console().print(_metric_table(metrics, title))
    for key, value in flat.items():
        if key not in metrics:
            shown = f"{value:.6g}" if isinstance(value, float) else value
            click.echo(printable(f"{key:28} {shown}"))


def _metric_table(metrics: dict[str, float], title: str) -> Table:
    families = list(dict.fromkeys(name.partition("@")[0] for name in metrics))
    ks = sorted({int(name.partition("@")[2]) for name in metrics})
    columns = (Column(f"@{k}", justify="right") for k in ks)
    table = Table("", *columns, title=Text(printable(title)))
    for family in families:
        cells = (metrics.get(f"{family}@{k}") for k in ks)
        table.add_row(family, *("" if v is None else f"{v:.2f}" for v in cells))
    return table
