"""Building the FAISS index of a range of labels in bounded memory: two passes over its rows.

The first pass finds M (see scoring/index.py), the rows' hash and two samples, on which the index is
trained; the second adds all rows, a block at a time.

Labels of large weights are most of those with the best scores, so centroids are worth most near
them. They are means of a sample to which row l comes with a chance that grows as |w_l|^4. Where
norms differ, a query then reads a fifth of what it reads with means of an even sample. How rows are
compressed is learnt from both samples, since small rows must not seem larger than they are.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from renee_ray.errors import ReneeError, reason
from renee_ray.scoring.index import load_faiss

Rows = Callable[[], Iterator[Tensor]]
"""Gives the rows [w_l, b_l] of a range's labels in order, float32 [m, D + 1] at a time."""

ALIGN = 8
"""FAISS is 8 times as slow where 8 does not divide the width."""
FLAT_BELOW = 50_000
TRAINED_ON, ITERATIONS = 16, 8
"""Rows for each centroid that k-means is trained on, and its iterations."""
EVEN = 20_000
"""Rows of the even sample."""
SEED, SMALLEST_RATE = 7, 1e-30
"""Seed of the noise of sampling, and the rate of rows without any weight."""


def default_factory(labels: int, width: int) -> str:
    """Chooses FAISS's factory string for a range, whose vectors have `width` numbers."""
    if labels < FLAT_BELOW:
        return "Flat"
    return f"IVF{2 ** round(math.log2(4 * math.sqrt(labels)))},PQ{width // 2}x4fs"


def default_candidates(factory: str) -> int:
    """Returns the candidates of a range for each label asked for."""
    return 1 if factory == "Flat" else 30


def width_of(dim: int) -> int:
    """Returns the numbers of an indexed vector of embeddings of D numbers."""
    return -(-(dim + 2) // ALIGN) * ALIGN


def empty_index(factory: str, dim: int) -> Any:
    """Makes an index that is not trained.

    Raises:
        ReneeError: FAISS does not know the factory string, or it is of another kind.
    """
    faiss = load_faiss()
    try:
        index = faiss.index_factory(width_of(dim), factory)
    except RuntimeError as error:
        problem = f"FAISS does not take it for {width_of(dim)} numbers: {reason(error):.200}"
        raise ReneeError(f"factory={factory!r:.80}: {problem}; try IVF1024,SQ8") from None
    if not isinstance(index, faiss.IndexHNSW | faiss.IndexIVF | faiss.IndexFlat):
        raise ReneeError(
            f"factory={factory!r:.80} makes a {type(index).__name__}; give a flat index, HNSW or "
            f"IVF, as Flat, HNSW32,SQ8 or IVF1024,SQ8"
        )
    return index


def check_size(index: Any, factory: str, labels: int) -> None:
    """Raises ReneeError where k-means is to find more centroids than there are labels."""
    codes = 2**index.pq.nbits if hasattr(index, "pq") else 0
    centroids = max(codes, getattr(index, "nlist", 0))
    if centroids > labels:
        raise ReneeError(
            f"factory={factory!r:.80} has {centroids:,} lists or codes, and a range only "
            f"{labels:,} labels; give fewer of the former or fewer ranges"
        )


@dataclass(frozen=True)
class Survey:
    """What one pass over a range's rows finds.

    sha256: of the rows; greatest: M; even: evenly spaced rows; large: rows that rather are large.
    """

    sha256: str
    greatest: float
    even: Tensor
    large: Tensor

    @classmethod
    def of(cls, rows: Rows, number: int, wanted: int) -> Survey:
        """Reads `number` rows, and keeps `wanted` of them that rather are large.

        Row l waits for a time drawn from the exponential distribution of rate |w_l|^4, and the rows
        that come first are kept. So each next one is of those left, by its share of their rates
        (Efraimidis and Spirakis, 2006).

        Raises:
            ReneeError: a weight is not finite.
        """
        digest, square, first, even = hashlib.sha256(), 0.0, 0, []
        places = torch.arange(min(EVEN, number)) * number // max(1, min(EVEN, number))
        noise = torch.Generator().manual_seed(SEED)
        times, large = torch.empty(0, dtype=torch.float64), torch.empty(0)
        for block in rows():
            digest.update(block.numpy().data)
            square = float(torch.maximum(_squares(block).max(), torch.tensor(square)))
            if not math.isfinite(square):  # torch's maximum keeps a NaN
                raise ReneeError("a weight is not finite; take another checkpoint")
            even.append(block[places[(places >= first) & (places < first + len(block))] - first])
            first += len(block)
            rates = _squares(block[:, :-1]).square().clamp_(min=SMALLEST_RATE)
            drawn = torch.empty_like(rates).exponential_(generator=noise) / rates
            times = torch.cat([times, drawn])
            times, kept = times.topk(min(wanted, len(times)), largest=False, sorted=False)
            large = torch.cat([large, block])[kept]
        return cls(digest.hexdigest(), math.sqrt(square), torch.cat(even), large)


def build(index: Any, rows: Rows, survey: Survey) -> None:
    """Trains an empty index on the survey's samples, and adds the rows block by block."""
    faiss = load_faiss()
    sample = augmented(survey.even, survey.greatest, index.d)
    if isinstance(index, faiss.IndexIVF):
        index.cp.max_points_per_centroid, index.cp.niter = TRAINED_ON, ITERATIONS
        index.cp.min_points_per_centroid = TRAINED_ON  # FAISS warns of fewer
        large = augmented(survey.large, survey.greatest, index.d)
        index.train_q1(len(large), faiss.swig_ptr(large), False, index.metric_type)
        sample = np.vstack([sample, large])
    index.train(sample)
    for block in rows():
        index.add(augmented(block, survey.greatest, index.d))


def training_rows(index: Any) -> int:
    """Returns the rows that the centroids of an index are trained on."""
    return TRAINED_ON * index.nlist if isinstance(index, load_faiss().IndexIVF) else 0


def augmented(rows: Tensor, greatest: float, width: int) -> NDArray[np.float32]:
    """Returns [w, b, sqrt(M^2 - |w|^2 - b^2), 0 ...] float32 [m, width] of rows [w, b].

    The root is taken in float64, of 0 where rounding leaves less.
    """
    out = np.zeros((len(rows), width), np.float32)
    out[:, : rows.shape[1]] = rows.numpy()
    left = (greatest * greatest - _squares(rows)).clamp_(min=0).sqrt_()
    out[:, rows.shape[1]] = left.numpy()
    return out


def _squares(rows: Tensor) -> Tensor:
    """Returns the squared norm of each row, float64 [m], without a float64 copy of the rows."""
    numbers = rows.numpy()
    return torch.from_numpy(np.einsum("ij,ij->i", numbers, numbers, dtype=np.float64))
