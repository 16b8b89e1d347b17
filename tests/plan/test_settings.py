"""Settings by themselves: the recipe that fits, and what of it follows from dataset and machine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from renee_ray.cli.main import main
from renee_ray.cli.train import automatic
from renee_ray.config.overrides import make_config, parse_overrides
from renee_ray.config.schema import RunConfig
from renee_ray.data.dataset import Dataset, Part
from renee_ray.data.dataset.manifest import Manifest
from renee_ray.plan.settings import ENOUGH, LARGE, SAVED, SMALL, TAILS, choose
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
    alone, _ = choose(manifest, gpus, 4, encoder="none")
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
    settings, _ = choose(manifest, 0, 2, ["feed.augment"])
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
    from renee_ray.config.overrides import read_yaml

    return int(read_yaml(recipe)[key])


def test_a_run_needs_data_and_output(capsys: pytest.CaptureFixture[str]) -> None:
    for given, missing in (["data=d"], "output"), (["output=o"], "data"), ([], "data"):
        assert main(["train", *given]) == 1
        assert f"lacks '{missing}'" in capsys.readouterr().err


def test_the_adjustment_is_chosen_where_validation_points_are_enough(dataset: Dataset) -> None:
    def chosen(points: int, *given: str) -> object:
        part = Part("validation/part-00000.parquet", points, 0, points, "0" * 64)
        splits: dict[str, Any] = {**dataset.manifest.splits, "validation": (part,)}
        settings, _ = choose(replace(dataset.manifest, splits=splits), 0, 2, given)
        return settings["evaluation"].get("tails")

    assert chosen(ENOUGH) == TAILS and chosen(ENOUGH - 1) is None
    assert chosen(ENOUGH, "evaluation.tail") is None


def test_the_last_weights_are_kept_unless_the_user_says_when_to_validate(dataset: Dataset) -> None:
    chosen, _ = choose(dataset.manifest, 0, 2)
    assert (chosen["evaluation"]["every"], chosen["checkpoint"]["every_steps"]) == (0, SAVED)
    kept, _ = choose(dataset.manifest, 0, 2, ["evaluation.every"])
    assert int(kept["evaluation"]["every"]) == 4 and "checkpoint" not in kept


def test_a_bag_alone_is_chosen_with_its_recipe(dataset: Dataset) -> None:
    given = [f"data={dataset.path}", "output=o", "encoder.name=none", "encoder.bag.dim=64"]
    made = automatic(parse_overrides(given))
    assert (made.recipe, made.encoder.name, made.encoder.bag.dim) == ("perl-bag", "none", 64)


def test_a_run_that_began_by_itself_goes_on_with_the_settings_it_has(dataset: Dataset) -> None:
    given = parse_overrides([f"data={dataset.path}", f"output={dataset.path}-run", "seed=3"])
    first = automatic(given)
    RunDirectory(first.output).write(RUN_FILE, {"config": first.model_dump(), "dataset": {}})
    again = automatic(parse_overrides([f"data={dataset.path}", f"output={first.output}"]))
    assert again == first and again.evaluation.every == 0 and again.seed == 3
