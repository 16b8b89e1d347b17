"""Lexical features: a bag of n-grams, which embeds a text by the words that stand in it.

With tf(g) how often the n-gram g stands in a row, and b(g) its bucket of P:

    u(g) = (1 + log tf(g)) idf[b(g)]       0 where g is dropped out
    e    = norm * sum of u(g) table[b(g)]  /  sqrt(sum of u(g)^2)

The table begins as N(0, 1/D), so the divisor is the expected norm of the sum. idf[b] = log(N / n_b)
if n-grams of bucket b stand in n_b of the N training points; log N if in none of these but in a
label's text that is used; and 0 if in neither: nothing would train such a vector. A run that begins
with the weights of another keeps the idf of that one, which its vectors were trained with, and
computes those that were 0 from its own points and texts.

Ledger, on rank r of R, whose rows have n-grams of u_r buckets, and the global batch of u:

    table    [P, D]    float32              the same on every rank
    idf      [P]       float32              likewise
    squares  [P]       float32              Adagrad's: mean squares of a row's gradient, summed
    grad     [P, D]    sparse, u_r rows     after the backward: own rows' buckets
    rows     [u, D]    with ids [u]         summed over the ranks, in rank order

    grad  --coalesce, gather_rows-->  rows  -->  squares[ids] = decay squares[ids] + mean(rows^2)
                                                 table[ids] -= rate rows / sqrt(squares[ids])

With decay 1 this is row-wise Adagrad, whose steps shrink as a row is trained more often. Below 1
they do not shrink below rate sqrt(1 - decay), while a row's first step stays as large as Adagrad's.

A row whose gradient is 0 stays as it is, so a rank without points, which trains on a blank row,
changes nothing. `squares` is a buffer of the module, and so is a part of the encoder's file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from renee_ray.config.schema import BagConfig
from renee_ray.rank.batch import Batch
from renee_ray.rank.collectives import Ranks, all_max, all_sum, gather_rows, row_counts
from renee_ray.rank.rounds import Rounds

FACTORS = -0x61C8864680B583EB, -0x4B47D0C5A0F5A6D3
"""Odd factors of the hash, which is int64 arithmetic modulo 2^64."""


class Bag(nn.Module):
    """A trained vector for each bucket of n-grams; embeds rows of tokens."""

    def __init__(self, config: BagConfig) -> None:
        super().__init__()
        self.dim, self.buckets, self.decay = config.dim, config.buckets, config.decay
        self._longest, self._dropout, self._norm = config.ngrams, config.dropout, config.norm
        self.table = nn.Parameter(torch.randn(config.buckets, config.dim) / math.sqrt(config.dim))
        self.idf: Tensor
        self.squares: Tensor
        self.register_buffer("idf", torch.zeros(config.buckets))
        self.register_buffer("squares", torch.zeros(config.buckets))

    def forward(self, ids: Tensor, mask: Tensor, keys: Tensor | None = None) -> Tensor:
        """ids, mask: int64 [b, T]; keys: int64 [b], of the dropout, or None -> float32 [b, D]."""
        rows, buckets, counts = self.ngrams(ids, mask)
        weights = self.idf[buckets] * (1 + counts.float().log())
        if keys is not None:
            drawn = _mixed(keys[rows] ^ _mixed(buckets)).remainder(1 << 24)
            weights = weights * (drawn >= self._dropout * (1 << 24))
        used = weights.nonzero()[:, 0]
        rows, buckets, weights = rows[used], buckets[used], weights[used]
        squares = torch.zeros(len(ids), device=ids.device).index_add_(0, rows, weights.square())
        weights = weights * self._norm / squares.sqrt()[rows]
        # Each vector is read, and has a gradient, once.
        different, places = buckets.unique(return_inverse=True)
        vectors = F.embedding(different, self.table, sparse=True)
        first = torch.searchsorted(rows, torch.arange(len(ids), device=ids.device))
        return F.embedding_bag(places, vectors, first, mode="sum", per_sample_weights=weights)

    def ngrams(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (row, bucket, times) of each different bucket of a row, in the order of rows."""
        tokens = _mixed(ids + 1)
        hashes, found = tokens, []
        for more in range(min(self._longest, ids.shape[1])):
            if more:
                hashes = _mixed(3 * hashes[:, :-1] + tokens[:, more:])
            rows, places = mask[:, more:].nonzero(as_tuple=True)
            found.append(rows * self.buckets + hashes[rows, places].remainder(self.buckets))
        pairs, counts = torch.cat(found).unique(return_counts=True)
        return pairs // self.buckets, pairs.remainder(self.buckets), counts

    @torch.no_grad()
    def weigh(
        self,
        points: Iterable[Batch],
        num_points: int,
        rounds: Rounds,
        texts: Iterable[tuple[Tensor, Tensor]] = (),
    ) -> None:
        """Computes idf where it is 0, from all training points and label texts.

        points, texts: those of this rank, the latter as ids and mask; num_points: of all ranks.
        """
        seen = torch.zeros_like(self.idf, dtype=torch.int64)
        named = torch.zeros_like(seen, dtype=torch.uint8)
        for batch in points:
            if len(batch):
                ids, mask, *_ = batch.tokens(seen.device)
                seen += self.ngrams(ids, mask)[1].bincount(minlength=self.buckets)
            rounds.add(len(batch))
        for ids, mask in texts:
            named[self.ngrams(ids, mask)[1]] = 1
            rounds.add(len(ids))
        rounds.finish()
        seen = torch.maximum(all_sum(rounds.ranks, seen), all_max(rounds.ranks, named))
        new = (num_points / seen).log().masked_fill(seen == 0, 0.0)
        self.idf.copy_(torch.where(self.idf > 0, self.idf, new))


