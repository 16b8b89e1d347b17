"""The last steps of a search that has ruled most labels out by narrow products.

1. The search leaves each row some candidates, and says how large a product of another label may be.
2. `candidate_scores` computes the fp32 scores of the candidates.
3. `settle` takes the k best of these. Let a* be the largest product that was left out, and bound
   how far a product may be from its score. The row is certain if  a* + bound < k-th best score:
   then no label left out can be among the k best.

Rows that are not certain are reported; the caller computes them by fp32 products alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from renee_ray.xfc.labels import NONE
from renee_ray.xfc.shard import Shard
from renee_ray.xfc.weights.storages import Weights


def settle(
    shard: Shard,
    k: int,
    labels: Tensor,
    left_out: Tensor,
    bound: Tensor,
    rounding: Tensor,
    score: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Takes the third step: (scores, labels) [B, k] and which rows are certain, bool [B].

    Args:
        labels: int64 [B, m], the candidates; local, or `NONE`.
        left_out: [B], the largest product of a label that is no candidate.
        bound, rounding: [B], how far a product may be from its score: by up to their sum.
        score: computes the fp32 scores [B, m] of labels [B, m].
    """
    # In the order of ids: of equal scores the smaller one then comes first.
    labels = labels.sort(dim=1).values
    scores, order = score(labels).sort(dim=1, descending=True, stable=True)
    scores, labels = scores[:, :k].contiguous(), labels.gather(1, order)[:, :k]
    # NaN, of numbers that are not finite, is never certain; a row that lost no label always is.
    certain = left_out + bound + rounding < scores[:, k - 1]
    certain |= (left_out == -torch.inf) & bound.isfinite()
    return scores, torch.where(labels == NONE, NONE, labels + shard.owned.start), certain


def candidate_scores(
    weights: Weights, embeddings: Tensor, offset: Tensor | None, size: int, labels: Tensor
) -> Tensor:
    """Computes scores float32 [B, m] of each row's local labels int64 [B, m]; `NONE` gives -inf.

    size: rows whose scores are one matmul, of which 1 / size is used; at most B.
    """
    scores = torch.empty(labels.shape, dtype=torch.float32, device=labels.device)
    own = torch.arange(size, device=labels.device)
    for start in range(0, len(labels), size):
        first = min(start, len(labels) - size)
        rows = slice(first, first + size)
        picked = labels[rows].clamp(min=0)
        products = embeddings[rows] @ weights.weight.pick(picked.flatten()).T
        found = products.view(size, *picked.shape)[own, own]
        found = found if offset is None else found + offset[picked]
        scores[start : start + size] = found[start - first :]  # those before are here already
    return scores.masked_fill_(labels == NONE, -torch.inf)
