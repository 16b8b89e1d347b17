"""Collecting the k best labels of each row while chunks of scores pass by.

Of equal scores the smaller label comes first, at the cut too. Labels must come in ascending order.

    scores     [B, k + room]  fp32     of each row: the k best of some earlier labels, then those
    labels     [B, k + room]  int64    that beat the worst of these; ids, NONE in an empty place
    used       [B]            int64    how many places of a row are taken
    threshold  [B, 1]         fp32     the score that a label has to beat
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from renee_ray.xfc.labels import NONE

BLOCK = 64
"""Labels compared with the threshold together, before each single one; a row has room for two
blocks."""
TIED = 32
"""One in so many rows of a chunk is sorted at once."""


class Best:
    """The k best labels so far of each of B rows, and later ones that may be better.

    On a CPU: a compiled loop over the rows, whose first `used` places are taken. A row is cut to
    its k best only when its room is full. That happens about log(labels) times: of labels in random
    order the i-th chunk holds k / i that belong among the best so far.
    """

    def __init__(self, rows: int, k: int, device: torch.device) -> None:
        self.k, self.room = k, max(k, 2 * BLOCK)
        self.scores = torch.full((rows, k + self.room), -torch.inf, device=device)
        self.labels = torch.full((rows, k + self.room), NONE, dtype=torch.int64, device=device)
        self.used = torch.zeros(rows, dtype=torch.int64, device=device)
        self.threshold = torch.full((rows, 1), -torch.inf, device=device)

    def add(self, logits: Tensor, first: int, offset: Tensor | None = None) -> None:
        """Takes the scores of a chunk of labels, which begins at `first`, later than all before.

        Args:
            logits: float32 [B, c]; may be overwritten.
            offset: float32 [c], added to each row, as fp32.
        """
        from renee_ray.xfc.topk.cpu_loops import collect  # numba takes a second to import
        from renee_ray.xfc.weights.cpu_rows import over_rows

        places = self.threshold, self.used, self.scores, self.labels
        shift = np.empty(0, np.float32) if offset is None else offset.numpy()
        over_rows(collect, (logits, *places), self.k, first, shift, BLOCK)

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
    return (Best if device.type == "cpu" else PlainBest)(rows, k, device)


class PlainBest(Best):
    """Plain torch, for any device: a top-k of each chunk, merged into the first k places.

    The working memory is at most 4 bytes for each number of a chunk of 64 rows or more, and 16 KiB
    a row. A GPU comes here with small shards, and with rows that `gpu` leaves uncertain.
    """

    def add(self, logits: Tensor, first: int, offset: Tensor | None = None) -> None:
        if offset is not None:
            logits += offset
        logits.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        columns = _leading_columns(logits, min(self.k, logits.shape[1]))
        scores = torch.cat([self.scores[:, : self.k], logits.gather(1, columns)], dim=1)
        labels = torch.cat([self.labels[:, : self.k], columns + first], dim=1)
        self.scores[:, : self.k], self.labels[:, : self.k] = leading(scores, labels, self.k)


def _leading_columns(logits: Tensor, k: int) -> Tensor:
    """Returns where the k largest of each row are, int64 [B, k] ascending; ties: the leftmost."""
    best, columns = logits.topk(min(k + 1, logits.shape[1]), dim=1)
    columns = columns[:, :k]
    if best.shape[1] > k:
        # torch.topk takes any of the equal values at its cut: such rows are sorted, few at a time.
        tied = (best[:, k - 1] == best[:, k]).nonzero().squeeze(1)
        for some in tied.split(-(-len(logits) // TIED)):
            columns[some] = logits[some].argsort(dim=1, descending=True, stable=True)[:, :k]
    return columns.sort(dim=1).values
