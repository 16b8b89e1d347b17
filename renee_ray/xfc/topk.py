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
BLOCK = 64
"""Labels of which the largest score is looked at before each single one."""


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
    rows, scratch = len(embeddings), shard.weights.scratch
    best = _Best(rows, k, embeddings.device)
    chunks = shard.chunks(rows)
    banned = excluded.by_chunk(chunks) if excluded is not None else []
    for i, (start, stop) in enumerate(chunks):
        logits = scratch("scores", rows, stop - start)
        torch.mm(embeddings, shard.weights.read(start, stop).T, out=logits)
        if offset is not None:
            logits += offset[start:stop]
        if excluded is not None:
            logits[banned[i]] = -torch.inf
        best.add(logits, shard.owned.start + start)
    return best.result()


class _Best:
    """The k best labels so far of each of B rows, and later ones that may be better.

    scores, labels: [B, k + room]; the first k are the best so far, descending; then come
    `used` [B] labels, in their order, that beat the last of these, `threshold` [B, 1]. Only
    when the room is full is a row sorted, which happens about log(labels) times: of labels in
    random order the i-th chunk holds k / i that belong among the best up to there.
    """

    def __init__(self, rows: int, k: int, device: torch.device) -> None:
        self.k, self.room = k, max(k, 2 * BLOCK)
        self.scores = torch.full((rows, k + self.room), -torch.inf, device=device)
        self.labels = torch.full((rows, k + self.room), NONE, dtype=torch.int64, device=device)
        self.used = torch.zeros(rows, dtype=torch.int64, device=device)
        self.threshold = self.scores[:, k - 1 : k].clone()

    def add(self, logits: Tensor, first: int) -> None:
        """Takes a chunk's logits [B, c] of labels from `first` on, later than all before."""
        if logits.device.type == "cpu":
            self._collect(logits, first)
        else:
            self._compare(logits, first)

    def result(self) -> tuple[Tensor, Tensor]:
        """(scores [B, k] descending, labels [B, k])."""
        self._sort()
        return self.scores[:, : self.k].contiguous(), self.labels[:, : self.k].contiguous()

    def _collect(self, logits: Tensor, first: int) -> None:
        from renee_ray.xfc.cpu_kernels import collect  # numba, which takes a second to import

        done = torch.zeros_like(self.used)
        while True:
            collect(
                logits, self.threshold, self.used, done, self.scores, self.labels, self.k, first
            )
            if bool((done == logits.shape[1]).all()):
                return
            self._sort()

    def _compare(self, logits: Tensor, first: int) -> None:
        """In plain torch, for any device."""
        whole = logits.shape[1] // BLOCK * BLOCK
        self._add(logits[:, :whole], BLOCK, first)
        self._add(logits[:, whole:], logits.shape[1] - whole, first + whole)

    def _add(self, logits: Tensor, block: int, first: int) -> None:
        if not logits.numel():
            return
        rows, columns = self._better(logits, block)
        counts = rows.bincount(minlength=len(logits))
        if bool((self.used + counts > self.room).any()):
            self._sort()
            rows, columns = self._better(logits, block)
            counts = rows.bincount(minlength=len(logits))
            if bool((counts > self.room).any()):
                columns = _chunk_topk(logits, min(self.k, logits.shape[1])).flatten()
                counts = torch.full_like(counts, len(columns) // len(logits))
                rows = torch.arange(len(logits), device=rows.device).repeat_interleave(counts)
        before = counts.cumsum(0) - counts
        place = self.k + (self.used - before)[rows] + torch.arange(len(rows), device=rows.device)
        self.scores[rows, place] = logits[rows, columns]
        self.labels[rows, place] = columns + first
        self.used += counts

    def _better(self, logits: Tensor, block: int) -> tuple[Tensor, Tensor]:
        """(rows, columns) [m] of what beats the threshold, row by row, columns ascending."""
        blocks = logits.unflatten(1, (-1, block))
        # The largest of a block is cheap; most blocks of a late chunk hold nothing better.
        rows, which = (blocks.amax(dim=2) > self.threshold).nonzero(as_tuple=True)
        picked = blocks.flatten(0, 1).index_select(0, rows * blocks.shape[1] + which)
        inside, column = (picked > self.threshold[rows]).nonzero(as_tuple=True)
        return rows[inside], which[inside] * block + column

    def _sort(self) -> None:
        # Labels ascend among equal scores, first those of the best, then later ones: a stable
        # sort leaves the smaller label first.
        self.scores, order = self.scores.sort(dim=1, descending=True, stable=True)
        self.labels = self.labels.gather(1, order)
        self.scores[:, self.k :] = -torch.inf
        self.labels[:, self.k :] = NONE
        # A banned label has score -inf too, and must not be told apart from an empty place.
        self.labels[:, : self.k].masked_fill_(self.scores[:, : self.k] == -torch.inf, NONE)
        self.used.zero_()
        self.threshold = self.scores[:, self.k - 1 : self.k].clone()


def _chunk_topk(logits: Tensor, k: int) -> Tensor:
    """Columns [b, k] of the k largest of each row, ascending; of equal ones the leftmost."""
    best, where = logits.topk(k, dim=1, sorted=False)
    # torch.topk takes any of the equal values at its cut: such rows are sorted instead.
    tied = (logits >= best.amin(dim=1, keepdim=True)).sum(dim=1) > k
    if bool(tied.any()):
        where[tied] = logits[tied].argsort(dim=1, descending=True, stable=True)[:, :k]
    return where.sort(dim=1).values


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
