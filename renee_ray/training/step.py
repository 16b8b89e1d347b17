"""One training step of the whole model, on one of R ranks (Renée, section 3; docs/design.md).

    e  = dropout(encoder(tokens))            own rows [b_r, D], autograd, data-parallel
    E  = gather_rows(e)                      [B, D], detached
    dE = shard.step(E, positives)            own labels: sigmoid(E W') - Y, dE, update of W
    e.backward(scale * scatter_rows(dE))     runs beside the update of the last chunk of labels;
                                             in micro-batches (training/gradient_cache)
    AdamW on the encoder, its gradient summed over ranks and divided by the scale

A step whose embeddings, in the classifier's dtype, or whose encoder's gradient are not finite is
skipped by every rank on both sides. All ranks see the same E, so they decide alike without
another message, before any weight has changed. The gradient is known only when the classifier is
updated already: its update is taken back then (xfc/undo.py), if it is not finite on any rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from renee_ray.model.encoder import training_attention
from renee_ray.model.loss_scale import LossScale
from renee_ray.model.token_gradient import TokenGradient
from renee_ray.parallel.batch import Batch
from renee_ray.parallel.collectives import (
    PendingRows,
    Ranks,
    all_sum,
    announce,
    gather_rows,
    route,
    scatter_rows,
)
from renee_ray.parallel.recorder import Recorder
from renee_ray.training.gradient_cache import GradientCache
from renee_ray.xfc.kernels.device import upload
from renee_ray.xfc.shard import Pairs, Shard
from renee_ray.xfc.undo import undo_step
from renee_ray.xfc.weights.storages import SGD


@dataclass(frozen=True)
class StepResult:
    """What one step did.

    loss: this rank's labels' part of the batch's summed BCE, float64 scalar.
    rows: points of the global batch.
    skipped: the embeddings or the encoder's gradient were not finite; nothing is changed.
    wishes: what any rank wished for, or-ed: the same on all of them.
    """

    loss: Tensor
    rows: int
    skipped: bool = False
    wishes: int = 0


@dataclass
class Step:
    """The parts that a step works on.

    encoder: [b, T] tokens -> [b, D] float32, wrapped in DDP when there are several ranks.
    dropout: probability on the embedding; seed: of its masks.
    clip_norm: largest norm of the encoder's gradient; 0: none.
    loss_scale: of the encoder's gradient; is updated by each step.
    micro_batch: rows of this rank that the encoder works on at once; 0: all.
    tokens: reduces the gradient of the token vectors where DDP does not, or None.
    recorder: is told which phase of the step begins.
    """

    encoder: nn.Module
    shard: Shard
    optimizer: torch.optim.Optimizer
    ranks: Ranks
    device: torch.device
    dropout: float = 0.0
    seed: int = 0
    clip_norm: float = 0.0
    loss_scale: LossScale = field(default_factory=LossScale)
    micro_batch: int = 0
    tokens: TokenGradient | None = None
    recorder: Recorder = field(default_factory=Recorder)

    def __call__(
        self, batch: Batch, step: int, sgd: SGD, *, with_loss: bool = False, wish: int = 0
    ) -> StepResult:
        """Trains on this rank's rows `batch` (possibly none) of the global batch number `step`.

        wish: bits that all ranks are told, beside the row counts.
        """
        enter = self.recorder.enter
        enter("route")
        counts, wishes = announce(self.ranks, len(batch), wish)
        first = sum(counts[: self.ranks.rank])
        total = sum(counts)
        owned = self.shard.owned
        rows, labels = route(self.ranks, *batch.pairs(first), owned.num_labels)
        enter("classifier")
        positives = Pairs(rows, labels, owned, self.device)

        with training_attention(self.device):
            enter("encoder_forward")
            own = GradientCache(self.encoder, batch, self.micro_batch, self.device)
            kept = dropout_mask(own.embeddings, self.dropout, self.seed, step, total, first)
            kept_embeddings = own.embeddings * kept
            enter("gather")
            everyone = gather_rows(self.ranks, kept_embeddings, counts)
            # As the classifier multiplies them: beyond 65,504 fp16 has no numbers.
            dtype = self.shard.weights.compute_dtype
            if not bool(torch.isfinite(everyone.to(dtype)).all()):
                enter("encoder_backward")
                own.backward(torch.zeros_like(own.embeddings))
                self.optimizer.zero_grad(set_to_none=True)
                zero = torch.zeros((), dtype=torch.float64, device=self.device)
                return StepResult(zero, total, skipped=True, wishes=wishes)

            pending: list[PendingRows] = []
            enter("classifier")
            loss = self.shard.step(
                everyone,
                positives,
                sgd,
                with_loss=with_loss,
                on_gradient=lambda dE: pending.append(scatter_rows(self.ranks, dE, counts)),
            )
            enter("scatter")
            gradient = pending[0].wait()
            enter("encoder_backward")
            own.backward(gradient * (kept * self.loss_scale.value))
            enter("reduce")
            if self.tokens is not None:
                self.tokens.reduce()
        enter("optimizer")
        finite = self._clip()
        self.loss_scale.update(finite)
        if finite:
            self.optimizer.step()
        else:
            enter("classifier")
            undo_step(self.shard, everyone, positives, sgd)
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(loss, total, skipped=not finite, wishes=wishes)

    def _clip(self) -> bool:
        """Unscales the gradient and limits its norm; whether it is finite on every rank."""
        parameters = [p for p in self.encoder.parameters() if p.grad is not None]
        if self.loss_scale.value != 1:
            for parameter in parameters:
                assert parameter.grad is not None
                parameter.grad /= self.loss_scale.value
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        # DDP has given all ranks the same gradient, unless a rank's own memory is at fault.
        broken = (~torch.isfinite(norm)).int().cpu()
        self.recorder.enter("reduce")
        broken = all_sum(self.ranks, broken)
        self.recorder.enter("optimizer")
        if bool(broken):
            return False
        if self.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.clip_norm, norm)
        return True


def dropout_mask(own: Tensor, p: float, seed: int, step: int, total: int, first: int) -> Tensor:
    """Factors 0 or 1/(1-p) for rows [first, first + b_r) of a global batch of `total` rows.

    They depend on (seed, step, place in the global batch), so not on who holds a row.
    """
    if p == 0:
        return own.new_ones(())
    drawn = np.random.default_rng([seed, step]).random((total, own.shape[1]), dtype=np.float32)
    kept = torch.from_numpy(drawn[first : first + len(own)] >= p)
    return upload(kept.float() / (1 - p), own.device)
