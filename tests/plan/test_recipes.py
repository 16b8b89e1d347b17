"""The recipes have the published settings and figures, copied to *.txt beside this file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from click.testing import CliRunner

from renee_ray.cli.main import cli, main
from renee_ray.config.overrides import make_config, read_recipe
from renee_ray.config.recipes import About, recipe_names
from renee_ray.config.schema import RunConfig
from renee_ray.errors import ConfigError
from renee_ray.plan.devices import GPUS
from renee_ray.plan.encoder import find_transformer
from renee_ray.plan.plan import find_workload, make_plan

HERE = Path(__file__).parent
UNSET = {"data": "-", "output": "-"}
WORDS = {"DistilBERT": "distilbert", "DistilRoBERTa": "distilroberta"}
MEASURES = ("P@1", "P@3", "P@5", "PSP@1", "PSP@5")


def rows(name: str) -> list[list[str]]:
    lines = (HERE / name).read_text(encoding="utf-8").splitlines()
    kept = [line.removeprefix("| ") for line in lines if not line.startswith(("#", "| dataset"))]
    return [[cell.strip() for cell in line.split("|")] for line in kept]


def loaded(name: str) -> tuple[RunConfig, About]:
    layer, about = read_recipe(name)
    assert about is not None
    return make_config(RunConfig, UNSET, layer, where=name), about


def warmup_steps(config: RunConfig, about: About) -> float:
    assert about.points is not None
    texts = about.labels if config.feed.augment else 0
    return config.warmup * config.epochs * math.ceil((about.points + texts) / config.batch_size)


@pytest.mark.parametrize("row", rows("renee_settings.txt"), ids=lambda row: row[0])
def test_the_papers_settings(row: list[str]) -> None:
    dataset, encoder, *numbers, _ = row
    config, about = loaded(dataset.lower())
    assert WORDS.get(encoder, encoder).lower() in config.encoder.name.lower()
    batch, rate, of_labels, decay, dropout, warmup, epochs, length = map(float, numbers)
    classifier = config.classifier
    assert (config.batch_size, config.epochs, config.encoder.max_length) == (batch, epochs, length)
    assert (config.encoder.learning_rate, classifier.learning_rate) == (rate, of_labels)
    assert (classifier.weight_decay, config.encoder.dropout) == (decay, dropout)
    assert (classifier.momentum, classifier.init, classifier.init_std) == (0.9, "normal", 0.02)
    assert warmup_steps(config, about) == pytest.approx(warmup, rel=0.01)
    assert config.feed.augment == dataset.startswith("LF-")
    assert about.dataset == dataset


@pytest.mark.parametrize("row", rows("elmo_settings.txt"), ids=lambda row: row[0])
def test_elmos_settings(row: list[str]) -> None:
    squeezed = {"".join(n for n in name if n not in "-."): name for name in recipe_names()}
    key = row[0].replace(".", "")
    name = squeezed.get(f"elmo{key}") or squeezed[f"{key}86m"]
    for each in filter(recipe_names().__contains__, (name, f"{name}-fp8")):
        config, about = loaded(each)
        classifier, encoder = config.classifier, config.encoder
        assert about.labels == int(row[1])
        assert encoder.name.endswith(row[2].removeprefix("st/"))
        numbers = (encoder.max_length, config.batch_size, config.epochs, encoder.learning_rate,
                   encoder.weight_decay)  # fmt: skip
        assert numbers == tuple(map(float, row[3:8]))
        assert (classifier.learning_rate, classifier.momentum) == (float(row[9]), float(row[11]))
        assert classifier.weight_decay == 0, "which has no effect in its code"
        assert encoder.dropout == float(row[12]) and bool(config.feed.augment) == (
            row[13] == "True"
        )
        assert bool(about.weights) == (row[14] == "True")
        narrow = "fp8" in each or "8.6m" in each
        assert classifier.precision == ("fp8_sr" if narrow else "bf16_sr")
        if about.points:
            assert warmup_steps(config, about) == pytest.approx(float(row[8]), rel=0.03)


@pytest.mark.parametrize(
    ("name", "temperature"),
    [("lf-amazontitles-131k", 0.05), ("lf-amazontitles-1.3m", 1), ("lf-wikipedia-500k", 1)],
)
def test_the_temperature_of_dexml_is_a_scale(name: str, temperature: float) -> None:
    encoder = loaded(f"dexml-{name}")[0].encoder
    assert encoder.scale == pytest.approx(1 / temperature)


@pytest.mark.parametrize("row", rows("results.txt"), ids=lambda row: row[0])
def test_published_figures(row: list[str]) -> None:
    _, about = loaded(row[0])
    published = zip(MEASURES, row[1:6], strict=True)
    assert about.expected == {name: float(cell) for name, cell in published if cell}
    gib, epoch, hours = row[6:9]
    if gib:
        assert float(gib) in [cost.memory_gib for cost in about.costs]
    if epoch:
        minutes, seconds = map(int, epoch.split(":"))
        found = [cost.epoch_minutes for cost in about.costs if cost.epoch_minutes]
        assert minutes + seconds / 60 == pytest.approx(found[-1], abs=0.01)
    if hours:
        assert float(hours) in [cost.hours for cost in about.costs]


def test_all_recipes_with_published_figures_are_in_the_table() -> None:
    known = {row[0] for row in rows("results.txt")}
    found = {name for name in recipe_names() if loaded(name)[1].expected}
    own = {"lf-debian-40k", "lf-debian-40k-minilm", "debian-bag", "emoji-search"}  # measured here
    assert known <= found <= known | own


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_can_be_planned(name: str) -> None:
    config, about = loaded(name)
    assert config.recipe == name and about.source
    workload = find_workload(config, about, None, None, None)
    transformer = find_transformer(config.encoder, about.encoder)
    plan = make_plan(config, workload, transformer, GPUS["h100"], 4)
    assert plan.memory["weights"] > 0 and plan.step_s > 0 and plan.fewest_devices is not None
    assert (plan.run_hours is None) == (about.points is None)


def test_recipes_are_listed() -> None:
    listed = CliRunner().invoke(cli, ["recipes", "--json"])
    facts = {row["name"]: row for row in json.loads(listed.output)["recipes"]}
    assert len(facts) >= 18 and set(facts) == set(recipe_names())
    assert facts["amazon-3m"]["labels"] == 2812281
    assert facts["amazon-3m"]["costs"][0]["hardware"] == "8 V100"
    text = CliRunner().invoke(cli, ["recipes"]).output
    assert all(name in text for name in facts)
    shown = CliRunner().invoke(cli, ["recipes", "wiki-500k"]).output
    assert "classifier:" in shown and "# " in shown
    one = json.loads(CliRunner().invoke(cli, ["recipes", "wiki-500k", "--json"]).output)
    assert one["settings"]["classifier.learning_rate"] == 0.002


@pytest.mark.parametrize("command", [["recipes"], ["plan"], ["train"]], ids=lambda c: c[0])
def test_an_unknown_name_is_refused_with_the_nearest(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "lf-amazontitle-131k"]) == 1
    assert "did you mean 'lf-amazontitles-131k'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("about: 3\n", "about='3' in .* is no mapping"),
        ("about: {dataset: X}\n", "about in .* lacks 'source'"),
        ("about: {dataset: X, source: Y, labels: 3, hour: 2}\n", "has no key 'hour'"),
        ("about: {dataset: X, source: Y, labels: many}\n", "labels='many' in about in"),
    ],
)
def test_what_a_file_says_of_itself_is_checked(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_recipe(str(path))
