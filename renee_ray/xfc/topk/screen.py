"""The k best labels by bf16 products of all and fp32 products of few, in half the time.

The result is as good as by fp32 products alone (`topk` says how good that is).

A CPU with bf16 instructions multiplies bf16 two to three times as fast as fp32. With e' and w'
the embedding and a weight rounded to bf16, and a the product e'.w' as computed,

    |e.w - a|  <=  |e| |w - w'|  +  |e - e'| |w'|  +  2^-8 |a| / (1 - 2^-8)  +  D 2^-22 |e| |w'|

(Cauchy and Schwarz twice; a itself is rounded to bf16; the sums of either product, in any
order). So more than k labels are kept by a, the products of those that the bound leaves among
the k best are computed in fp32, and the k best of these are the k best of all if the k-th of them
exceeds the next one left out by more than the bound, which takes the largest |w'| and |w - w'| of
the shard. Rows where it does not are reported.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from renee_ray.xfc.kernels.device import native_bf16
from renee_ray.xfc.lanes import run
from renee_ray.xfc.shard import Chunks, Pairs, Shard
from renee_ray.xfc.topk.best import NONE, best_of, join
from renee_ray.xfc.weights.storages import Weights

ROWS = 8
"""Rows whose few products are one matmul, of which 1/ROWS is used: on most CPUs a lone row is
not multiplied by the same code as a batch, and its scores would differ in their last bit."""
HALF_ULP = 2.0**-8
"""Of bf16, relative to the number."""


def screens(shard: Shard, rows: int, k: int) -> bool:
    """Whether `screened_topk` can be used, and is faster.

    On a CPU only: a GPU may add up bf16 products in bf16, which no bound here accounts for.
    """
    few = shard.weights.dim < 16 or rows < ROWS or len(shard.owned) < 8 * kept(k)
    return not few and shard.weights.device.type == "cpu" and native_bf16(shard.weights.device)


def kept(k: int) -> int:
    """Labels of a row that are kept by their bf16 products."""
    return k + k // 2 + 28


def screened_topk(
    shard: Shard, embeddings: Tensor, k: int, excluded: Pairs | None, offset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `topk.shard_topk`, and whether each row is certain, bool [B]."""
    inputs = embeddings.bfloat16()
    # Of a label there are its products, and its weights as fp32 and bf16; that these pass through
    # a cache twice as small costs less than starting the loops twice as often.
    lanes = shard.lanes(len(inputs), len(inputs) + 3 * shard.weights.dim, gradient=False)
    narrows = [Narrow(shard.weights) for _ in lanes]
    # What a lane has found raises what the others have to beat. Labels with the very same product
    # are then not told apart by their ids, which does not matter here.
    threshold = torch.full((len(inputs), 1), -torch.inf)
    screened, labels = join(
        run(
            [
                partial(_screen, narrow, inputs, chunks, kept(k), threshold, excluded, offset)
                for narrow, chunks in zip(narrows, lanes, strict=True)
            ]
        ),
        kept(k),
    )
    shift = 0.0 if offset is None else float(offset.abs().max())
    bounds = [narrow.bound(embeddings, inputs) for narrow in narrows]
    bound, worst = torch.stack(bounds).amax(dim=0), screened[:, k - 1]
    # Only those are worth an fp32 product that the bound leaves among the k best.
    least = worst - 2.02 * (bound + _rounding(worst, shift))
    close = (screened > least[:, None]).sum(dim=1)
    few = int(close.amax().clamp(k, kept(k) - 1))
    last = screened[:, few]
    labels = labels[:, :few].sort(dim=1).values  # equal scores then leave the smaller one first
    scores = few_products(shard.weights, embeddings, labels, offset, len(lanes))
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    scores, labels = scores[:, :k].contiguous(), labels.gather(1, order)[:, :k]
    # NaN, of numbers that are not finite, is never certain; a row that lost no label always is.
    sure = last + bound + _rounding(last, shift) < scores[:, k - 1]
    sure |= (last == -torch.inf) & bound.isfinite()
    return scores, torch.where(labels == NONE, NONE, labels + shard.owned.start), sure


