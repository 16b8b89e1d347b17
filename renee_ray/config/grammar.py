"""The grammar of configurations: YAML in which every scalar is a text, in files and overrides.

The schema makes numbers, booleans and words of the texts, so what YAML itself would make of `no`,
`1e-4` or `007` does not matter; a `null` without quotes alone is nothing. Text becomes a `Layer`:
nested mappings, and where each key was set, for the sentence of an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

COMMAND_LINE = "the command line"
NULLS = ("null", "~")


class NotYaml(Exception):
    """Raised for text that is not YAML, or not the YAML of a configuration.

    The message is empty or begins with a colon: the caller writes the start of the sentence.
    line: counted from 1; 0 where it is not known.
    """

    def __init__(self, text: str = "", line: int = 0) -> None:
        super().__init__(text)
        self.line = line


class WrongKey(NotYaml):
    """Raised for a key that cannot be where it is. The message is a whole sentence."""


class Layer(dict[str, Any]):
    """Nested mappings of keys to values. `places` has where each dotted key was set."""

    def __init__(self) -> None:
        super().__init__()
        self.places: dict[str, str] = {}

    def add(self, key: str, value: Any, place: str) -> None:
        """Sets a dotted key; an earlier value is replaced.

        Raises:
            WrongKey: another key stands in the way.
        """
        *parents, leaf = key.split(".")
        node: dict[str, Any] = self
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise WrongKey(
                    f"{key!r:.80} is set below {parent!r:.80}, which has a value already"
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

    Args:
        name: the file's name.

    Raises:
        NotYaml: the text is not YAML, or it has a WrongKey.
    """
    layer = Layer()
    root = _composed(text)
    if not isinstance(root, yaml.MappingNode):
        raise WrongKey("it holds no mapping of keys to values")
    for key, node, line in _leaves(root, "", set()):
        try:
            layer.add(key, _value(node), f"{name}, line {line}")
        except NotYaml as error:
            error.line = line
            raise
    return layer


def add_override(layer: Layer, key: str, text: str) -> None:
    """Adds a value of the command line: a list, a mapping, or else one scalar up to its end.

    Raises:
        NotYaml: a list, a mapping or a quoted text is not YAML, or there is a WrongKey.
    """
    if text[:1] not in ("[", "{", '"', "'"):
        layer.add(key, None if text in NULLS else text, COMMAND_LINE)
        return
    node = _composed(text)
    assert node is not None
    leaves = [(key, node)]
    if isinstance(node, yaml.MappingNode) and node.value:
        leaves = [(name, below) for name, below, _ in _leaves(node, f"{key}.", set())]
    for name, below in leaves:
        layer.add(name, _value(below), COMMAND_LINE)


def _leaves(
    node: yaml.MappingNode, prefix: str, seen: set[str]
) -> Iterator[tuple[str, yaml.Node, int]]:
    """Yields (dotted key, value, line) of each key in a mapping and in the mappings below it."""
    for key, value in node.value:
        name, line = f"{prefix}{key.value}", key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise NotYaml(": a key is no word", line)
        if name in seen:
            raise NotYaml(f": it has the key {name!r:.80} twice", line)
        seen.add(name)
        if isinstance(value, yaml.MappingNode) and value.value:
            yield from _leaves(value, f"{name}.", seen)
        else:
            yield name, value, line


def _value(node: yaml.Node) -> Any:
    """Returns the value of a node."""
    try:
        return _Loader("").construct_document(node)
    except yaml.YAMLError as error:
        raise NotYaml from error


def _composed(text: str) -> yaml.Node | None:
    """Returns the only document in a text; None where the text is empty."""
    try:
        return _Loader(text).get_single_node()
    except RecursionError:
        raise NotYaml(": it is nested too deeply") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise NotYaml("", mark.line + 1 if mark else 0) from error
