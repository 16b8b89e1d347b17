"""Makes configurations of YAML files and `key=value` arguments, with dots for nested keys.

grammar.py defines what both may contain.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from renee_ray.config.grammar import COMMAND_LINE, Layer, add_override, parse_file
from renee_ray.config.recipes import About, find_recipe
from renee_ray.config.schema import Config, RunConfig
from renee_ray.errors import SHOWN, ConfigError

IN_YAML = {"a valid boolean": "true or false", "a valid tuple": "a list, as [a, b]"}

C = TypeVar("C", bound=Config)


def parse_overrides(arguments: Iterable[str]) -> Layer:
    """Returns `{"a": {"b": "1"}, "c": "x"}` for `["a.b=1", "c=x"]`.

    Raises:
        ConfigError: an argument has no `=`, or its value is not YAML.
    """
    layer = Layer()
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or not key:
            raise ConfigError(f"argument {argument!r} is not of the form key=value")
        add_override(layer, key, text)
    return layer


def dotted(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields `("a.b", 1)` for `{"a": {"b": 1}}`: the inverse of `parse_overrides`."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from dotted(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def changed(config: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yields (key, value, default) of the settings of a run, as JSON has them, that are not so."""
    defaults = RunConfig(data="-", output="-").model_dump(mode="json")
    usual = dict(dotted(defaults))
    for key, value in dotted(config):
        if key not in ("data", "output") and value != usual.get(key):
            yield key, value, usual.get(key)


def make_config(model: type[C], *layers: Mapping[str, Any], where: str = "the configuration") -> C:
    """Returns a `model` made of mappings; for each key the last mapping that has it wins.

    Args:
        where: what an error names for a key whose place no `Layer` knows.

    Raises:
        ConfigError: one sentence with the key, the value, its place and the remedy.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        _merge(merged, layer)
    try:
        return model.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(_sentence(model, error, layers, where)) from None


def read_yaml(path: str) -> Layer:
    """Returns the mapping in a YAML file, given by its path or as the name of a recipe.

    Raises:
        ConfigError: there is no such recipe, or the file cannot be read, is not YAML, or is not a
            mapping.
    """
    return read_recipe(path)[0]


def read_recipe(path: str) -> tuple[Layer, About | None]:
    """Returns what `read_yaml` does, and what the file says of itself under the key `about`."""
    name, path = path, str(find_recipe(path) or path)
    layer = _parsed(path)
    about = layer.pop("about", None)
    if not isinstance(about, dict | None):
        raise ConfigError(f"about={about!r:.{SHOWN}} in {path} is no mapping; leave it out")
    if path != name:
        layer.add("recipe", name, "the name of the recipe")
    return layer, None if about is None else make_config(About, about, where=f"about in {path}")


def _parsed(path: str) -> Layer:
    try:
        return parse_file(Path(path).read_text("utf-8"), path)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not valid YAML: it is not in UTF-8") from error


def keys_of(model: type[Config], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Yields (key, type, default, meaning) of every key; nested keys are dotted."""
    # Its own before what it shares with others.
    for name in dict.fromkeys([*inspect.get_annotations(model), *model.model_fields]):
        field = model.model_fields[name]
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Config):
            yield from keys_of(kind, f"{prefix}{name}.")
            continue
        text = getattr(kind, "__name__", "")
        if text in ("", "Literal", "Optional", "Union", "UnionType"):
            text = str(kind).replace("typing.", "")
        default = "required" if field.is_required() else repr(field.default)
        yield prefix + name, text, default, " ".join((field.description or "").split())


def _merge(into: dict[str, Any], layer: Mapping[str, Any]) -> None:
    for key, value in layer.items():
        if isinstance(value, dict):
            node = into[key] if isinstance(into.get(key), dict) else {}
            _merge(node, value)
            into[key] = node
        else:
            into[key] = value


def _sentence(
    model: type[Config], error: ValidationError, layers: Iterable[Mapping[str, Any]], where: str
) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    names = [name for name, *_ in keys_of(model)]
    for layer in layers:
        if isinstance(layer, Layer):
            where = layer.place_of(key) or where
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key[:SHOWN], names, 1, 0.0)
        return f"{where} has no key {key!r:.{SHOWN}}; did you mean {near[0]!r}?"
    if first["type"] == "missing":
        return f"{where} lacks {key!r}; add {key}=VALUE"
    message = first["msg"].removeprefix("Value error, ").partition(", unable to")[0]
    for python, yaml in IN_YAML.items():
        message = message.replace(python, yaml)
    if not key:
        return message
    # For a key with several types, pydantic appends the type that it tried first.
    key = next((name for name in names if key.startswith(f"{name}.")), key)
    at = f"on {where}" if where == COMMAND_LINE else f"in {where}"
    return f"{key}={first['input']!r:.{SHOWN}} {at} is wrong: {message[0].lower()}{message[1:]}"
