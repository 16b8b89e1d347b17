"""Labels and points with a known structure, to search among.

Labels lie in clusters in clusters: a topic for 5,000 labels, a group for 50 of a topic, and a label
beside its group. A point's embedding is near the sum of the directions of a label and, by half, of
two others, with noise of 0.6 of its length. Norms of weights are log-normal, or spread evenly in
their logarithm from 0.1 to 10 with offsets from -5 to 0.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

BLOCK = 1 << 18
SEED = 7


def planted(labels: int, dim: int, spread: bool) -> tuple[Tensor, Tensor]:
    """Makes weights float32 [L, D] and offsets float32 [L]. spread: of norms, as told above."""
    noise = torch.Generator().manual_seed(SEED)
    topics = torch.randn(max(1, labels // 5000), dim, generator=noise)
    groups = topics[torch.randint(len(topics), (max(1, labels // 50),), generator=noise)]
    groups += 0.8 * torch.randn(groups.shape, generator=noise)
    weights, offsets = torch.empty(labels, dim), torch.zeros(labels)
    for rows in weights.split(BLOCK):
        at = torch.randint(len(groups), (len(rows),), generator=noise)
        rows[:] = groups[at] + 0.7 * torch.randn(rows.shape, generator=noise)
        rows[:] = normalize(rows) * (
            torch.rand(len(rows), 1, generator=noise).mul(4.6).exp_().mul(0.1)
            if spread
            else torch.randn(len(rows), 1, generator=noise).mul(0.3).exp_().mul(3)
        )
    if spread:
        offsets = -5 * torch.rand(labels, generator=noise)
    return weights, offsets


def near(weights: Tensor, points: int) -> Tensor:
    """Makes embeddings of points that have some of the labels, float32 [n, D]."""
    noise = torch.Generator().manual_seed(SEED + 1)
    picked = torch.randint(len(weights), (3, points), generator=noise)
    sums = normalize(weights[picked[0]]) + 0.5 * normalize(weights[picked[1:]], dim=2).sum(0)
    other = normalize(torch.randn(points, weights.shape[1], generator=noise))
    return 5 * normalize(normalize(sums) + 0.6 * other)
