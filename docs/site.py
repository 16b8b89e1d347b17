"""Hooks of mkdocs: the reference pages are made from the code, so that they cannot differ from it.

A page names what belongs in a place by `<!-- generated: NAME -->`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import click

from renee_ray.cli.common import ConfiguredCommand
from renee_ray.cli.main import cli
from renee_ray.config.overrides import keys_of
from renee_ray.config.schema import Config, RunConfig


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Puts generated text where a page asks for it."""
    return re.sub(r"<!-- generated: (\w+) -->", lambda found: GENERATED[found[1]](), markdown)


def commands() -> str:
    """Describes every command: usage, help, arguments, options, and where its keys are."""
    return "\n\n".join(text for name in cli.commands for text in _command(cli.commands[name], name))


def _command(command: click.Command, name: str) -> Iterator[str]:
    context = click.Context(command, info_name=f"renee-ray {name}")
    yield f"## {name}\n\n    {command.get_usage(context).removeprefix('Usage: ')}"
    yield _paragraphs(command.help or "")
    rows = [
        (f"`{', '.join(option.opts)}`", option.help or "")
        for option in command.params
        if isinstance(option, click.Option)
    ]
    if rows:
        yield _table(("option", "meaning"), rows)
    if isinstance(command, ConfiguredCommand) and command.keys is not None:
        title = command.keys.__name__
        yield f"Keys: [{title}](configuration.md#{title.lower()})."
    if isinstance(command, click.Group):
        for child in command.commands:
            for text in _command(command.commands[child], f"{name} {child}"):
                yield text.replace("## ", "### ", 1) if text.startswith("## ") else text


def configuration() -> str:
    """Lists the keys of every command's configuration, a table for each nested section."""
    models = {
        command.keys.__name__: command.keys
        for command in cli.commands.values()
        if isinstance(command, ConfiguredCommand) and command.keys is not None
    }
    return "\n\n".join(
        text for model in sorted(models.values(), key=_first) for text in _model(model)
    )


def _first(model: type[Config]) -> tuple[bool, str]:
    return model is not RunConfig, model.__name__


def _model(model: type[Config]) -> Iterator[str]:
    yield f"## {model.__name__}\n\n{_paragraphs(model.__doc__ or '')}"
    sections: dict[str, list[tuple[str, ...]]] = {}
    # A run's keys stand under RunConfig alone.
    inherits = issubclass(model, RunConfig) and model is not RunConfig
    known = {key for key, *_ in keys_of(RunConfig)} if inherits else set()
    for key, kind, default, meaning in keys_of(model):
        if key in known:
            continue
        shown = "" if default == "required" else f" = `{default}`"
        row = (f"`{key}`<br>{_kind(kind)}{shown}", _literal(meaning))
        sections.setdefault(key.rpartition(".")[0], []).append(row)
    for section, rows in sections.items():
        if section:
            yield f"### {section} {{#{model.__name__.lower()}-{section.replace('.', '-')}}}"
        yield _table(("key", "meaning"), rows)


def _kind(annotation: str) -> str:
    """Says a type as a reader of YAML would."""
    words = re.sub(r"Literal\[(.*?)\]", lambda found: found[1].replace("'", ""), annotation)
    return words.replace(" | ", " or ").replace("None", "null")


def http() -> str:
    """Describes the paths that a service answers, by its OpenAPI document."""
    from renee_ray.config.score import ServeConfig
    from renee_ray.service.serve.http import Bearer, application

    nobody = Bearer("-" * 32)  # nothing is served here
    document = application(ServeConfig(), nobody, lambda: None).openapi()  # type: ignore[arg-type]
    found = []
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            found.append(f"## {method.upper()} {path}\n\n{operation.get('description', '')}")
            rows = [
                (f"`{code}`", each["description"]) for code, each in operation["responses"].items()
            ]
            found.append(_table(("status", "meaning"), rows))
    return "\n\n".join(found)


def _paragraphs(text: str) -> str:
    lines = [line.strip() for line in text.replace("\b", "").splitlines()]
    return _literal("\n".join(lines))


def _literal(text: str) -> str:
    return re.sub(r"(?<!`)([<*_])(?![^`]*`[^`]*$)", r"\\\1", text) if "`" not in text else text


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


GENERATED: dict[str, Callable[[], str]] = {
    "commands": commands,
    "configuration": configuration,
    "http": http,
}
