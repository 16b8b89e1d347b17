"""Settings by themselves: the recipe that fits, and what of it follows from dataset and machine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from renee_ray.cli.main import main
from renee_ray.cli.train import automatic, checked
from renee_ray.config.overrides import dotted, make_config, parse_overrides, read_yaml
from renee_ray.config.schema import RunConfig
from renee_ray.data.dataset import Dataset, Part
from renee_ray.data.dataset.manifest import Manifest
from renee_ray.errors import ConfigError
from renee_ray.plan.settings import ENOUGH, LARGE, SAVED, SMALL, TAILS, choose, choose_from
from renee_ray.service.run.directory import RUN_FILE, RunDirectory

from ..data.tiny import write_tiny

MINILM = "sentence-transformers/all-MiniLM-L6-v2"


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return write_tiny(tmp_path / "set")


@pytest.mark.parametrize(
    ("points", "gpus", "tokenizer", "recipe"),
    [
        (SMALL - 1, 0, MINILM, "quickstart"),
        (SMALL, 0, MINILM, "lf-debian-40k"),
        (LARGE - 1, 2, MINILM, "lf-debian-40k"),
        (LARGE, 8, MINILM, "lf-debian-40k-minilm"),
        (SMALL - 1, 1, "", "perl-bag"),
        (LARGE, 0, "", "debian-bag"),
    ],
)
def test_the_recipe_follows_from_points_gpus_and_model(
    dataset: Dataset, tmp_path: Path, points: int, gpus: int, tokenizer: str, recipe: str
) -> None:
    part = Part("train/part-00000.parquet", points, 0, points, "0" * 64)
    splits: dict[str, Any] = {**dataset.manifest.splits, "train": (part,)}
    manifest = replace(
        dataset.manifest, splits=splits, tokenizer=tokenizer or str(tmp_path), max_length=500
    )
    settings, lines = choose(manifest, gpus, 4)
    config = make_config(RunConfig, settings, {"data": "d", "output": "o"})
    assert config.recipe == recipe and recipe in lines[0]
    assert config.encoder.name == (tokenizer or "none")
    assert config.encoder.max_length == 128
    assert config.num_workers == (gpus or read(recipe, "num_workers"))
    assert config.batch_size == (1024 if points == LARGE else read(recipe, "batch_size"))
    assert bool(config.evaluation.neighbours) == (points < LARGE and bool(tokenizer))
    assert config.feed.augment > 0
    assert not config.evaluation.tails, "the tiny dataset has a few validation points"
    alone, _ = choose(manifest, gpus, 4, {"encoder.name": "none"})
    assert make_config(RunConfig, alone, {"data": "d", "output": "o"}).encoder.name == "none"
    bare, _ = choose(replace(manifest, has_label_texts=False), gpus, 1)
    config = make_config(RunConfig, bare, {"data": "d", "output": "o"})
    assert config.feed.augment == 0 and config.num_workers == (gpus or 1)


@pytest.mark.parametrize(("labels", "share"), [(LARGE - 1, 1.0), (LARGE, 0.02), (4 * LARGE, 0.005)])
def test_many_labels_do_not_make_many_label_texts(
    dataset: Dataset, labels: int, share: float
) -> None:
    part = Part("train/part-00000.parquet", 20_000, 0, 20_000, "0" * 64)
    splits: dict[str, Any] = {**dataset.manifest.splits, "train": (part,)}
    manifest = replace(
        dataset.manifest, splits=splits, tokenizer=MINILM, num_labels=labels, has_label_texts=True
    )
    config = made(manifest)
    assert config.feed.augment == share
    assert config.classifier.precision == ("auto" if labels >= LARGE else "bf16_sr")
    settings, _ = choose(manifest, 0, 2, {"feed.augment": 1.0})
    assert settings["feed"]["augment"] == "1", "what the user gives comes over the recipe's"


@pytest.mark.parametrize(
    ("pooling", "architecture", "expected"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "BertModel", "cls"),
        ({"pooling_mode_cls_token": False, "pooling_mode_lasttoken": True}, "Qwen3Model", "last"),
        ({"pooling_mode": "lasttoken"}, "Qwen3ForCausalLM", "last"),
        ({"pooling_mode_mean_tokens": True}, "LlamaForCausalLM", "mean"),
        (None, "LlamaForCausalLM", "last"),
        (None, "BertModel", "mean"),
    ],
)
def test_a_model_is_pooled_as_it_was_trained(
    dataset: Dataset, tmp_path: Path, pooling: Any, architecture: str, expected: str
) -> None:
    model = tmp_path / "model"
    (model / "1_Pooling").mkdir(parents=True)
    (model / "model.safetensors").touch()
    (model / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    if pooling is not None:
        (model / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    assert made(replace(dataset.manifest, tokenizer=str(model))).encoder.pooling == expected


def made(manifest: Manifest) -> RunConfig:
    settings, _ = choose(manifest, 0, 2)
    return make_config(RunConfig, settings, {"data": "d", "output": "o"})


def read(recipe: str, key: str) -> int:
    return int(read_yaml(recipe)[key])


@pytest.mark.parametrize(
    ("points", "labels", "given", "share"),
    [
        (SMALL, SMALL, {}, 0.33),
        (SMALL, LARGE, {}, 0),
        (LARGE, SMALL, {}, 0),
        (SMALL, SMALL, {"encoder.frozen": False}, 0),
        (SMALL, SMALL, {"encoder.lora.rank": 4}, 0),
        (SMALL - 1, LARGE, {}, 0),
    ],
)
def test_large_or_wholly_trained_models_are_not_averaged(
    dataset: Dataset, points: int, labels: int, given: dict[str, Any], share: float
) -> None:
    chosen, _ = choose(sized(dataset, points, labels, tokenizer=MINILM), 0, 2, given)
    assert float(chosen.get("average", 0)) == share


def test_a_run_needs_data_and_output(capsys: pytest.CaptureFixture[str]) -> None:
    for given, missing in (["data=d"], "output"), (["output=o"], "data"), ([], "data"):
        assert main(["train", *given]) == 1
        assert f"lacks '{missing}'" in capsys.readouterr().err


def test_the_adjustment_is_chosen_where_validation_points_are_enough(dataset: Dataset) -> None:
    def chosen(points: int, **given: Any) -> object:
        part = Part("validation/part-00000.parquet", points, 0, points, "0" * 64)
        splits: dict[str, Any] = {**dataset.manifest.splits, "validation": (part,)}
        settings, _ = choose(replace(dataset.manifest, splits=splits), 0, 2, given)
        return settings["evaluation"].get("tails")

    assert chosen(ENOUGH) == TAILS and chosen(ENOUGH - 1) is None
    assert chosen(ENOUGH, **{"evaluation.tail": 0.3}) is None


def test_the_last_weights_are_kept_unless_the_user_says_when_to_validate(dataset: Dataset) -> None:
    chosen, _ = choose(dataset.manifest, 0, 2)
    assert (chosen["evaluation"]["every"], chosen["checkpoint"]["every_steps"]) == (0, SAVED)
    kept, _ = choose(dataset.manifest, 0, 2, {"evaluation.every": 1.0})
    assert (int(kept["evaluation"]["every"]), kept["checkpoint"]["every_steps"]) == (4, 0)
    large = sized(dataset, LARGE, 4)
    for given, steps in (
        ({}, LARGE // 1024), ({"batch_size": 8192}, LARGE // 8192), ({"evaluation.every": 1.0}, 0)
    ):  # fmt: skip
        chosen, _ = choose(replace(large, tokenizer=MINILM), 2, 2, given)
        assert chosen["recipe"] == "lf-debian-40k-minilm"
        assert chosen["checkpoint"]["every_steps"] == steps


def test_a_frozen_transformer_on_gpus_has_the_recipe_of_one(dataset: Dataset) -> None:
    manifest = replace(sized(dataset, LARGE, 4), tokenizer=MINILM)
    chosen, _ = choose(manifest, 2, 2, {"encoder.frozen": True})
    made = make_config(RunConfig, chosen, {"data": "d", "output": "o"})
    assert made.encoder.frozen and made.recipe == "lf-debian-40k"


def test_a_rate_for_a_bottleneck_leaves_the_transformer_frozen(dataset: Dataset) -> None:
    manifest = replace(dataset.manifest, tokenizer=MINILM)
    rate = {"encoder.learning_rate": 1e-3}
    for given, frozen in (rate, False), ({**rate, "encoder.bottleneck": 64}, True):
        chosen, _ = choose(manifest, 0, 2, given)
        assert make_config(RunConfig, chosen, {"data": "d", "output": "o"}).encoder.frozen == frozen


def test_a_bag_alone_is_chosen_with_its_recipe(dataset: Dataset) -> None:
    given = [f"data={dataset.path}", "output=o", "encoder.name=none", "encoder.bag.dim=64"]
    made, lines = automatic(parse_overrides(given))
    assert (made.recipe, made.encoder.name, made.encoder.bag.dim) == ("perl-bag", "none", 64)
    assert lines[0].startswith("settings of the recipe perl-bag, for ")


def test_a_run_that_began_by_itself_goes_on_with_the_settings_it_has(dataset: Dataset) -> None:
    given = parse_overrides([f"data={dataset.path}", f"output={dataset.path}-run", "seed=3"])
    first, _ = automatic(given)
    RunDirectory(first.output).write(RUN_FILE, {"config": first.model_dump(), "dataset": {}})
    again, lines = automatic(parse_overrides([f"data={dataset.path}", f"output={first.output}"]))
    assert not lines
    assert again == first and again.evaluation.every == 0 and again.seed == 3


def sized(dataset: Dataset, points: int, labels: int = 11, **more: Any) -> Manifest:
    """The manifest of a dataset of so many training points and labels."""
    part = Part("train/part-00000.parquet", points, 0, points, "0" * 64)
    splits: dict[str, Any] = {**dataset.manifest.splits, "train": (part,)}
    known = {"tokenizer": MINILM, "splits": splits, "num_labels": labels, **more}
    return replace(dataset.manifest, **known)


def test_what_is_given_is_neither_chosen_nor_announced(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    (tmp_path / "model.safetensors").touch()
    manifest = sized(dataset, LARGE, LARGE, tokenizer=str(tmp_path))
    settings, lines = choose(manifest, 3, 2)
    announced = [line.partition("=")[0] for line in lines[1:]]
    assert {"encoder.name", "encoder.pooling", "encoder.max_length", "num_workers"} < {*announced}
    assert {"batch_size", "classifier.precision", "evaluation.neighbours"} < {*announced}
    for key in announced:
        given = {"encoder.name": str(tmp_path), key: dict(dotted(settings))[key]}
        other, fewer = choose(manifest, 3, 2, given)
        assert not [line for line in fewer if line.startswith(f"{key}=")]
        assert dict(dotted(other)).get(key) == dict(dotted(read_yaml(other["recipe"]))).get(key)


@pytest.mark.parametrize(
    "key",
    ["encoder.lora.rank=16", "encoder.internal_dropout=0.1", "encoder.internal_dropout=null",
     "encoder.weights=F", "encoder.gradient_checkpointing=true", "feed.token_dropout=0.1"],
)  # fmt: skip
@pytest.mark.parametrize("points", [SMALL - 1, SMALL])
def test_a_transformer_is_not_frozen_where_a_given_key_excludes_it(
    dataset: Dataset, points: int, key: str
) -> None:
    layer = parse_overrides([key])
    wanted = make_config(RunConfig, {"data": "d", "output": "o"}, layer)
    given = {k: v for k, v in dotted(wanted.model_dump()) if k in layer.places}
    settings, lines = choose(sized(dataset, points), 0, 2, given)
    made = make_config(RunConfig, settings, layer, {"data": "d", "output": "o"})
    assert not made.encoder.frozen and made.encoder.bag.dim
    assert f"encoder.frozen=False: {key.partition('=')[0]} is given" in lines
    for allowed in {}, {"encoder.lora.rank": 0}, {"encoder.internal_dropout": 0.0}:
        settings, lines = choose(sized(dataset, points), 0, 2, allowed)
        assert settings["encoder"]["frozen"] == "true" and "frozen" not in " ".join(lines)
    settings, _ = choose(sized(dataset, points), 0, 2, given | {"encoder.frozen": True})
    with pytest.raises(ConfigError, match="frozen"):  # a contradiction of the user's own
        make_config(RunConfig, settings, layer, {"data": "d", "output": "o"},
                    {"encoder": {"frozen": True}})  # fmt: skip


def test_a_transformer_whose_rate_is_given_is_trained(dataset: Dataset) -> None:
    places = f"data={dataset.path}", "output=o", f"encoder.name={MINILM}"
    given = [*places, "encoder.learning_rate=5e-5"]
    made, lines = automatic(parse_overrides(given))
    assert not made.encoder.frozen and "encoder.learning_rate is given" in " ".join(lines)
    with pytest.raises(ConfigError, match=r"encoder.learning_rate has no effect where"):
        automatic(parse_overrides([*given, "encoder.frozen=true"]))


def test_keys_of_a_bag_need_one(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    places = "data=d", "output=o"
    for command in "train", "plan":
        given = [command, "lf-debian-40k-minilm", *places, "encoder.bag.ngrams=3"]
        assert main(given) == 1
        assert "encoder.bag.ngrams has no effect without a bag; add encoder.bag.dim=512" in (
            capsys.readouterr().err
        )
        assert main([*given, "encoder.bag.dim=512"]) == 1
        assert "not a renee_ray dataset" in capsys.readouterr().err
        given = [command, "lf-debian-40k", *places, "encoder.learning_rate=5e-5"]
        assert main(given) == 1
        assert "encoder.learning_rate has no effect where" in capsys.readouterr().err
        assert main([*given, "encoder.bottleneck=64"]) == 1
        assert "not a renee_ray dataset" in capsys.readouterr().err
    layer = parse_overrides([*places, "encoder.bag.dim=0"])
    recipe = checked(make_config(RunConfig, read_yaml("lf-debian-40k"), layer), layer)
    assert recipe.encoder.bag.decay == 0.9, "which has no effect, and nobody gave it"
    given = [f"data={dataset.path}", "output=o", "encoder.name=none"]
    with pytest.raises(ConfigError, match="set encoder"):
        automatic(parse_overrides([*given, "encoder.bag.dim=0", "encoder.bag.norm=2"]))


FIRST = (
    "encoder.name=none", "encoder.bag.dim=64", "encoder.bag.buckets=128", "encoder.max_length=16",
    "classifier.precision=bf16_split", "classifier.objective=softmax", "evaluation.tails=[0,0.5]",
    "evaluation.every=1", "batch_size=32", "epochs=7", "num_workers=3", "seed=5",
    "feed.augment=0.5",
)  # fmt: skip


@pytest.fixture
def first(dataset: Dataset, tmp_path: Path) -> RunDirectory:
    """As much as `start` needs of a run whose settings are no recipe's."""
    layer = parse_overrides([f"data={dataset.path}", f"output={tmp_path}/first", *FIRST])
    run = RunDirectory(str(tmp_path / "first"))
    config = make_config(RunConfig, layer)
    run.write(RUN_FILE, {"config": config.model_dump(), "dataset": {}})
    return run


