"""Collecting the k best labels of each row while chunks of scores pass by.

Of equal scores the smaller label comes first, at the cut too. Labels must come in ascending order.

    scores     [B, k + room]  fp32     of each row: the k best of some earlier labels, then those
    labels     [B, k + room]  int64    that beat the worst of these; ids, NONE in an empty place
    used       [B]            int64    how many places of a row are taken
    threshold  [B, 1]         fp32     the score that a label has to beat
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from renee_ray.xfc.labels import NONE

BLOCK = 64
"""Labels compared with the threshold together, before each single one; a row has room for two
blocks."""
SPARSE = 32
"""The chunk's own top-k is taken if more than one block in so many may hold a better label."""


class Best(ABC):
    """The k best labels so far of each of B rows, and later ones that may be better.

    A row is cut to its k best only when its room is full. That happens about log(labels) times:
    of labels in random order the i-th chunk holds k / i that belong among the best so far.
    """

    def __init__(self, rows: int, k: int, device: torch.device) -> None:
        self.k, self.room = k, max(k, 2 * BLOCK)
        self.scores = torch.full((rows, k + self.room), -torch.inf, device=device)
        self.labels = torch.full((rows, k + self.room), NONE, dtype=torch.int64, device=device)
        self.used = torch.zeros(rows, dtype=torch.int64, device=device)
        self.threshold = torch.full((rows, 1), -torch.inf, device=device)

    @abstractmethod
    def add(self, logits: Tensor, first: int, offset: Tensor | None = None) -> None:
        """Takes the scores of a chunk of labels, which begins at `first`, later than all before.

        Args:
            logits: float32 or bfloat16 [B, c]; may be overwritten.
            offset: float32 [c], added to each row, as fp32.
        """

    def result(self) -> tuple[Tensor, Tensor]:
        """Returns (scores [B, k] descending, labels [B, k])."""
        # Labels ascend among equal scores.
        scores, labels = leading(self.scores, self.labels, self.k)
        # A banned label has score -inf too, and must not be told apart from an empty place.
        return scores, labels.masked_fill_(scores == -torch.inf, NONE)


def leading(scores: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns the k largest of scores [B, m], descending, and their labels; ties: the leftmost."""
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return scores[:, :k].contiguous(), labels.gather(1, order[:, :k])


def join(found: list[tuple[Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    """Returns the k best of several results, each with later labels than those before it."""
    if len(found) == 1:
        return found[0]
    scores, labels = zip(*found, strict=True)
    return leading(torch.cat(scores, dim=1), torch.cat(labels, dim=1), k)


def best_of(rows: int, k: int, device: torch.device) -> Best:
    """Returns an empty collector of the k best labels of each row."""
    return (CompiledBest if device.type == "cpu" else PlainBest)(rows, k, device)


class CompiledBest(Best):
    """A compiled loop over the rows, for CPUs. The first `used` places of a row are taken."""

    def add(self, logits: Tensor, first: int, offset: Tensor | None = None) -> None:
        from renee_ray.xfc.topk.cpu_loops import collect  # numba takes a second to import

        places = self.threshold, self.used, self.scores, self.labels
        collect(logits, *places, self.k, first, offset, BLOCK)


class PlainBest(Best):
    """Plain torch, for any device. A row has its k best so far, then `used` more.

    The first k places hold the best so far, descending; the others labels that beat the last of
    these. The working memory is at most 4 bytes for each number of a chunk of 64 rows or more,
    and 16 KiB a row. A list of better labels takes up to 64 bytes an entry, so it is made only
    where it is short.
    """

    def add(self, logits: Tensor, first: int, offset: Tensor | None = None) -> None:
        logits = logits.float()
        if offset is not None:
            logits += offset
        whole = logits.shape[1] // BLOCK * BLOCK
        self._add(logits[:, :whole], BLOCK, first)
        self._add(logits[:, whole:], logits.shape[1] - whole, first + whole)

    def _sort(self) -> None:
        self.scores[:, : self.k], self.labels[:, : self.k] = self.result()
        self.scores[:, self.k :] = -torch.inf
        self.labels[:, self.k :] = NONE
        self.threshold = self.scores[:, self.k - 1 : self.k].clone()
        self.used.zero_()

    def _add(self, logits: Tensor, block: int, first: int) -> None:
        if not logits.numel():
            return
        found = self._better(logits, block)
        if found is None:
            self._sort()  # which raises the threshold, and makes room for k
            found = self._better(logits, block)
        rows, columns, counts = _chunk_topk(logits, self.k) if found is None else found
        before = counts.cumsum(0) - counts
        place = self.k + (self.used - before)[rows] + torch.arange(len(rows), device=rows.device)
        self.scores[rows, place] = logits[rows, columns]
        self.labels[rows, place] = columns + first
        self.used += counts

    def _better(self, logits: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """Returns what beats the threshold, as `_chunk_topk` does, or None if that is too much.

        While a row has no threshold, all of it beats it.
        """
        blocks = logits.unflatten(1, (-1, block))
        # The largest of a block is cheap; most blocks of a late chunk hold nothing better. A block
        # with a NaN, whose maximum is NaN, is looked at.
        largest = blocks.amax(dim=2)
        rows, which = (largest <= self.threshold).logical_not_().nonzero(as_tuple=True)
        if len(rows) > len(logits) * max(2, blocks.shape[1] // SPARSE):
            return None
        picked = blocks.flatten(0, 1).index_select(0, rows * blocks.shape[1] + which)
        inside, column = (picked > self.threshold[rows]).nonzero(as_tuple=True)
        rows, columns = rows[inside], which[inside] * block + column
        counts = rows.bincount(minlength=len(logits))
        if bool((self.used + counts > self.room).any()):
            return None
        return rows, columns, counts


def _chunk_topk(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Finds the k largest of each row, of equal ones the leftmost; a NaN becomes -inf.

    Returns:
        (rows int64 [m], columns int64 [m] ascending in each row, their number int64 [B])
    """
    batch, k = len(logits), min(k, logits.shape[1])
    logits.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    best, columns = logits.topk(min(k + 1, logits.shape[1]), dim=1)
    columns = columns[:, :k]
    if best.shape[1] > k:
        # torch.topk takes any of the equal values at its cut: such rows are sorted, few at a time.
        tied = (best[:, k - 1] == best[:, k]).nonzero().squeeze(1)
        for some in tied.split(-(-batch // SPARSE)):
            columns[some] = logits[some].argsort(dim=1, descending=True, stable=True)[:, :k]
    counts = columns.new_full((batch,), k)
    rows = torch.arange(batch, device=logits.device).repeat_interleave(k)
    return rows, columns.sort(dim=1).values.flatten(), counts
