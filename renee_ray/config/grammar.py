"""The grammar of configurations: YAML in which every scalar is a text, in files and overrides.

The schema makes numbers, booleans and words of the texts, so what YAML itself would make of `no`,
`1e-4` or `007` does not matter; a `null` without quotes alone is nothing. Text becomes a `Layer`:
nested mappings, and where each key was set, for the sentence of an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from renee_ray.errors import SHOWN, ConfigError

COMMAND_LINE = "the command line"
NULLS = ("null", "~")


class Layer(dict[str, Any]):
    """Nested mappings of keys to values. `places` has where each dotted key was set."""

    def __init__(self) -> None:
        super().__init__()
        self.places: dict[str, str] = {}

    def add(self, key: str, value: Any, place: str) -> None:
        """Sets a dotted key; an earlier value is replaced.

        Raises:
            ConfigError: another key stands in the way.
        """
        *parents, leaf = key.split(".")
        node: dict[str, Any] = self
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(
                    f"{place}: {key!r:.80} is set below {parent!r:.80}, which has a value already"
                )
        node[leaf] = value
        self.places[key] = place

    def place_of(self, key: str) -> str | None:
        """Returns where a key was set, else the nearest key above it, else the first below it."""
        above = key
        while above not in self.places and "." in above:
            above = above.rpartition(".")[0]
        below = (place for name, place in self.places.items() if name.startswith(f"{key}."))
        return self.places.get(above) or next(below, None)


class _Loader(yaml.BaseLoader):
    """Makes texts of scalars."""

    def construct_scalar(self, node: yaml.ScalarNode) -> Any:
        is_null = node.style is None and node.value in NULLS
        return None if is_null else super().construct_scalar(node)


def parse_file(text: str, name: str) -> Layer:
    """Returns the layer of a file's text, in which a key may be dotted and may stand only once.

    Raises:
        ConfigError: the text is not YAML, or not the YAML of a configuration.
    """
    layer, root = Layer(), _composed(text, name)
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{name}: it holds no mapping of keys to values")
    for key, node, place in _leaves(root, "", name, set()):
        layer.add(key, _value(node, place), place)
    return layer


def add_override(layer: Layer, key: str, text: str) -> None:
    """Adds a value of the command line: a list, a mapping, or else one scalar up to its end.

    Raises:
        ConfigError: a list, a mapping or a quoted text is not YAML, or another key is in the way.
    """
    if text[:1] not in ("[", "{", '"', "'"):
        layer.add(key, None if text in NULLS else text, COMMAND_LINE)
        return
    where = f"the value of {f'{key}={text}'!r:.{SHOWN}}"
    node = _composed(text, where)
    assert node is not None
    leaves = [(key, node)]
    if isinstance(node, yaml.MappingNode) and node.value:
        leaves = [(name, below) for name, below, _ in _leaves(node, f"{key}.", where, set())]
    for name, below in leaves:
        layer.add(name, _value(below, where), COMMAND_LINE)


def _leaves(
    node: yaml.MappingNode, prefix: str, where: str, seen: set[str]
) -> Iterator[tuple[str, yaml.Node, str]]:
    """Yields (dotted key, value, place) of each key in a mapping and in the mappings below it."""
    for key, value in node.value:
        name, place = f"{prefix}{key.value}", f"{where}, line {key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{place}: a key is no word")
        if name in seen:
            raise ConfigError(f"{place} has the key {name!r:.80} twice; leave one out")
        seen.add(name)
        if isinstance(value, yaml.MappingNode) and value.value:
            yield from _leaves(value, f"{name}.", where, seen)
        else:
            yield name, value, place


def _value(node: yaml.Node, where: str) -> Any:
    """Returns the value of a node."""
    try:
        return _Loader("").construct_document(node)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML; quote or correct it") from error


def _composed(text: str, where: str) -> yaml.Node | None:
    """Returns the only document in a text; None where the text is empty."""
    try:
        return _Loader(text).get_single_node()
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{where}{line} is not valid YAML; quote or correct it") from error
