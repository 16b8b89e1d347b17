"""The storage of a shard: as configured, or as in the checkpoint that will be loaded."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from renee_ray.config import RunConfig
from renee_ray.training import model as module
from renee_ray.training.collectives import Ranks
from renee_ray.training.model import build_model


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("training", [False, True])
def test_a_checkpoints_precision_goes_before_that_of_the_configuration(
    monkeypatch: pytest.MonkeyPatch, momentum: float, training: bool
) -> None:
    encoder = nn.Linear(3, 4)
    encoder.dim = 4  # type: ignore[assignment]
    monkeypatch.setattr(module, "build_encoder", lambda *arguments: encoder)
    config = RunConfig.model_validate(
        {"data": "d", "output": "o", "classifier": {"precision": "auto", "momentum": momentum}}
    )
    ranks, cpu = Ranks(1, 3), torch.device("cpu")
    model = build_model(config, 11, ranks, cpu, training=training, precision="fp8_sr")
    assert model.shard.weights.precision == "fp8_sr"
    kept = training and momentum > 0
    assert model.shard.weights.nbytes() == len(model.shard.owned) * 4 * (3 if kept else 1)
    fresh = build_model(config, 11, ranks, cpu, training=training)
    assert fresh.shard.weights.precision in ("fp32", "bf16_sr")
