"""The decoupled softmax over the labels of all shards, in two passes over the chunks.

For logits s = E W' [B, L] and values v [B, L] of the positives, 0 elsewhere, a step equals

    N_i       = log of the sum over l of  (1 - v_il) exp(s_il)
    loss      = - sum over i, l of  v_il log( exp(s_il) / (exp(s_il) + exp(N_i)) )
    d / ds_il = (1 - v_il) a_i exp(s_il - N_i) - v_il sigmoid(N_i - s_il)
    a_i       = sum over l of  v_il sigmoid(N_i - s_il)

With v in {0, 1} the negatives of a row are the labels that are no positive of it, and a positive
does not compete with other positives (Gupta et al., ICLR 2024, DecoupledSoftmax; their expression
weighs negatives by 1 - y as well, so that a soft target is both). A row without positives has
neither loss nor gradient.

Ledger, on each rank, for a shard of n labels with m pairs:

    highest, total   [B]      fp32    of a lane: N = highest + log(total) over its own labels
    normaliser       [B]      fp32    N, over all ranks
    shift            [B]      fp32    N - log(a), over all ranks; infinite where a is 0
    logits           [c, B]   fp32    one chunk's, made anew in the second pass

The ranks exchange three vectors [B]: the maximum, the sum for N, and a. Plain torch computes all
of it on every kind of device; the update of W is that of the device's kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from renee_ray.xfc.kernels.plain import multiply
from renee_ray.xfc.weights.scratch import Scratch


@dataclass(frozen=True)
class Reductions:
    """What sums and maximises a float32 vector [B] over the ranks; changes it in place."""

    max: Callable[[Tensor], Tensor] = lambda vector: vector
    sum: Callable[[Tensor], Tensor] = lambda vector: vector


Positives = tuple[Tensor, Tensor, Tensor]
"""Rows int64, columns inside a chunk int64 and values float32 of a chunk's positives; all [m]."""


class RowSums:
    """Log-sum-exp over the negatives among a lane's labels, chunk by chunk: `highest`, `total`."""

    def __init__(self, batch: int, device: torch.device) -> None:
        self.highest = torch.full((batch,), -torch.inf, device=device)
        self.total = torch.zeros(batch, device=device)
        self.pairs: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, operand: Tensor, inputs: Tensor, of: Positives, scratch: Scratch) -> None:
        """Adds a chunk's labels; arguments as those of `residual`."""
        logits, own = _logits(operand, inputs, of, scratch)
        self.pairs.append((of[0], of[2], own))
        highest = torch.maximum(self.highest, logits.amax(0))
        shift = _finite(highest)
        self.total *= (self.highest - shift).exp_()
        self.total += logits.sub_(shift).exp_().sum(0)
        self.highest = highest


@dataclass(frozen=True)
class Normalised:
    """What the second pass needs of the first: see the ledger."""

    normaliser: Tensor
    shift: Tensor

    @classmethod
    def of(cls, lanes: Iterable[RowSums], reductions: Reductions) -> tuple[Normalised, Tensor]:
        """Puts the lanes of all ranks together; a collective.

        Returns:
            (what `residual` takes; own labels' part of the loss, float64 scalar)
        """
        lanes = list(lanes)
        highest = torch.stack([lane.highest for lane in lanes]).amax(0)
        base = _finite(reductions.max(highest))
        totals = [lane.total * (lane.highest - base).exp_() for lane in lanes]
        normaliser = base + reductions.sum(torch.stack(totals).sum(0)).log_()
        loss = torch.zeros((), dtype=torch.float64, device=base.device)
        active = torch.zeros_like(base)
        for rows, values, own in (pairs for lane in lanes for pairs in lane.pairs):
            margin = normaliser[rows] - own
            loss += (values * softplus(margin)).sum(dtype=torch.float64)
            # Unlike index_add_, this adds in the same order each time on a GPU too.
            active.index_put_((rows,), values * margin.sigmoid(), accumulate=True)
        active = reductions.sum(active)
        shift = torch.where(active == 0, torch.inf, normaliser - active.log())
        return cls(normaliser, shift), loss

    def residual(
        self, operand: Tensor, inputs: Tensor, of: Positives, padded: Tensor, scratch: Scratch
    ) -> Tensor:
        """Returns d loss / d logits of a chunk, valid until the next call.

        Args:
            operand: [c, D]; inputs: [B, D]; padded: [c, at least B], all of one dtype. What
                follows the B columns becomes 0.
        """
        rows, columns, values = of
        logits, own = _logits(operand, inputs, of, scratch)
        logits.sub_(self.shift).exp_()
        logits[columns, rows] -= values * (self.normaliser[rows] - own).sigmoid_()
        padded[:, len(inputs) :] = 0
        return padded[:, : len(inputs)].copy_(logits)


def _logits(
    operand: Tensor, inputs: Tensor, of: Positives, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    """Returns (logits + log(1 - v) float32 [c, B], the logits of the positives float32 [m])."""
    shape = len(operand), len(inputs)
    logits = multiply(operand, inputs.T, scratch("logits fp32", *shape), scratch)
    rows, columns, values = of
    own = logits[columns, rows]
    logits[columns, rows] = own + torch.log1p(-values)
    return logits, own


def _finite(highest: Tensor) -> Tensor:
    """Replaces -inf, the maximum over no negative at all, by 0."""
    return torch.where(highest == -torch.inf, 0.0, highest)