def _screen(
    narrow: Narrow,
    inputs: Tensor,
    chunks: Chunks,
    k: int,
    threshold: Tensor,
    excluded: Pairs | None,
    offset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The k best of some chunks by bf16 products, as far as they beat `threshold`; local labels."""
    rows, scratch = len(inputs), narrow.weights.scratch
    best = best_of(rows, k, inputs.device)
    best.threshold = threshold
    banned = excluded.by_chunk(chunks) if excluded is not None else []
    for i, (start, stop) in enumerate(chunks):
        products = scratch("screened", rows, stop - start, dtype=torch.bfloat16)
        torch.mm(inputs, narrow.rows(start, stop).T, out=products)
        if excluded is not None:
            products[banned[i]] = -torch.inf
        best.add(products, start, None if offset is None else offset[start:stop])
    return best.result()


def _rounding(products: Tensor, shift: float) -> Tensor:
    """How far products may be from their bf16 numbers, after an offset of at most `shift`."""
    return 1.01 * HALF_ULP * (products.abs() + shift)


@dataclass
class Narrow:
    """The weights of a shard as bf16, chunk by chunk, and how far they are from the weights.

    size, error: the largest |w'| and |w - w'| of the labels read so far.
    """

    weights: Weights
    size: float = field(default=0.0, init=False)
    error: float = field(default=0.0, init=False)

    def rows(self, start: int, stop: int) -> Tensor:
        """bfloat16 [stop - start, D], until the next call; may alias the shard."""
        from renee_ray.xfc.kernels import cpu_loops  # numba, which takes a second to import

        weights = self.weights
        measures = weights.scratch("measures", stop - start, 2)
        if weights.weight.aliased:  # fp32 lies in memory, and no bf16
            narrow = weights.scratch("narrow", stop - start, weights.dim, dtype=torch.bfloat16)
            cpu_loops.narrow(weights.read(start, stop), narrow, measures)
        else:
            narrow = weights.operand(start, stop, torch.bfloat16)
            cpu_loops.measure(narrow, measures)
            measures[:, 1] = measures[:, 0] * HALF_ULP * (not weights.weight.exact_bf16)
        # NaN, which is of no order, must not hide the others: no row is certain then.
        size, error = measures.nan_to_num(nan=torch.inf, posinf=torch.inf).amax(dim=0).tolist()
        self.size, self.error = max(self.size, size), max(self.error, error)
        return narrow

    def bound(self, embeddings: Tensor, inputs: Tensor) -> Tensor:
        """[B], of all but the rounding of a product to bf16."""
        dim = embeddings.shape[1]
        length = torch.linalg.vector_norm(embeddings, dim=1)
        lost = torch.linalg.vector_norm(embeddings - inputs, dim=1)
        return 1.01 * (length * (self.error + dim * 2.0**-22 * self.size) + lost * self.size)


def few_products(
    weights: Weights, embeddings: Tensor, labels: Tensor, offset: Tensor | None, lanes: int = 1
) -> Tensor:
    """Scores float32 [B, m] of the local labels int64 [B, m] of each row; -inf for `NONE`.

    B: at least `ROWS`.
    """
    scores = torch.empty(labels.shape, dtype=torch.float32, device=labels.device)
    own = torch.arange(ROWS, device=labels.device)

    def lane(starts: range) -> None:
        for start in starts:
            first = min(start, len(labels) - ROWS)
            rows = slice(first, first + ROWS)
            picked = labels[rows].clamp(min=0)
            products = embeddings[rows] @ weights.weight.pick(picked.flatten()).T
            found = products.view(ROWS, *picked.shape)[own, own]
            found = found if offset is None else found + offset[picked]
            scores[start : start + ROWS] = found[start - first :]  # those before are another's

    starts = range(0, len(labels), ROWS)
    run([partial(lane, starts[i::lanes]) for i in range(lanes)])
    return scores.masked_fill_(labels == NONE, -torch.inf)
