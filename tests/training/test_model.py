"""The storage of a shard: as configured, or as in the checkpoint that will be loaded."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from renee_ray.config.schema import RunConfig
from renee_ray.model import model as module
from renee_ray.model.model import build_model
from renee_ray.parallel.collectives import Ranks
from renee_ray.xfc import device
from tests.training.gloo import on_ranks


class Vectors(nn.Module):
    """What a shard asks of an encoder."""

    dim = 4


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_checkpoints_precision_goes_before_that_of_the_configuration(
    monkeypatch: pytest.MonkeyPatch, momentum: float
) -> None:
    monkeypatch.setattr(module, "build_encoder", lambda *arguments: Vectors())
    config = RunConfig.model_validate(
        {"data": "d", "output": "o", "classifier": {"precision": "auto", "momentum": momentum}}
    )
    ranks, cpu = Ranks(), torch.device("cpu")
    model = build_model(config, 11, ranks, cpu, precision="fp8_sr")
    assert model.shard.weights.precision == "fp8_sr"
    assert model.shard.weights.nbytes() == len(model.shard.owned) * 4 * (3 if momentum else 1)
    fresh = build_model(config, 11, ranks, cpu)
    assert fresh.shard.weights.precision in ("fp32", "bf16_sr")


def on_devices(ranks: Ranks, first: bool) -> str:
    """What a rank chooses, where only rank 0 or, without `first`, only the others have bf16."""
    device.native_bf16 = lambda device: (ranks.rank == 0) == first  # type: ignore[assignment]
    module.build_encoder = lambda *arguments: Vectors()  # type: ignore[assignment, return-value]
    config = RunConfig.model_validate({"data": "d", "output": "o"})
    model = build_model(config, 11, ranks, torch.device("cpu"))
    return model.shard.weights.precision


@pytest.mark.parametrize(("first", "wanted"), [(True, "bf16_sr"), (False, "fp32")])
def test_ranks_with_other_devices_choose_as_the_first(first: bool, wanted: str) -> None:
    assert on_ranks(2, on_devices, first) == [wanted] * 2
