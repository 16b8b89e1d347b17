"""One training step of the whole model, on one of R ranks (Renée, section 3; docs/design.md).

Ledger, for a global batch of B rows of which rank r holds b_r, and a rank that owns n labels:

    e     [b_r, D]   fp32    embeddings of own rows, with autograd
    E     [B, D]     fp32    those of all rows, without; the same on every rank
    dE    [B, D]     fp32    gradient of E from own labels; the sum over ranks is the whole one

The phases, by the method of `Step`, once the ranks know each other's row counts and
`GradientCache` has launched encoder(tokens):

    _route          positives travel to the owners of their labels
    _gather         e  = dropout(encoder(tokens));    E = gather_rows(e)
    _train_shard    dE = shard.step(E, positives)     sigmoid(E W') - Y, or the softmax's gradient
                                                      (xfc/softmax.py); dE, update of W
                    de = scatter_rows(dE)             beside the update of the last chunk of labels
    _backward       e.backward(scale * de)            in micro-batches (training/gradient_cache)
    _optimize       AdamW on the encoder, its gradient summed over ranks and divided by the scale;
                    row-wise Adagrad on a bag (model/bag.py)

What is not finite is skipped, by all ranks alike:

    E, in the classifier's dtype     Nothing is changed. All ranks see the same E, so they decide
                                     alike without another message.
    the encoder's gradient           AdamW makes no step and the loss scale is halved. The update
                                     of W stands: it needs E alone, which is finite.

The host waits for the device once a step, for whether E is finite. Whether the gradient is, AdamW
learns from a flag on the device (its `found_inf`). The host reads this flag at the wait of the
next step, before it needs the loss scale, or when `settle` is called. So a step's `skipped` is
right from then on, and a run that only skips ends one step late.

If E and W are finite, so is dE, short of an overflow of fp32. Otherwise W is lost already, and as
the encoder's gradient then is never finite again, `training/loop` ends the run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from renee_ray.config.schema import RunConfig
from renee_ray.model.bag import BagOptimizer
from renee_ray.model.dropout import dropout_mask
from renee_ray.model.encoder import training_attention
from renee_ray.model.loss_scale import LossScale
from renee_ray.model.token_gradient import TokenGradient
from renee_ray.rank.batch import Batch
from renee_ray.rank.collectives import (
    Ranks,
    all_max,
    all_sum,
    announce,
    gather_rows,
    route,
    scatter_rows,
)
from renee_ray.rank.recorder import Recorder
from renee_ray.training.gradient_cache import GradientCache
from renee_ray.xfc.kernels.plain import Update
from renee_ray.xfc.shard import Pairs, Shard
from renee_ray.xfc.softmax import Reductions
from renee_ray.xfc.weights.storages import SGD


@dataclass
class StepResult:
    """The outcome of one step.

    loss: this rank's labels' part of the batch's summed loss, float64 scalar.
    rows: points of the global batch.
    skipped: the encoder was not updated: the embeddings or its gradient were not finite. The
        latter is not known before the next step, or `settle`.
    classifier_updated: the embeddings were finite.
    wishes: the bits that any rank passed to the step, the same on all of them.
    """

    loss: Tensor
    rows: int
    skipped: bool = False
    classifier_updated: bool = True
    wishes: int = 0


@dataclass
class Step:
    """The parts that a step works on.

    encoder: [b, T] tokens -> [b, D] float32, wrapped in DDP when there are several ranks.
    optimizer: a fused one, which leaves out a step where `found_inf` is 1.
    loss_scale: scale of the encoder's gradient; is updated after each step, as `skipped`.
    tokens: reduces the gradient of the token vectors where DDP does not, or None.
    recorder: is told which phase of the step begins.
    bag: reduces the gradient of the encoder's bag and trains it, or None.
    """

    config: RunConfig
    encoder: nn.Module
    shard: Shard
    optimizer: torch.optim.Optimizer
    ranks: Ranks
    device: torch.device
    loss_scale: LossScale = field(default_factory=LossScale)
    tokens: TokenGradient | None = None
    recorder: Recorder = field(default_factory=Recorder)
    bag: BagOptimizer | None = None
    _unsettled: tuple[StepResult, Tensor] | None = None

    def __post_init__(self) -> None:
        assert self.optimizer.defaults["fused"], "no other kind of AdamW reads found_inf"

    def __call__(
        self, batch: Batch, step: int, sgd: SGD, *, with_loss: bool = False, wish: int = 0
    ) -> StepResult:
        """Trains on this rank's rows `batch` (possibly none) of the global batch number `step`.

        wish: bits that all ranks are told, beside the row counts.
        """
        self.recorder.enter("route")
        # First: it is patient with a rank whose batch is late, while DDP's forward may wait too.
        counts, wishes = announce(self.ranks, len(batch), wish)
        with training_attention(self.device):
            self.recorder.enter("encoder_forward")
            micro_batch = self.config.encoder.micro_batch
            own = GradientCache(self.encoder, batch, micro_batch, self.device)
            # A GPU embeds meanwhile: what needs no embeddings belongs here.
            positives, update = self._route(batch, counts), self.shard.prepared(sgd)
            mask, everyone = self._gather(own, counts, step)
            if not self._finite(everyone):
                self._skip(own)
                zero = torch.zeros((), dtype=torch.float64, device=self.device)
                return StepResult(zero, sum(counts), True, False, wishes)
            loss, scattering = self._train_shard(everyone, counts, positives, update, with_loss)
            self._backward(own, batch, mask, scattering)
        result = StepResult(loss, sum(counts), wishes=wishes)
        self._unsettled = result, self._optimize()
        return result

    def settle(self) -> None:
        """Waits for whether the last step has updated the encoder; all ranks call it alike."""
        if self._unsettled is not None:
            result, overflow = self._unsettled
            result.skipped, self._unsettled = bool(overflow), None
            self.loss_scale.update(not result.skipped)

    def _route(self, batch: Batch, counts: list[int]) -> Pairs:
        """Sends positives to the owners of their labels; returns those of own labels."""
        self.recorder.enter("route")
        pairs, owned = batch.pairs(sum(counts[: self.ranks.rank])), self.shard.owned
        rows, labels, *bits = route(self.ranks, *pairs, owned.num_labels, *batch.value_bits())
        self.recorder.enter("classifier")
        values = bits[0].contiguous().view(torch.float64) if bits else None
        return Pairs(rows, labels, owned, self.device, values)

    def _gather(self, own: GradientCache, counts: list[int], step: int) -> tuple[Tensor, Tensor]:
        """Returns the dropout mask of own rows, and E [B, D]."""
        self.recorder.enter("encoder_forward")
        first = sum(counts[: self.ranks.rank])
        dropout, seed = self.config.encoder.dropout, self.config.seed
        mask = dropout_mask(own.embeddings, dropout, seed, step, first)
        dropped = own.embeddings * mask
        self.recorder.enter("gather")
        return mask, gather_rows(self.ranks, dropped, counts)

    def _finite(self, everyone: Tensor) -> bool:
        """Waits for whether E is finite as the classifier multiplies it, and settles a step.

        Beyond 65,504 fp16 has no numbers.
        """
        finite = torch.isfinite(everyone.to(self.shard.weights.compute_dtype)).all()
        if self._unsettled is None:
            return bool(finite)
        result, overflow = self._unsettled
        both = torch.stack([finite, overflow > 0]).cpu()
        self._unsettled = result, both[1]
        self.settle()
        return bool(both[0])

    def _skip(self, own: GradientCache) -> None:
        """Changes nothing; the backward frees what the forward holds and joins DDP's reduction."""
        self.recorder.enter("encoder_backward")
        own.backward(torch.zeros_like(own.embeddings))
        self.encoder.zero_grad(set_to_none=True)

    def _train_shard(
        self, everyone: Tensor, counts: list[int], positives: Pairs, update: Update, with_loss: bool
    ) -> tuple[Tensor, Callable[[], Tensor]]:
        """Updates the shard; returns its loss, and dE on its way to the owners of its rows."""
        self.recorder.enter("classifier")
        started: list[Callable[[], Tensor]] = []
        softmax = self.config.classifier.objective == "softmax"
        loss = self.shard.step(
            everyone,
            positives,
            update,
            with_loss=with_loss,
            on_gradient=lambda dE: started.append(scatter_rows(self.ranks, dE, counts)),
            softmax=self._reductions() if softmax else None,
        )
        return loss, started[0]

    def _reductions(self) -> Reductions:
        """Returns the reductions over the ranks; the wait for the others is no work of this one."""

        def over_ranks(reduce: Callable[[Ranks, Tensor], Tensor], vector: Tensor) -> Tensor:
            self.recorder.enter("reduce")
            reduce(self.ranks, vector)
            self.recorder.enter("classifier")
            return vector

        return Reductions(partial(over_ranks, all_max), partial(over_ranks, all_sum))

    def _backward(
        self, own: GradientCache, batch: Batch, mask: Tensor, scattering: Callable[[], Tensor]
    ) -> None:
        """Waits for own rows of dE; gives the encoder its gradient, times the loss scale."""
        self.recorder.enter("scatter")
        gradient = scattering()
        self.recorder.enter("encoder_backward")
        own.backward(gradient * (mask * self.loss_scale.value))
        self.recorder.enter("reduce")
        if self.tokens is not None:
            self.tokens.reduce(batch.distinct_tokens())
        if self.bag is not None:
            self.bag.reduce()

    def _optimize(self) -> Tensor:
        """Updates the encoder unless its gradient is not finite on some rank.

        Returns:
            1 if it is not, else 0: float32 scalar, the same on all ranks.
        """
        self.recorder.enter("optimizer")
        rows = [] if self.bag is None else [self.bag.rows]
        parameters = [p for p in (*self.encoder.parameters(), *rows) if p.grad is not None]
        gradients = [p.grad for p in parameters if p.grad is not None]
        if gradients and self.loss_scale.value != 1:
            torch._foreach_div_(gradients, self.loss_scale.value)
        norm = torch.nn.utils.get_total_norm(gradients).to(self.device)
        # DDP has given all ranks the same gradient, unless a rank's own memory is at fault.
        self.recorder.enter("reduce")
        overflow = all_sum(self.ranks, (~torch.isfinite(norm)).float()).clamp_(max=1)
        self.recorder.enter("optimizer")
        if clip_norm := self.config.encoder.clip_norm:
            # Times a factor that is not finite, `tokens` would not be zero where it counts on it.
            finite = norm.nan_to_num(0, 0)
            torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, finite)
        self.optimizer.found_inf = overflow  # type: ignore[attr-defined]  # as a GradScaler does
        self.optimizer.step()
        if self.bag is not None:
            self.bag.step(overflow)
        self.encoder.zero_grad(set_to_none=True)
        return overflow
