"""Low-rank adapters (LoRA, Hu et al., ICLR 2022), and checkpoints without frozen weights.

An adapted layer computes `x W' + alpha / rank * dropout(x) A' B'`. W [m, n] is frozen; A [rank, n]
is random and B [m, rank] is 0 at first, so training begins with the transformer as it was.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor, nn

from renee_ray.config.schema import EncoderConfig
from renee_ray.errors import ReneeError, reason

FROZEN = "frozen_crc32"
"""Tensor of a checkpoint: checksum of the frozen weights, which are not in it."""
SAMPLE = 1024
"""Numbers of each frozen weight that the checksum looks at, about."""


def add_adapters(model: nn.Module, config: EncoderConfig) -> Any:
    """Freezes a transformer and gives its linear layers adapters; returns peft's model of it.

    Raises:
        ReneeError: peft is not installed, or no layer has one of `encoder.lora.targets`.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ReneeError(
            f"encoder.lora.rank={config.lora.rank} needs the package peft; install renee_ray[lora]"
        ) from None
    given, names = config.lora, ["." + name for name, _ in model.named_modules()]
    targets = "all-linear" if given.targets == "auto" else list(given.targets)
    settings = LoraConfig(
        r=given.rank, lora_alpha=given.alpha, lora_dropout=given.dropout, target_modules=targets
    )
    try:
        for target in given.targets if given.targets != "auto" else ():
            if not any(name.endswith("." + target) for name in names):
                raise ValueError(f"no layer has the name {target}")
        adapted = get_peft_model(model, settings)
    except ValueError as error:
        raise ReneeError(
            f"encoder.lora.targets={given.targets!r:.200} does not fit encoder.name="
            f"{config.name!r:.200} ({reason(error):.200}); give names of its linear layers, or auto"
        ) from None
    # What a reader of the exported adapter loads it into, and not where it lies on this machine.
    settings.base_model_name_or_path = config.name
    return adapted


def trained_state(module: nn.Module) -> dict[str, Tensor]:
    """Returns what a checkpoint holds: buffers, trained weights, a checksum of the frozen ones."""
    frozen = _frozen(module)
    state: dict[str, Tensor] = {k: v for k, v in module.state_dict().items() if k not in frozen}
    if frozen:
        state[FROZEN] = torch.tensor(_checksum(frozen))
    return state


def load_trained(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Loads what `trained_state` returned into a module whose frozen weights are in place.

    Raises:
        RuntimeError: the tensors are others, or the frozen weights are not those it trained with.
    """
    frozen = _frozen(module)
    if frozen and (FROZEN not in state or int(state[FROZEN]) != _checksum(frozen)):
        raise RuntimeError("it was trained on other frozen weights than encoder.name now has")
    state = {k: v for k, v in state.items() if not frozen or k != FROZEN}
    module.load_state_dict({**state, **frozen}, strict=True)


def _frozen(module: nn.Module) -> dict[str, Tensor]:
    named = module.named_parameters(remove_duplicate=False)
    return {name: p.detach() for name, p in named if not p.requires_grad}


def _checksum(weights: dict[str, Tensor]) -> int:
    crc = 0
    for weight in weights.values():
        sample = weight.flatten()[:: max(1, weight.numel() // SAMPLE)]
        crc = zlib.crc32(sample.float().cpu().numpy().tobytes(), crc)
    return crc
