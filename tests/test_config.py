"""Configuration: one grammar for overrides and files; errors name key, value and remedy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from renee_ray.config import (
    ConfigError,
    ConvertConfig,
    ReneeError,
    RunConfig,
    ScoreConfig,
    keys_of,
    make_config,
    parse_overrides,
    read_yaml,
)

REQUIRED: dict[str, Any] = {"data": "d", "output": "o"}


@pytest.mark.parametrize(
    ("arguments", "tree"),
    [
        ([], {}),
        (["a=1"], {"a": 1}),
        (["a.b=1", "a.c=x", "d=2.5"], {"a": {"b": 1, "c": "x"}, "d": 2.5}),
        (["a=1", "a=2"], {"a": 2}),
        (["a="], {"a": ""}),
        (["a=null"], {"a": None}),
        (["a=true"], {"a": True}),
        (["path=s3://bucket/x=y"], {"path": "s3://bucket/x=y"}),
        (["a='1'"], {"a": "1"}),
        (["a=[1, 2]"], {"a": [1, 2]}),
    ],
)
def test_overrides(arguments: list[str], tree: dict[str, Any]) -> None:
    assert parse_overrides(arguments) == tree


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["seed"], "'seed' is not of the form key=value"),
        (["=3"], "'=3' is not of the form key=value"),
        (["a=[1"], "'a=[1' is not YAML"),
        (["a=1", "a.b=2"], "'a.b' is set below 'a'"),
    ],
)
def test_wrong_overrides(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_overrides(arguments)


def test_an_exponent_without_a_point_is_a_number() -> None:
    """YAML 1.1 reads 1e-4 as a string; learning rates are written so."""
    tree = parse_overrides(["encoder.learning_rate=1e-4"])
    assert make_config(RunConfig, REQUIRED, tree).encoder.learning_rate == 1e-4


def test_later_layers_win_key_by_key() -> None:
    recipe = {**REQUIRED, "encoder": {"dropout": 0.5, "max_length": 16}, "seed": 3}
    made = make_config(RunConfig, recipe, {"encoder": {"dropout": 0.1}}, {"seed": 4})
    assert (made.encoder.dropout, made.encoder.max_length, made.seed) == (0.1, 16, 4)
    assert recipe["encoder"] == {"dropout": 0.5, "max_length": 16}, "a layer was changed"


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"data": "d"}, "lacks 'output'; add output=VALUE"),
        ({"sead": 1}, "no key 'sead'; did you mean 'seed'?"),
        ({"encoder": {"droput": 0.1}}, "no key 'encoder.droput'; did you mean 'encoder.dropout'?"),
        ({"classifier": {"precision": "fp7"}}, "classifier.precision='fp7'"),
        ({"seed": "x"}, "seed='x'"),
        ({"seed": -1}, "seed=-1"),
        ({"encoder": {"dropout": 1.0}}, "encoder.dropout=1.0"),
        ({"encoder": 3}, "encoder=3"),
        ({"epochs": 0}, "epochs=0"),
        ({"batch_size": 100, "feed": {"streams": 8}}, "batch_size 100 is not a multiple"),
        ({"num_workers": 257}, "num_workers 257 exceeds batch_size 256"),
    ],
)
def test_wrong_values_are_named_in_one_sentence(tree: dict[str, Any], message: str) -> None:
    base = {} if tree == {"data": "d"} else REQUIRED
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        make_config(RunConfig, base, tree, where="recipe.yaml")
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ReneeError)


@pytest.mark.parametrize("seed", [2**32 - 1, 2**32, 2**63])
def test_a_seed_is_refused_or_can_be_used(seed: int) -> None:
    """Streams of random numbers are seeded by (seed << 32) + i, which must fit 64 bits."""
    try:
        made = make_config(RunConfig, REQUIRED, {"seed": seed})
    except ConfigError:
        return
    assert made.seed << 32 < 2**64


def test_a_configuration_is_frozen() -> None:
    config = make_config(RunConfig, REQUIRED)
    with pytest.raises(ValidationError):
        config.seed = 3
    with pytest.raises(ValidationError):
        config.encoder.dropout = 0.5


@pytest.mark.parametrize("model", [RunConfig, ConvertConfig, ScoreConfig])
def test_every_key_has_a_meaning(model: Any) -> None:
    keys = list(keys_of(model))
    assert len({key for key, *_ in keys}) == len(keys) > 5
    for key, kind, default, meaning in keys:
        assert kind and default, key
        assert len(meaning) > 10, key
        assert "\n" not in meaning


def test_keys_are_dotted_and_typed() -> None:
    keys = {key: rest for key, *rest in keys_of(RunConfig)}
    assert keys["data"][:2] == ["str", "required"]
    assert keys["encoder.dropout"][:2] == ["float", "0.0"]
    assert "'sdpa'" in keys["encoder.attention"][0]
    assert "None" in keys["encoder.internal_dropout"][0]
    assert "encoder" not in keys


def test_yaml_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("seed: 3\nencoder:\n  dropout: 0.25\n")
    assert read_yaml(str(path)) == {"seed": 3, "encoder": {"dropout": 0.25}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read .*: No such file"),
        (b"- 1\n- 2\n", "holds no mapping"),
        (b"", "holds no mapping"),
        (b"a: 1\nb: [1\nc: 2\n", "line 3 is not valid YAML"),
        (b"a: \xff\xfe\n", "is not valid YAML"),
    ],
)
def test_wrong_files(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_yaml(str(path))
    assert str(path) in str(caught.value)
