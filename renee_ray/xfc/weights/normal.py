"""Normally distributed first weights, made from hashes on any device."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from renee_ray.xfc.weights.rounding import mix_bits


def normal_rows(seed: int, first: int, stop: int, dim: int, device: torch.device) -> Tensor:
    """Returns float32 [stop - first, D] ~ N(0, 1); a row is a function of (seed, label) alone.

    Two numbers come from 64 hashed bits, by the method of Box and Muller. They are computed in
    float64, so that devices, whose logarithms differ in the last bit, agree in fp32.
    """
    key = int(np.random.default_rng(seed).integers(-(2**63), 2**63, dtype=np.int64))
    pairs = -(-dim // 2)
    bits = torch.arange(first * pairs, stop * pairs, device=device)
    mix_bits(bits, key, torch.empty_like(bits))
    upper = bits >> 32 & 0xFFFFFFFF
    # The lower bits of a product depend on fewer bits of its factors than the upper ones.
    angle = ((bits ^ upper) & 0xFFFFFFFF).double().mul_(math.tau / 2**32)
    radius = upper.double().add_(0.5).div_(2**32).log_().mul_(-2).sqrt_()
    rows = torch.stack([angle.cos() * radius, angle.sin().mul_(radius)], dim=1)
    return rows.view(stop - first, 2 * pairs)[:, :dim].float()
