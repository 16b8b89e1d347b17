"""What `expect` says of a run beside its recipe."""

from __future__ import annotations

import math

import pytest
import torch

from renee_ray.cli.main import main
from renee_ray.config.overrides import make_config, read_recipe
from renee_ray.config.schema import RunConfig
from renee_ray.config.score import ScoreConfig
from renee_ray.data.dataset import Dataset
from renee_ray.rank.collectives import Ranks
from renee_ray.scoring.scorer import Propensities
from renee_ray.service.score.evaluate import as_scored, differences
from renee_ray.xfc.labels import LabelRange

from .conftest import LABELS


def test_differences_from_a_recipe(sample: str) -> None:
    layer, about = read_recipe("lf-amazon-131k")
    assert about is not None
    theirs = make_config(RunConfig, {"data": "-", "output": "-"}, layer)
    mine = theirs.model_copy(update={"epochs": 7, "num_workers": 5, "data": "elsewhere"})
    manifest = Dataset.open(f"{sample}/data").manifest
    found = {what: (own, other) for what, own, other in differences(mine, theirs, about, manifest)}
    assert found["epochs"] == (7, 100)
    assert found["encoder.weights"] == ("", "NGAME's M1 of this dataset")
    assert found["labels"] == (LABELS, 131073) and found["points"] == (4000, 294805)
    assert found["propensity_a"] == (0.55, 0.6)
    assert found["label texts"] == (False, True)
    assert found["filter labels of the test split"] == (False, True)
    assert not {"num_workers", "data", "output", "recipe", "batch_size"} & set(found)


def test_what_is_scored_otherwise_is_a_difference(sample: str) -> None:
    layer, about = read_recipe("lf-amazon-131k")
    assert about is not None
    theirs = make_config(RunConfig, {"data": "-", "output": "-"}, layer)
    manifest = Dataset.open(f"{sample}/data").manifest
    mine = as_scored(theirs, ScoreConfig(tail=0.25, neighbours=0))
    found = {what: (own, other) for what, own, other in differences(mine, theirs, about, manifest)}
    assert found["evaluation.tail"] == (0.25, 0)
    assert not {"evaluation.neighbours", "evaluation.neighbour_weight"} & set(found)


@pytest.mark.parametrize(
    "override", ["split=train", "split=validation", "k=3", "texts=true", "scores=probabilities"]
)
def test_expect_refuses_what_it_would_ignore(
    override: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["expect", "nowhere", override]) == 1
    key = override.partition("=")[0]
    assert f"leave {key} out" in capsys.readouterr().err


def test_augmented_propensities_count_label_texts_as_points(sample: str) -> None:
    dataset = Dataset.open(f"{sample}/data")
    own = LabelRange(10, 20, LABELS)
    found = Propensities.read(dataset, own, Ranks(), augmented=True).own
    points, count, a, b = 4000 + LABELS, 2, 0.55, 1.5  # each label of a sample says one point
    expected = 1 + (math.log(points) - 1) * (b + 1) ** a * (count + b) ** -a
    torch.testing.assert_close(found, torch.full((10,), expected, dtype=torch.float64))
    assert (Propensities.read(dataset, own, Ranks()).own - found).abs().min() > 0.1
