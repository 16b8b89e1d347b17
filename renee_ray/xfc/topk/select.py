"""The k best labels of each row: streaming over a shard's chunks, and merging shards.

The result equals, for embeddings E [B, D] and weights W [n, D],

    Z = E @ W.T + offset;  Z[excluded] = -inf;  torch.topk(Z, k)

without ever holding Z [B, n]. Scores are fp32 products of the fp32 weights, since bf16 logits tie
by the dozen. Of labels with equal scores the one with the smaller id comes first, at the cut too.
So the order of (score, label) is total, and ranks that merge what shards found agree: each pair
of a row and a label has one score, its owner's.

BLAS adds up products in an order that depends on the device and on the shape. With another batch,
chunk or number of shards a score e.w may thus differ, by at most 2 r, where (any order of D sums;
rounding error 2^-24 of fp32)

    |score - e.w|  <=  r  =  1.01 D 2^-24 |e| |w|

and labels whose exact scores are no further apart than that may swap places. All others are
those of the exact products.

Rows that have fewer than k labels left are filled with label -1 and score -inf.

On a GPU most labels are ruled out by bf16 products (`gpu`).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from renee_ray.xfc.labels import NONE
from renee_ray.xfc.lanes import run
from renee_ray.xfc.shard import Chunks, Pairs, Shard
from renee_ray.xfc.topk.best import best_of, join, leading
from renee_ray.xfc.weights.buffers import Split
from renee_ray.xfc.weights.gpu_trial import has_kernels
from renee_ray.xfc.weights.storages import Weights

__all__ = ["NONE", "merge_topk", "shard_topk"]

LABELS_A_PLACE, FEWEST_LABELS = 24, 448
"""Labels of a shard for each place of a row, and besides, from which on a scan is faster."""


def shard_topk(
    shard: Shard,
    embeddings: Tensor,
    k: int,
    excluded: Pairs | None = None,
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Finds the k best labels of a shard for each row.

    Args:
        embeddings: [B, D] float32.
        excluded: pairs that must not be predicted (filter labels).
        offset: float32 [n], added to the score of each of the shard's labels; -inf leaves one out.

    Returns:
        (scores float32 [B, k] descending, labels int64 [B, k], global ids)
    """
    if not scans(shard, k):
        return _plain_topk(shard, embeddings, k, excluded, offset)
    from renee_ray.xfc.topk.gpu import scanned_topk  # triton is not everywhere

    scores, labels, certain = scanned_topk(shard, embeddings, k, excluded, offset)
    # All that the host waits for.
    if bool(certain.all()):
        return scores, labels
    rest = (~certain).nonzero().squeeze(1)
    left = None if excluded is None else excluded.of_rows(rest)
    scores[rest], labels[rest] = _plain_topk(shard, embeddings[rest], k, left, offset)
    return scores, labels


def scans(shard: Shard, k: int) -> bool:
    """Whether `gpu.scanned_topk` can be used, and is faster."""
    too_small = shard.weights.dim < 16 or len(shard.owned) < LABELS_A_PLACE * k + FEWEST_LABELS
    return not too_small and has_kernels(shard.weights.device)


def _plain_topk(
    shard: Shard, embeddings: Tensor, k: int, excluded: Pairs | None, offset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Finds them by fp32 products with every label."""
    rows, scratch = len(embeddings), shard.weights.scratch

    def lane(chunks: Chunks) -> tuple[Tensor, Tensor]:
        best = best_of(rows, k, embeddings.device)
        banned = excluded.by_chunk(chunks) if excluded is not None else []
        for i, (start, stop) in enumerate(chunks):
            logits = scratch("scores", rows, stop - start)
            torch.mm(embeddings, shard.weights.read(start, stop).T, out=logits)
            if excluded is not None:
                logits[banned[i][:2]] = -torch.inf
            shift = None if offset is None else offset[start:stop]
            best.add(logits, shard.owned.start + start, shift)
        return best.result()

    lanes = shard.lanes(rows, label_bytes(rows, shard.weights), gradient=False)
    return join(run([partial(lane, chunks) for chunks in lanes]), k)


def label_bytes(rows: int, weights: Weights) -> int:
    """Returns the bytes of working memory that one label of a chunk takes, at most.

    All are fp32: a score for each row, and as much again to find the best (`best.PlainBest`); the
    weights, with the lower halves of `buffers.Split`. What depends on the rows alone is left out.
    """
    return 8 * max(rows, 64) + (8 if isinstance(weights.weight, Split) else 4) * weights.dim


def merge_topk(scores: list[Tensor], labels: list[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Finds the k best of several candidate lists per row; ties go to the smaller label id.

    Args:
        scores: float32 [B, k_i] each, in any order.
        labels: int64 [B, k_i] each, `NONE` where there is none.

    Returns:
        (scores [B, k] descending, labels [B, k])
    """
    score, label = torch.cat(scores, dim=1), torch.cat(labels, dim=1)
    by_label = label.argsort(dim=1)
    return leading(score.gather(1, by_label), label.gather(1, by_label), k)