def test_a_run_that_begins_from_another_has_its_settings(
    dataset: Dataset, first: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"data={dataset.path}", f"output={dataset.path}-2", f"start={first.path}", "epochs=2"]
    (made, _), before = automatic(parse_overrides(given)), first.config()
    said = capsys.readouterr().err
    assert f"settings of {first.path}, with whose weights it begins" in said
    assert made.encoder == before.encoder and made.classifier == before.classifier
    assert made.feed == before.feed and made.evaluation.every == 1 and made.batch_size == 32
    assert (made.epochs, made.recipe, made.seed, made.start) == (2, "", 0, first.path)
    assert made.num_workers in (1, 2) and made.checkpoint.every_steps == SAVED
    assert made.evaluation.tails == () and "evaluation.tails=[]: too few" in said
    tail, _ = automatic(parse_overrides([*given, "evaluation.tail=0.3"]))
    assert (tail.evaluation.tail, tail.evaluation.tails) == (0.3, ())
    assert "evaluation.tails" not in capsys.readouterr().err


def test_size_and_machine_do_not_alter_the_model_of_the_start(
    dataset: Dataset, first: RunDirectory
) -> None:
    before = first.config()
    validation = Part("validation/part-00000.parquet", ENOUGH, 0, ENOUGH, "0" * 64)
    manifest = sized(dataset, 2 * LARGE, 4 * LARGE)
    splits: dict[str, Any] = {**manifest.splits, "validation": (validation,)}
    settings, _ = choose_from(before, replace(manifest, splits=splits), 4, 2, {"start": first.path})
    made = make_config(RunConfig, settings, {"data": "d", "output": "o", "start": first.path})
    assert made.encoder == before.encoder and made.classifier == before.classifier
    assert (made.num_workers, made.batch_size, made.feed.augment) == (4, 32, 0.5)
    assert made.checkpoint.every_steps == 2 * LARGE // 32
    assert made.evaluation.tails == before.evaluation.tails
    bare, _ = choose_from(before, replace(manifest, has_label_texts=False), 0, 1,
                          {"start": first.path})  # fmt: skip
    assert (bare["num_workers"], bare["feed"]["augment"]) == (1, 0)


def test_a_start_gives_neither_its_first_weights_nor_its_teacher(
    dataset: Dataset, first: RunDirectory
) -> None:
    layer = parse_overrides([
        "encoder.name=e", "encoder.bag.dim=0", "encoder.weights=w", "feed.targets=t",
        "feed.targets_weight=0.1", "data=d", "output=o",
    ])  # fmt: skip
    start = make_config(RunConfig, layer)
    settings, _ = choose_from(start, dataset.manifest, 0, 2, {"start": first.path})
    made = make_config(RunConfig, settings, {"data": "d", "output": "o", "start": first.path})
    assert (made.encoder.name, made.encoder.weights, made.feed.targets) == ("e", "", "")
