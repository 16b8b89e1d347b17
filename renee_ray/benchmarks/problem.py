"""A classifier step's inputs, drawn from a seed, for the benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from renee_ray.errors import ReneeError
from renee_ray.xfc.device import free_memory
from renee_ray.xfc.labels import LabelRange
from renee_ray.xfc.shard import Pairs, Shard
from renee_ray.xfc.weights.storages import Weights

POSITIVES_PER_ROW = 5


@dataclass(frozen=True)
class Problem:
    """A batch. embeddings: float32 [B, D]; rows, labels: int64 [m], the distinct positives."""

    num_labels: int
    embeddings: Tensor
    rows: Tensor
    labels: Tensor

    @property
    def owned(self) -> LabelRange:
        return LabelRange(0, self.num_labels, self.num_labels)

    @property
    def dim(self) -> int:
        return self.embeddings.shape[1]

    def shard(
        self, precision: str, momentum: float, chunk: int = 0, owned: LabelRange | None = None
    ) -> Shard:
        """Makes a shard with weights N(0, 0.02), drawn on the device; owned: None: all labels."""
        owned, device = self.owned if owned is None else owned, self.embeddings.device
        weights = Weights(precision, len(owned), self.dim, momentum > 0, device)
        shard = Shard(owned, weights, chunk)
        shard.initialise_normal(0.02, seed=0)
        return shard

    def positives(self) -> Pairs:
        return Pairs(self.rows, self.labels, self.owned, self.embeddings.device)


def make_problem(labels: int, dim: int, batch: int, device: torch.device) -> Problem:
    """Draws `batch` standard normal rows, and `POSITIVES_PER_ROW` random labels for each."""
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(batch, dim, generator=generator)
    drawn = torch.randint(0, labels, (batch, POSITIVES_PER_ROW), generator=generator)
    rows = torch.arange(batch).repeat_interleave(POSITIVES_PER_ROW)
    pairs = torch.stack([rows, drawn.flatten()], 1).unique(dim=0)
    return Problem(labels, embeddings.to(device), pairs[:, 0], pairs[:, 1])


def check_memory(labels: int, numbers: int, device: torch.device) -> None:
    """Checks that arrays of `numbers` float32 in all will fit.

    Raises:
        ReneeError: they will not.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of what was measured before
    free = free_memory(device)
    if 4 * numbers > free:
        raise ReneeError(
            f"--labels {labels} and its references need {4 * numbers / 2**30:,.1f} GiB and "
            f"{free / 2**30:,.1f} GiB of memory are free; give fewer --labels or "
            f"--references, or a lower --dim"
        )


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
