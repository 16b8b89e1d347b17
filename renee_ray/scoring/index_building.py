"""Building the FAISS index of a range of labels in bounded memory: two passes over its rows.

The first pass finds M (see scoring/index.py), the rows' hash and a sample, on which the index is
trained; the second adds all rows, a block at a time.
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

ALIGN = 16
"""FAISS compares 16 numbers at once, and is 8 times as slow where 8 does not divide the width."""
FLAT_BELOW, GRAPH_BELOW, LISTS_BELOW = 50_000, 500_000, 20_000_000
TRAINED_ON = 64
"""Rows for each centroid that k-means is trained on."""
TRAINED_AT_LEAST = 100_000


def default_factory(labels: int, width: int) -> str:
    """Chooses FAISS's factory string for a range, whose vectors have `width` numbers."""
    if labels < FLAT_BELOW:
        return "Flat"
    if labels < GRAPH_BELOW:
        return "HNSW32,SQ8"
    lists = 2 ** round(math.log2(4 * math.sqrt(labels)))
    return f"IVF{lists},SQ8" if labels < LISTS_BELOW else f"IVF{lists},PQ{width // 2}"


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
        raise ReneeError(f"factory={factory!r:.80}: {problem}; try HNSW32,SQ8") from None
    if not isinstance(index, faiss.IndexHNSW | faiss.IndexIVF | faiss.IndexFlat):
        raise ReneeError(
            f"factory={factory!r:.80} makes a {type(index).__name__}; give a flat index, HNSW or "
            f"IVF, as Flat, HNSW32,SQ8 or IVF4096,SQ8"
        )
    return index


@dataclass(frozen=True)
class Survey:
    """What one pass over a range's rows finds. sha256: of the rows; sample: some of them."""

    sha256: str
    greatest: float
    sample: Tensor

    @classmethod
    def of(cls, rows: Rows, number: int, wanted: int) -> Survey:
        """Reads `number` rows and keeps `wanted` of them, evenly spaced.

        Raises:
            ReneeError: a weight is not finite.
        """
        digest, square, first, kept = hashlib.sha256(), 0.0, 0, []
        places = torch.arange(min(wanted, number)) * number // max(1, min(wanted, number))
        for block in rows():
            digest.update(block.numpy().data)
            square = float(torch.maximum(_squares(block).max(), torch.tensor(square)))
            if not math.isfinite(square):  # torch's maximum keeps a NaN
                raise ReneeError("a weight is not finite; take another checkpoint")
            here = places[(places >= first) & (places < first + len(block))] - first
            kept.append(block[here])
            first += len(block)
        return cls(digest.hexdigest(), math.sqrt(square), torch.cat(kept))


def build(index: Any, rows: Rows, survey: Survey) -> None:
    """Trains an empty index on the survey's sample, and adds the rows block by block."""
    faiss = load_faiss()
    if isinstance(index, faiss.IndexIVF):
        index.cp.max_points_per_centroid, index.cp.niter = TRAINED_ON, 10
    index.train(augmented(survey.sample, survey.greatest, index.d))
    for block in rows():
        index.add(augmented(block, survey.greatest, index.d))


def training_rows(index: Any) -> int:
    """Returns the rows that an index is trained on."""
    lists = index.nlist if isinstance(index, load_faiss().IndexIVF) else 0
    return max(TRAINED_ON * lists, TRAINED_AT_LEAST)


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
