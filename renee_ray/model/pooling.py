"""Pooling: one vector for a text out of those of its tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def pool(hidden: Tensor, mask: Tensor, kind: str) -> Tensor:
    """Returns the mean of each row's tokens, or the first (cls) or last of them: float32 [b, H].

    hidden: [b, T, H], floating point; mask: int64 [b, T], 0 at padding, which may be on either
    side. A row that is all padding has the mean 0.
    """
    if kind == "mean":
        kept = mask.unsqueeze(-1).float()
        return (hidden.float() * kept).sum(1) / kept.sum(1).clamp(min=1)
    places = torch.arange(mask.shape[1], device=mask.device)
    if kind == "cls":
        chosen = places.masked_fill(mask == 0, mask.shape[1] - 1).amin(1)
    else:
        chosen = (places * mask).amax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), chosen].float()
