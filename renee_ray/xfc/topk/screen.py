"""The k best labels by bf16 products of all labels and fp32 products of a few, in half the time.

The result is as good as by fp32 products alone (`select` says how good that is). A CPU with bf16
instructions multiplies bf16 two to three times as fast as fp32.

Let e' and w' be the embedding e and a weight w rounded to bf16, and a the product e'.w' as the
CPU computes it, in bf16. Then, by Cauchy and Schwarz (twice), the rounding of a itself and that
of the sums of either product, in any order:

    |e.w - a|  <=  |e| |w - w'|  +  |e - e'| |w'|  +  D 2^-22 |e| |w'|  +  2^-8 |a| / (1 - 2^-8)

`Narrow.bound` gives the first three terms, with the largest |w'| and |w - w'| of the shard in
place of each label's own; `_rounding` gives the last. The search then takes three steps.

1. Keep the `kept(k)` labels of largest a, more than k.
2. Of these, the candidates are those whose a is within twice the bound of the k-th largest:
   no other kept label can be among the k best. Compute their fp32 scores.
3. Take the k best of these scores. Let a* be the largest a that was left out. The row is certain
   if  a* + bound < k-th best score:  then no label left out can be among the k best.

Rows that are not certain are reported; the caller computes them by fp32 products alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from renee_ray.xfc.device import native_bf16
from renee_ray.xfc.labels import NONE
from renee_ray.xfc.lanes import run
from renee_ray.xfc.shard import Chunks, Pairs, Shard
from renee_ray.xfc.topk.best import best_of, join
from renee_ray.xfc.weights.storages import Weights

ROWS = 8
"""Rows whose candidates' scores are one matmul on a CPU: most do not multiply a lone row by the
same code as a batch, and its scores would differ in their last bit."""
HALF_ULP = 2.0**-8
"""Relative rounding error of bf16 (half a unit in the last place)."""


def screens(shard: Shard, rows: int, k: int) -> bool:
    """Whether `screened_topk` can be used, on a CPU, and is faster."""
    too_small = shard.weights.dim < 16 or rows < ROWS or len(shard.owned) < 8 * kept(k)
    return not too_small and shard.weights.device.type == "cpu" and native_bf16(
        shard.weights.device
    )  # fmt: skip


def kept(k: int) -> int:
    """Returns how many labels of a row are kept by their bf16 products."""
    return k + k // 2 + 28


def screened_topk(
    shard: Shard, embeddings: Tensor, k: int, excluded: Pairs | None, offset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Does what `select.shard_topk` does, and returns which rows are certain too, bool [B]."""
    inputs = embeddings.bfloat16()
    # A label takes its products, and its weights as fp32 and bf16. Only half of that fits the
    # cache: larger chunks win, since starting the loops costs more than the extra cache misses.
    lanes = shard.lanes(len(inputs), len(inputs) + 3 * shard.weights.dim, gradient=False)
    narrows = [Narrow(shard.weights) for _ in lanes]
    # Lanes share the threshold: what one has found raises what the others have to beat. Labels
    # with the very same product are then not told apart by their ids, which is left to step 2.
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
    # A label of offset -inf is never kept, and no error of its product matters.
    shift = 0.0 if offset is None else float(offset.abs().nan_to_num(posinf=0.0).max())
    bounds = [narrow.bound(embeddings, inputs) for narrow in narrows]
    bound, kth = torch.stack(bounds).amax(dim=0), screened[:, k - 1]
    lowest = kth - 2.02 * (bound + _rounding(kth, shift))
    within_bound = (screened > lowest[:, None]).sum(dim=1)
    candidates = int(within_bound.amax().clamp(k, kept(k) - 1))
    left_out = screened[:, candidates]
    score = partial(candidate_scores, shard.weights, embeddings, offset, ROWS, len(lanes))
    rounding = _rounding(left_out, shift)
    return settle(shard, k, labels[:, :candidates], left_out, bound, rounding, score)