class BagOptimizer:
    """Sums the gradient of a bag's table over the ranks, and trains the rows that have one.

    rate: the learning rate of the coming step.
    weight: the table; rows: float32 [u, D] whose `grad` is the summed gradient.

    Args:
        mean: whether to divide the sum by the number of ranks.
    """

    def __init__(self, bag: Bag, ranks: Ranks, *, mean: bool = False) -> None:
        self.rate, self.weight = 0.0, bag.table
        self._squares, self._decay, self._ranks = bag.squares, bag.decay, ranks
        self._scale = 1 / ranks.num_ranks if mean else 1.0
        self._ids = torch.zeros(0, dtype=torch.int64, device=bag.table.device)
        self.rows = bag.table.new_zeros(0, bag.dim)

    def reduce(self) -> None:
        """Takes the table's sparse gradient, and makes that of the global batch of it."""
        assert self.weight.grad is not None
        own = self.weight.grad.coalesce()
        self.weight.grad = None
        counts = row_counts(self._ranks, own.indices().shape[1])
        everyone = gather_rows(self._ranks, own.values() * self._scale, counts)
        ids = gather_rows(self._ranks, own.indices().T.contiguous(), counts)[:, 0]
        self._ids, places = ids.unique(return_inverse=True)
        rows = everyone.new_zeros(len(self._ids), everyone.shape[1])
        # Rank by rank: a GPU adds repeated indices in any order, and replicas would drift apart.
        for at, of_rank in zip(places.split(counts), everyone.split(counts), strict=True):
            rows.index_add_(0, at, of_rank)
        self.rows = rows.detach().requires_grad_()
        self.rows.grad = rows  # clipped and unscaled in place, as that of any parameter

    @torch.no_grad()
    def step(self, overflow: Tensor) -> None:
        """Trains the rows that have a gradient, but none where `overflow`, a scalar, is 1."""
        assert self.rows.grad is not None
        gradient = self.rows.grad.masked_fill(overflow > 0, 0.0)
        before, new = self._squares[self._ids], gradient.square().mean(1)
        squares = torch.where(new > 0, self._decay * before + new, before)
        self._squares[self._ids] = squares
        rates = torch.where(squares > 0, self.rate / squares.sqrt(), 0.0)  # g^2 may underflow
        self.weight.index_add_(0, self._ids, gradient * -rates[:, None])


def _mixed(values: Tensor) -> Tensor:
    """Returns a hash, int64, of each value."""
    for shift, factor in zip((32, 29), FACTORS, strict=True):
        values = (values ^ (values >> shift)) * factor
    return values ^ (values >> 32)
