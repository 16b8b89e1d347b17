"""Dropout for CPUs, on which the masks of `nn.Dropout` take an eighth of a training step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

STEPS = 1 << 16
"""Values of 16 random bits; the probability is rounded to a multiple of 1 / STEPS."""


class Dropout(nn.Dropout):
    """Equals `x * mask / (1 - p)`, each value of the mask being 0 with probability p.

    One draw of 64 bits makes four values, where `nn.Dropout` draws once for each.
    """

    def forward(self, input: Tensor) -> Tensor:
        """input: any shape, floating point, on a CPU -> the same shape and dtype."""
        dropped = round(self.p * STEPS)
        if not self.training or not dropped:
            return input
        words = torch.empty(-(-input.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        bits = words.view(torch.int16)[: input.numel()].view(input.shape)
        # The view avoids torch's conversion from bool, which takes six times as long.
        kept = (bits >= dropped - STEPS // 2).view(torch.uint8).to(input.dtype)
        return input * kept.mul_(STEPS / max(STEPS - dropped, 1))


def draw_fast(module: nn.Module) -> None:
    """Replaces every `nn.Dropout` inside a module."""
    for parent in module.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Dropout:
                setattr(parent, name, Dropout(child.p))
