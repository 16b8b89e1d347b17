"""Ranges of labels: who owns which, by one integer function.

    shard r of R over n labels is [r*n // R, (r+1)*n // R)

Sizes differ by at most one, every id is owned exactly once, and a shard may be
empty when there are more ranks than labels. Ids are int64 throughout: float32
cannot represent integers above 2**24.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


NONE = -1
"""The label id in a place of a result that no label fills."""


def split_range(n: int, num_ranks: int, rank: int) -> tuple[int, int]:
    """Returns [start, stop) of piece `rank` when `n` things are split into `num_ranks` pieces."""
    if not 0 <= rank < num_ranks:
        raise ValueError(f"rank {rank} is not in [0, {num_ranks})")
    return rank * n // num_ranks, (rank + 1) * n // num_ranks


@dataclass(frozen=True)
class LabelRange:
    """The labels [start, stop) of `num_labels`."""

    start: int
    stop: int
    num_labels: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop <= self.num_labels:
            raise ValueError(f"[{self.start}, {self.stop}) is not within [0, {self.num_labels})")

    @classmethod
    def of_rank(cls, num_labels: int, num_ranks: int, rank: int) -> LabelRange:
        return cls(*split_range(num_labels, num_ranks, rank), num_labels)

    def __len__(self) -> int:
        return self.stop - self.start


def owners(labels: Tensor, num_labels: int, num_ranks: int) -> Tensor:
    """Returns the rank that owns each label, int64 [n], for labels int64 [n]."""
    import torch  # not above: the processes that read data need ranges and no torch

    bounds = torch.tensor(
        [split_range(num_labels, num_ranks, r)[1] for r in range(num_ranks)],
        dtype=torch.int64,
        device=labels.device,
    )
    return torch.bucketize(labels, bounds, right=True)
