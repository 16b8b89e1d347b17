"""Settings by themselves with a transformer whose embeddings have another norm."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import renee_ray.plan.norm
from renee_ray.cli.train import automatic
from renee_ray.config.overrides import parse_overrides
from renee_ray.config.schema import EncoderConfig, RunConfig
from renee_ray.data.dataset import Dataset
from renee_ray.errors import ReneeError
from renee_ray.model.encoder import build_encoder
from renee_ray.plan.norm import NORM

from ..data.tiny import write_tiny


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return write_tiny(tmp_path / "set", train=(60, 140))


def model_of(path: Path, factor: float, positions: int = 64) -> str:
    """A random BERT whose hidden states are `factor` times as long as layer norm makes them."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 24}
    size["max_position_embeddings"] = positions
    model = BertModel(BertConfig(vocab_size=30, num_attention_heads=2, **size))
    norm = model.encoder.layer[-1].output.LayerNorm
    torch.nn.init.constant_(norm.weight, factor)
    model.save_pretrained(path)
    return str(path)


def parts_of(config: EncoderConfig, dataset: Dataset) -> tuple[float, float]:
    """Mean norms of what the transformer and the bag give of the training points, one by one."""
    encoder = build_encoder(config, torch.device("cpu"), 0).eval()
    assert encoder.bag is not None
    encoder.bag.idf.fill_(1.0)
    found = []
    for ids in dataset.read_rows("train", 0, 200, ["input_ids"])["input_ids"].to_pylist():
        with torch.no_grad():
            row = encoder(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.int64))[0]
        found.append((float(row[:16].norm()), float(row[16:].norm())))
    return tuple(np.mean(found, axis=0))


def chosen(dataset: Dataset, *given: str) -> tuple[RunConfig, list[str]]:
    small = "encoder.bag.dim=4096", "encoder.bag.buckets=1024"  # wide, so that norms vary little
    return automatic(parse_overrides([f"data={dataset.path}", "output=o", *small, *given]))


@pytest.mark.parametrize("factor", [0.05, 30.0])
def test_both_parts_of_an_embedding_get_the_norm_that_the_recipe_is_made_for(
    dataset: Dataset, tmp_path: Path, factor: float
) -> None:
    name = model_of(tmp_path / "model", factor)
    config, lines = chosen(dataset, f"encoder.name={name}")
    assert parts_of(config.encoder, dataset) == pytest.approx((NORM, NORM), rel=0.1)
    assert f"encoder.scale={config.encoder.scale}" in " ".join(lines)
    unit, _ = chosen(dataset, f"encoder.name={name}", "encoder.normalise=true")
    assert parts_of(unit.encoder, dataset) == pytest.approx((NORM, NORM), rel=0.1)
    given, _ = chosen(dataset, f"encoder.name={name}", "encoder.scale=1.0")
    assert (given.encoder.scale, given.encoder.bag.norm) == (1, 5)
    given, _ = chosen(dataset, f"encoder.name={name}", "encoder.bag.norm=3")
    assert (given.encoder.scale, given.encoder.bag.norm) == (1, 3)


def test_what_fits_and_what_is_too_large_to_measure_stay_as_they_are(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, lines = chosen(dataset, f"encoder.name={model_of(tmp_path / 'fits', 2.0)}")
    assert config.encoder.scale == 1 and "encoder.scale" not in " ".join(lines)
    monkeypatch.setattr(renee_ray.plan.norm, "LARGEST", 1000)
    config, lines = chosen(dataset, f"encoder.name={model_of(tmp_path / 'large', 30.0)}")
    assert config.encoder.scale == 1 and "no model of over 1,000 weights is measured" in " ".join(
        lines
    )


def test_a_model_that_does_not_fit_is_refused_before_it_is_measured(
    dataset: Dataset, tmp_path: Path
) -> None:
    name = model_of(tmp_path / "short", 1.0, positions=6)
    with pytest.raises(ReneeError, match=r"train with encoder\.max_length=6 at most"):
        chosen(dataset, f"encoder.name={name}")
    (tmp_path / "short" / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(ReneeError, match="cannot be loaded"):
        chosen(dataset, f"encoder.name={name}")
