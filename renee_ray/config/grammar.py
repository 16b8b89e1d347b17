"""The grammar of configurations: YAML 1.2's core schema, the same in files and overrides.

Text becomes a `Layer`: nested mappings, and where each key was set, for the sentence of an error.
A key whose value is a text takes a plain scalar as it is written, whatever YAML would make of it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

import yaml

KEY_DEPTH = 8
COMMAND_LINE = "the command line"
TREE = "tag:yaml.org,2002:"
SCALARS = {f"{TREE}{name}" for name in ("str", "null", "bool", "int", "float")}


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
            WrongKey: another key stands in the way, or this one has too many parts.
        """
        *parents, leaf = key.split(".")
        if len(parents) >= KEY_DEPTH:
            raise WrongKey(f"{key!r:.80} is no key: no key has so many parts")
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


class _Loader(yaml.SafeLoader):
    """YAML's core schema without aliases, since their expansion has no bound."""

    yaml_implicit_resolvers = {}  # noqa: RUF012

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise NotYaml(": a configuration may not use aliases (*name)")
        return super().compose_node(parent, index)

    def integer(self, node: yaml.ScalarNode) -> int:
        base = {"0o": 8, "0x": 16}.get(node.value[:2])
        return int(node.value[2:], base) if base else int(node.value)

    def number(self, node: yaml.ScalarNode) -> float:
        return float(re.sub(r"\.(?=inf|nan)", "", node.value.lower()))


for _name, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):
    _Loader.add_implicit_resolver(TREE + _name, re.compile(rf"(?:{_pattern})\Z"), _first)
_Loader.add_constructor(f"{TREE}int", _Loader.integer)
_Loader.add_constructor(f"{TREE}float", _Loader.number)


def parse_file(text: str, name: str, texts: Collection[str]) -> Layer:
    """Returns the layer of a file's text, in which a key may be dotted and may stand only once.

    Args:
        name: the file's name.
        texts: the dotted keys whose value is a text.

    Raises:
        NotYaml: the text is not YAML, or it has a WrongKey.
    """
    layer = Layer()
    root = _composed(text)
    if not isinstance(root, yaml.MappingNode):
        raise WrongKey("it holds no mapping of keys to values")
    for key, node, line in _leaves(root, "", set()):
        try:
            layer.add(key, _value(node, key in texts), f"{name}, line {line}")
        except NotYaml as error:
            error.line = line
            raise
    return layer


def add_override(layer: Layer, key: str, text: str, texts: Collection[str]) -> None:
    """Adds a value of the command line: a list, a mapping, or else one scalar up to its end.

    Raises:
        NotYaml: a list, a mapping or a quoted text is not YAML, or there is a WrongKey.
    """
    if key in texts:
        layer.add(key, _unquoted(text), COMMAND_LINE)
    elif text[:1] in ("[", "{", '"', "'"):
        node = _composed(text)
        assert node is not None
        leaves = [(key, node)]
        if isinstance(node, yaml.MappingNode) and node.value:
            leaves = [(name, below) for name, below, _ in _leaves(node, f"{key}.", set())]
        for name, below in leaves:
            layer.add(name, _value(below, name in texts), COMMAND_LINE)
    else:
        tag = _Loader("").resolve(yaml.ScalarNode, text, (True, False)) if text else f"{TREE}str"
        layer.add(key, _value(yaml.ScalarNode(tag, text), False), COMMAND_LINE)


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


def _unquoted(text: str) -> str:
    """Returns a text as it is written, without the YAML quotes around all of it."""
    if text[:1] not in ('"', "'"):
        return text
    try:
        node = _composed(text)
    except NotYaml:
        return text
    return str(node.value) if isinstance(node, yaml.ScalarNode) else text


def _value(node: yaml.Node, is_text: bool) -> Any:
    """Returns the value of a node."""
    if is_text and isinstance(node, yaml.ScalarNode) and node.tag in SCALARS:
        return node.value
    try:
        return _Loader("").construct_document(node)
    except Exception as error:  # constructors raise what their conversion raises
        raise NotYaml from error


def _composed(text: str) -> yaml.Node | None:
    """Returns the only document in a text; None where the text is empty."""
    try:
        return _Loader(text).get_single_node()
    except NotYaml:
        raise
    except RecursionError:
        raise NotYaml(": it is nested too deeply") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise NotYaml("", mark.line + 1 if mark else 0) from error
