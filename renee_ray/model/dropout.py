"""Dropout masks, from 16 random bits a number.

`Dropout` is for CPUs, on which the masks of `nn.Dropout` take an eighth of a training step.
`dropout_mask` is that of the embeddings, the same whoever holds a row.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

STEPS = 1 << 16
"""Values of 16 random bits; the probability is rounded to a multiple of 1 / STEPS."""
WEYL, FIRST, SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
"""Constants of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), as signed numbers of 64 bits."""


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
        return input * _factors(bits, dropped, input.dtype)


def draw_fast(module: nn.Module) -> None:
    """Replaces every `nn.Dropout` inside a module."""
    for parent in module.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Dropout:
                setattr(parent, name, Dropout(child.p))


def dropout_mask(own: Tensor, p: float, seed: int, step: int, first: int) -> Tensor:
    """Draws factors 0 or 1/(1-p) [b_r, D] for rows [first, first + b_r) of a global batch.

    Hashes (seed, step, row, column) in integers on the device of `own` [b_r, D]: the mask of a
    row does not depend on the device or on who holds it, and no rank draws for another.
    """
    if p == 0:
        return own.new_ones(())
    key = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64).view(np.int64)
    rows = torch.arange(first, first + len(own), device=own.device)
    words = torch.arange(-(-own.shape[1] // 4), device=own.device)
    # Each row is its own sequence of SplitMix64, seeded by a number of the step's sequence.
    begins = _mixed(rows * WEYL + int(key[0]))
    bits = _mixed(begins[:, None] + words * WEYL).view(torch.int16)[:, : own.shape[1]]
    return _factors(bits, min(round(p * STEPS), STEPS - 1), own.dtype)


def _mixed(z: Tensor) -> Tensor:
    """Applies the output of SplitMix64; int64 wraps around, and its shifts copy the sign."""
    z = (z ^ (z >> 30 & (1 << 34) - 1)) * FIRST
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * SECOND
    return z ^ (z >> 31 & (1 << 33) - 1)


def _factors(bits: Tensor, dropped: int, dtype: torch.dtype) -> Tensor:
    """Makes factors of uniform int16, of which `dropped` in STEPS become 0."""
    # The view avoids torch's conversion from bool, which takes six times as long.
    kept = (bits >= dropped - STEPS // 2).view(torch.uint8).to(dtype)
    return kept.mul_(STEPS / max(STEPS - dropped, 1))
