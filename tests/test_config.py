"""Configuration: one grammar for overrides and files; errors name key, value and remedy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from renee_ray.config.overrides import dotted, keys_of, make_config, parse_overrides, read_yaml
from renee_ray.config.schema import ConvertConfig, RunConfig
from renee_ray.config.score import ScoreConfig
from renee_ray.errors import ConfigError, ReneeError

REQUIRED: dict[str, Any] = {"data": "d", "output": "o"}


@pytest.mark.parametrize(
    ("arguments", "tree"),
    [
        ([], {}),
        (["a=1"], {"a": "1"}),
        (["a.b=1", "a.c=x", "d=2.5"], {"a": {"b": "1", "c": "x"}, "d": "2.5"}),
        (["a=1", "a=2"], {"a": "2"}),
        (["a="], {"a": ""}),
        (["a=null"], {"a": None}),
        (["path=s3://bucket/x=y"], {"path": "s3://bucket/x=y"}),
        (["a='1'"], {"a": "1"}),
        (["a=[1, 2]"], {"a": ["1", "2"]}),
        (["a={b: 1, c: {d: 2}}", "a.b=3"], {"a": {"b": "3", "c": {"d": "2"}}}),
        (["a.b=3", "a={c: 1}"], {"a": {"b": "3", "c": "1"}}),
    ],
)
def test_overrides(arguments: list[str], tree: dict[str, Any]) -> None:
    assert parse_overrides(arguments) == tree


@pytest.mark.parametrize(
    "text", ["no", "10:00", "2026-11-28", "1_000", "007", "0o8", "1e-4", "<<", "=", "true", "null"]
)
def test_scalars_mean_the_same_in_files_and_overrides(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"seed: {text}\nnum_workers: [{text}]\n")
    file, given = read_yaml(str(path)), parse_overrides([f"seed={text}", f"num_workers=[{text}]"])
    value = None if text == "null" else text
    assert file == given == {"seed": value, "num_workers": [value]}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("encoder.learning_rate=1e-4", 1e-4), ("encoder.dropout=.5", 0.5), ("seed=010", 10),
        ("seed=+7", 7), ("encoder.compile=true", True), ("encoder.internal_dropout=null", None),
        ("evaluation.tails=[0, 0.1]", (0.0, 0.1)), ("num_workers=[1, 2]", (1, 2)),
        ("encoder.internal_dropout=~", None), ("observe.log_to=[mlflow]", ("mlflow",)),
    ],
)  # fmt: skip
def test_the_schema_reads_texts(text: str, value: Any) -> None:
    made = make_config(RunConfig, REQUIRED, parse_overrides([text]))
    found = dict(dotted(made.model_dump()))[text.partition("=")[0]]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("word", ["yes", "no", "auto"])
def test_use_gpu_is_a_word(tmp_path: Path, word: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"data: d\noutput: o\nuse_gpu: {word}\nencoder:\n  autocast: off\n")
    made = make_config(RunConfig, read_yaml(str(path)))
    assert (made.use_gpu, made.encoder.autocast) == (word, "off")
    layers = parse_overrides([f"use_gpu={word}", "encoder.autocast=off"])
    made = make_config(RunConfig, REQUIRED, layers)
    assert (made.use_gpu, made.encoder.autocast) == (word, "off")
    assert make_config(ScoreConfig, parse_overrides([f"use_gpu={word}"]))


def test_what_is_no_boolean_is_told_the_words_of_yaml() -> None:
    with pytest.raises(ConfigError, match=r"^encoder\.compile='maybe' .* should be true or false$"):
        make_config(RunConfig, REQUIRED, parse_overrides(["encoder.compile=maybe"]))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((text, text) for text in ("123", "007", "2026-11-28", "runs/x #3", "a: b", "*x", "!x y",
                                    "x=y", " x", "@x", "C:\\x")),
        ("'a b'", "a b"), ('"a\\tb"', "a\tb"), ("'null'", "null"),
    ],
)  # fmt: skip
def test_a_text_stands_as_it_is_unless_it_is_quoted(text: str, value: str) -> None:
    made = make_config(RunConfig, REQUIRED, parse_overrides([f"output={text}"]))
    assert made.output == value


def test_a_text_in_a_file_may_look_like_something_else(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("data: 007\noutput: 2026-11-28  # tonight\nencoder: {name: 'null'}\n")
    made = make_config(RunConfig, read_yaml(str(path)))
    assert (made.data, made.output, made.encoder.name) == ("007", "2026-11-28", "null")


@pytest.mark.parametrize("key", ["data", "output", "encoder.name"])
@pytest.mark.parametrize("text", ["", " ", "''"])
def test_a_path_is_not_empty(key: str, text: str) -> None:
    """`output=$UNSET` would else mean the current directory."""
    with pytest.raises(ConfigError, match=rf"^{key}=.* on the command line .* it is empty"):
        make_config(RunConfig, REQUIRED, parse_overrides([f"{key}={text}"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["seed"], "'seed' is not of the form key=value"),
        (["=3"], "'=3' is not of the form key=value"),
        (["a=[1"], "'a=[1', line 1 is not valid YAML"),
        (["a=1", "a.b=2"], "'a.b' is set below 'a'"),
        (["a={b: 1, b: 2}"], "has the key 'a.b' twice"),
    ],
)
def test_wrong_overrides(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_overrides(arguments)


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
        ({"encoder": {"bag": {"dim": 8, "ngrams": 0}}}, "encoder.bag.ngrams=0"),
        ({"encoder": {"name": "none"}}, "without a bag; set encoder.bag.dim"),
        ({"encoder": {"name": "none", "bag": {"dim": 8}, "bottleneck": 4}}, "bottleneck needs a"),
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
    assert read_yaml(str(path)) == {"seed": "3", "encoder": {"dropout": "0.25"}}


def test_a_file_may_have_dotted_keys(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("encoder.dropout: 0.25\nencoder:\n  name: x\n")
    assert read_yaml(str(path)) == {"encoder": {"dropout": "0.25", "name": "x"}}


def test_an_error_names_where_the_value_stands(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("data: d\noutput: o\nbatch_size: 0\nencoder:\n  dropout: 2\n  droput: 1\n")
    good = ["batch_size=8", "encoder.dropout=0"]
    for overrides, sentence in (
        ([], f"batch_size='0' in {path}, line 3 is wrong"),
        (good[:1], f"encoder.dropout='2' in {path}, line 5 is wrong"),
        (good, f"{path}, line 6 has no key 'encoder.droput'"),
        (["batch_size=-1"], "batch_size='-1' on the command line is wrong"),
        (["encoder=3", *good[:1]], "encoder='3' on the command line is wrong"),
    ):
        with pytest.raises(ConfigError, match=re.escape(sentence)):
            make_config(RunConfig, read_yaml(str(path)), parse_overrides(overrides), where="both")
    with pytest.raises(ConfigError, match="the command line has no key 'encodr'"):
        make_config(RunConfig, REQUIRED, parse_overrides(["encodr.name=x"]), where="recipe")
    with pytest.raises(ConfigError, match="num_workers='x' on the command line is wrong"):
        make_config(RunConfig, REQUIRED, parse_overrides(["num_workers=x"]), where="recipe")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"encoder: 3\nencoder.name: x\n", "line 2: 'encoder.name' is set below 'encoder'"),
        (b"encoder.name: y\nencoder:\n  name: x\n", "line 3 .* the key 'encoder.name' twice"),
        (b"encoder: {name: y}\nencoder: {dropout: 0}\n", "line 2 .* the key 'encoder' twice"),
        (b"? [a]\n: 1\n", "a key is no word"),
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


def test_a_recipe_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()
    assert read_yaml("quickstart")["encoder"]["max_length"] == "64", "a directory is in the way"
    (tmp_path / "lf-debian-40k").write_text("seed: 3\n")
    assert read_yaml("lf-debian-40k") == {"seed": "3"}, "an existing file wins"
    for path in ("quickstart.yaml", "./quickstart", "recipes/quickstart"):
        with pytest.raises(ConfigError, match=f"cannot read {path}"):
            read_yaml(path)


@pytest.mark.parametrize("name", ["lf-debian", "lf-debian-40k.yml", "LF-Debian-40K"])
def test_an_unknown_recipe_is_refused_with_the_nearest(name: str) -> None:
    sentence = rf"'{name}' is neither a file nor .*; did you mean 'lf-debian-40k'"
    with pytest.raises(ConfigError, match=sentence):
        read_yaml(name)
