"""The k best labels of each row: streaming over a shard's chunks, and merging shards.

What it equals: `torch.topk(E @ W.T, k)` after the excluded pairs were set to -inf,
without ever holding [rows, labels]. Scores are fp32 products of the fp32 weights, since
bf16 logits tie by the dozen; of labels with equal scores the one with the smaller id comes
first, at the cut too, so that the result depends neither on chunks nor on shards.
Rows that have fewer than k labels left are filled with label -1 and score -inf.
"""

from __future__ import annotations

import torch
from torch import Tensor

from renee_ray.xfc.shard import Pairs, Shard

NONE = -1
"""Label id of a place that no label fills."""


def shard_topk(
    shard: Shard,
    embeddings: Tensor,
    k: int,
    excluded: Pairs | None = None,
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k best labels of a shard for each row.

    Args:
        embeddings: [B, D] float32.
        excluded: pairs that must not be predicted (filter labels).
        offset: float32 [n], added to the score of each of the shard's labels.

    Returns:
        (scores float32 [B, k] descending, labels int64 [B, k], global ids)
    """
    rows = len(embeddings)
    scores = torch.full((rows, k), -torch.inf, device=embeddings.device)
    labels = torch.full((rows, k), NONE, dtype=torch.int64, device=embeddings.device)
    chunks = shard.chunks(rows)
    banned = excluded.by_chunk(chunks) if excluded is not None else []
    for i, (start, stop) in enumerate(chunks):
        logits = embeddings @ shard.weights.weight.read(start, stop).T
        if offset is not None:
            logits += offset[start:stop]
        if excluded is not None:
            logits[banned[i]] = -torch.inf
        _keep_best(scores, labels, logits, shard.owned.start + start)
    return scores, labels


def _keep_best(scores: Tensor, labels: Tensor, logits: Tensor, first: int) -> None:
    """Merges a chunk's logits [B, c], of labels from `first` on, into the best so far."""
    k = scores.shape[1]
    # Few rows have anything in a late chunk that beats their k-th best: only those are merged.
    rows = (logits.amax(dim=1) > scores[:, -1]).nonzero().squeeze(1)
    if not len(rows):
        return
    best, where = _chunk_topk(logits[rows], min(k, logits.shape[1]))
    ids = torch.where(best > -torch.inf, where + first, NONE)
    merged = merge_topk([scores[rows], best], [labels[rows], ids], k)
    scores[rows], labels[rows] = merged


def _chunk_topk(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(values, columns) [b, k] of the k largest of each row, in no order; ties to the left."""
    best, where = logits.topk(k, dim=1, sorted=False)
    # torch.topk takes any of the equal values at its cut: such rows are sorted instead.
    tied = (logits >= best.amin(dim=1, keepdim=True)).sum(dim=1) > k
    if bool(tied.any()):
        order = logits[tied].argsort(dim=1, descending=True, stable=True)[:, :k]
        best[tied], where[tied] = logits[tied].gather(1, order), order
    return best, where


def merge_topk(scores: list[Tensor], labels: list[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The k best of several candidate lists per row; ties go to the smaller label id.

    Args:
        scores: float32 [B, k_i] each, in any order.
        labels: int64 [B, k_i] each, `NONE` where there is none.

    Returns:
        (scores [B, k] descending, labels [B, k])
    """
    score, label = torch.cat(scores, dim=1), torch.cat(labels, dim=1)
    by_label = label.argsort(dim=1)
    score, label = score.gather(1, by_label), label.gather(1, by_label)
    order = score.argsort(dim=1, descending=True, stable=True)[:, :k]
    return score.gather(1, order), label.gather(1, order)
