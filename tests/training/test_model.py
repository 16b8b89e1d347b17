"""The storage of a shard: as configured, or as in the checkpoint that will be loaded."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from renee_ray.config.schema import RunConfig
from renee_ray.model import model as module
from renee_ray.model.encoder import autocast_dtype
from renee_ray.model.model import build_model
from renee_ray.rank.collectives import Ranks
from renee_ray.xfc import device
from tests.training.gloo import on_ranks


class Vectors(nn.Module):
    """What a model asks of an encoder, on a GPU with bf16 or without."""

    dim = 4

    def __init__(self, bf16: bool = True) -> None:
        super().__init__()
        self.autocast = autocast_dtype("auto", bf16, True)


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


def on_devices(ranks: Ranks, with_bf16: list[int]) -> tuple[str, torch.dtype | None]:
    """What a rank chooses, where some ranks have bf16."""
    bf16 = ranks.rank in with_bf16
    device.native_bf16 = lambda device: bf16  # type: ignore[assignment]
    module.build_encoder = lambda *arguments: Vectors(bf16)  # type: ignore[assignment, return-value]
    config = RunConfig.model_validate({"data": "d", "output": "o"})
    model = build_model(config, 11, ranks, torch.device("cpu"))
    return model.shard.weights.precision, model.encoder.autocast


@pytest.mark.parametrize(
    ("with_bf16", "precision", "autocast"),
    [
        ([0, 1], "bf16_sr", torch.bfloat16),
        ([0], "bf16_sr", torch.float16),
        ([1], "fp32", torch.float16),
    ],
)
def test_ranks_with_other_devices_choose_alike(
    with_bf16: list[int], precision: str, autocast: torch.dtype
) -> None:
    """The storage is the first one's; fp16, which needs a loss scale, is for all or for none."""
    assert on_ranks(2, on_devices, with_bf16) == [(precision, autocast)] * 2