def settle(
    shard: Shard,
    k: int,
    labels: Tensor,
    left_out: Tensor,
    bound: Tensor,
    rounding: Tensor,
    score: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Takes the second and third step of a search.

    Args:
        labels: int64 [B, m], the candidates; local, or `NONE`.
        left_out: [B], the largest product of a label that is no candidate.
        bound, rounding: [B], how far a product may be from its score: by up to their sum.
        score: computes the fp32 scores [B, m] of labels [B, m].
    """
    # In the order of ids: of equal scores the smaller one then comes first.
    labels = labels.sort(dim=1).values
    scores, order = score(labels).sort(dim=1, descending=True, stable=True)
    scores, labels = scores[:, :k].contiguous(), labels.gather(1, order)[:, :k]
    # NaN, of numbers that are not finite, is never certain; a row that lost no label always is.
    certain = left_out + bound + rounding < scores[:, k - 1]
    certain |= (left_out == -torch.inf) & bound.isfinite()
    return scores, torch.where(labels == NONE, NONE, labels + shard.owned.start), certain


def _screen(
    narrow: Narrow,
    inputs: Tensor,
    chunks: Chunks,
    k: int,
    threshold: Tensor,
    excluded: Pairs | None,
    offset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Returns the k best of some chunks by bf16 products, if above `threshold`; local labels."""
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
    """Bounds the last term, the rounding of products that have had up to `shift` added to them."""
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
        """Returns bfloat16 [stop - start, D], valid until the next call; may alias the shard."""
        from renee_ray.xfc.topk import cpu_loops  # numba takes a second to import

        weights = self.weights
        norms = weights.scratch("norms", stop - start, 2)
        if weights.weight.aliased:  # fp32 lies in memory, and no bf16
            narrow = weights.scratch("narrow", stop - start, weights.dim, dtype=torch.bfloat16)
            cpu_loops.narrow(weights.read(start, stop), narrow, norms)
        else:
            narrow = weights.operand(start, stop, torch.bfloat16)
            cpu_loops.row_norms(narrow, norms)
            norms[:, 1] = norms[:, 0] * HALF_ULP * (not weights.weight.exact_bf16)
        # NaN, which is of no order, must not hide the others: no row is certain then.
        size, error = norms.nan_to_num(nan=torch.inf, posinf=torch.inf).amax(dim=0).tolist()
        self.size, self.error = max(self.size, size), max(self.error, error)
        return narrow

    def bound(self, embeddings: Tensor, inputs: Tensor) -> Tensor:
        """Returns the bound's first three terms for each row, [B], with 1% to spare."""
        dim = embeddings.shape[1]
        length = torch.linalg.vector_norm(embeddings, dim=1)
        lost = torch.linalg.vector_norm(embeddings - inputs, dim=1)
        return 1.01 * (length * (self.error + dim * 2.0**-22 * self.size) + lost * self.size)


def candidate_scores(
    weights: Weights, embeddings: Tensor, offset: Tensor | None, size: int, lanes: int,
    labels: Tensor,
) -> Tensor:  # fmt: skip
    """Computes scores float32 [B, m] of each row's local labels int64 [B, m]; `NONE` gives -inf.

    size: rows whose scores are one matmul, of which 1 / size is used; at most B.
    """
    scores = torch.empty(labels.shape, dtype=torch.float32, device=labels.device)
    own = torch.arange(size, device=labels.device)

    def lane(starts: range) -> None:
        for start in starts:
            first = min(start, len(labels) - size)
            rows = slice(first, first + size)
            picked = labels[rows].clamp(min=0)
            products = embeddings[rows] @ weights.weight.pick(picked.flatten()).T
            found = products.view(size, *picked.shape)[own, own]
            found = found if offset is None else found + offset[picked]
            scores[start : start + size] = found[start - first :]  # those before are another's

    starts = range(0, len(labels), size)
    run([partial(lane, starts[i::lanes]) for i in range(lanes)])
    return scores.masked_fill_(labels == NONE, -torch.inf)
