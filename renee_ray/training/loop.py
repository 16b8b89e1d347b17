"""One worker's life: steps over any iterator of batches, validation, checkpoints, progress.

The module runs under plain torch.distributed. What surrounds it (Ray Train, or a test) passes in
the batches and two callbacks.
"""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from renee_ray.checkpoint.state import State
from renee_ray.config.schema import RunConfig
from renee_ray.errors import ReneeError
from renee_ray.model.bag import BagOptimizer
from renee_ray.model.encoder import adamw, data_parallel, works_in_groups
from renee_ray.model.loss_scale import LossScale
from renee_ray.model.model import Model
from renee_ray.model.token_gradient import TokenGradient
from renee_ray.rank.batch import Batch, Position
from renee_ray.rank.collectives import Ranks, all_sum
from renee_ray.rank.recorder import Recorder, gpu_memory
from renee_ray.rank.threads import one_ahead
from renee_ray.scoring.metrics import MetricSums
from renee_ray.scoring.neighbours import Neighbours
from renee_ray.scoring.scorer import Propensities, Scorer, evaluate
from renee_ray.training.averages import Averages
from renee_ray.training.schedule import Schedule, warmup_cosine
from renee_ray.training.step import Step, StepResult
from renee_ray.xfc.weights.storages import SGD

log = logging.getLogger(__name__)


CHECKPOINT, STOP = 1, 2
"""Bits of a wish: a checkpoint after the step at hand; that the run ends with it."""
MOST_SKIPPED = 100
"""Steps in a row whose skipping ends a run. A loss scale that has to fit first takes 24 at most."""


@dataclass(frozen=True)
class Validation:
    """The validation split, and what its scores are computed with.

    batches(): this rank's rows of it, once.
    offset(tail): added to the scores of own labels, float32 [n], or None.
    """

    batches: Callable[[], Iterable[Batch]]
    propensities: Propensities
    offset: Callable[[float], Tensor | None]


@dataclass
class Trainer:
    """A rank's model with its optimizers, at some state of a run.

    validation: None if there is no such split.
    on_progress(record): called at every sampled loss, on every rank.
    on_checkpoint(metrics): called after each evaluation, every `checkpoint_every` steps and when a
        rank wishes for it; must save `state`, on every rank alike.
    recorder: of the time and work of this rank.
    wish(): asked before every step what this rank wishes for.
    stopped: whether a rank wished for the end before it was reached.
    """

    config: RunConfig
    model: Model
    ranks: Ranks
    device: torch.device
    schedule: Schedule
    validation: Validation | None
    on_progress: Callable[[dict[str, Any]], None]
    on_checkpoint: Callable[[dict[str, float]], None]
    state: State = field(default_factory=State)
    recorder: Recorder = field(default_factory=Recorder)
    wish: Callable[[], int] = lambda: 0
    stopped: bool = False
    _last: StepResult | None = None

    def __post_init__(self) -> None:
        config = self.config
        self.optimizer = adamw(self.model.encoder, config.encoder)
        self.averages = Averages(self.model, config.average, config.seed)
        if self.model.encoder.autocast == torch.float16 and not self.state.loss_scale.dynamic:
            self.state.loss_scale = LossScale.start()
        # A resumed run goes on counting if all of its steps were skipped.
        done = self.state.step
        self._in_a_row = done if self.state.skipped == done else 0

    def run(self, batches: Iterator[Batch]) -> None:
        """Trains on the remaining batches, which begin at `state.position`, until the end or STOP.

        Raises:
            ReneeError: on all ranks; the steps were skipped, all of the run or many in a row.
        """
        _ = self._step  # a collective: before any rank waits for a batch
        self.model.encoder.train()  # a model that is loaded is not in training
        state, evaluations = self.state, self.schedule.evaluation_steps()
        every = self.schedule.checkpoint_every
        if state.step == 0 and state.evaluation is None:
            self.on_checkpoint(self._evaluate())
        rows = 0  # of global batches since the last sample of the loss
        ready: Iterator[Batch] = map(self.prepared, batches)
        if self.device.type == "cuda":
            ready = one_ahead(ready, self.schedule.total - state.step)
        while state.step < self.schedule.total and not self.stopped:
            self.recorder.enter("data", state.step + 1)
            batch = next(ready)
            result, sampled = self.train_on(batch)
            rows += result.rows
            self.averages.add(state.step, self.schedule.total)
            evaluates = state.step in evaluations
            saves = evaluates or result.wishes or (every and state.step % every == 0)
            if sampled or saves:
                self.settle()
            if sampled and result.classifier_updated:  # another step has no loss
                self._sample(result, rows)
                rows = 0
            if saves:
                self.on_checkpoint(self._evaluate() if evaluates else {})
            self.stopped = bool(result.wishes & STOP) and state.step < self.schedule.total

    def prepared(self, batch: Batch) -> Batch:
        """Turns a batch as it is read into one as the model trains on it."""
        feed = self.config.feed
        return batch.for_training(
            self.config.seed,
            token_dropout=feed.token_dropout,
            filter_labels_positive=feed.filter_labels == "positive",
            with_keys=self.config.encoder.bag.dropout > 0,
            targets_weight=feed.targets_weight if feed.targets else None,
        )

    def train_on(self, batch: Batch) -> tuple[StepResult, bool]:
        """Makes the step at `state.step` on a prepared batch.

        Returns:
            what it did; whether its loss was computed.
        """
        config, state = self.config, self.state
        factor = self._rate(state.step)
        for group in self.optimizer.param_groups:
            group["lr"] = config.encoder.learning_rate * factor
        if self._step.bag is not None:
            self._step.bag.rate = config.encoder.bag.learning_rate * factor
        settings = config.classifier
        lr, decay = settings.learning_rate * factor, settings.weight_decay
        sgd = SGD(lr, settings.momentum, decay, seed=config.seed, step=state.step)
        # Dropout inside the encoder then differs between ranks and steps, and needs no saved state.
        torch.manual_seed(_mixed(config.seed, state.step, self.ranks.rank))
        sampled = bool(config.loss_every) and state.step % config.loss_every == 0
        result = self._step(batch, state.step, sgd, with_loss=sampled, wish=self.wish())
        trained = result.rows * len(self.model.shard.owned) if result.classifier_updated else 0
        grouped = works_in_groups(config.encoder, self.device)
        tokens, cells = batch.padding(config.encoder.micro_batch, grouped=grouped)
        self.recorder.count(
            steps=1, rows=len(batch), label_rows=trained, tokens=tokens, cells=cells
        )
        self._follow()
        self._last, done = result, batch.position
        state.step += 1
        last = done.batch + 1 == self.schedule.batches[done.epoch]
        state.position = (
            Position(done.epoch + 1, 0) if last else Position(done.epoch, done.batch + 1)
        )
        return result, sampled

    def _rate(self, step: int) -> float:
        """Returns the factor of the peak learning rates."""
        return warmup_cosine(step, self.schedule.total, self.config.warmup, self.config.average)

    @cached_property
    def _step(self) -> Step:
        """The step, which begins by wrapping the encoder in DDP: a collective, on all ranks."""
        settings, encoder = self.config.encoder, self.model.encoder
        tokens = bag = None
        mean = settings.gradient == "mean"
        # What is compiled has dense gradients only, and to one GPU they cost less than sparse ones.
        dense = settings.compile or (self.device.type != "cpu" and self.ranks.num_ranks == 1)
        if settings.trains_transformer and not dense:
            tokens = TokenGradient(encoder, self.ranks, mean=mean)
        if encoder.bag is not None:
            bag = BagOptimizer(encoder.bag, self.ranks, mean=mean)
        on_last = partial(self.recorder.enter, "reduce")
        wrapped = data_parallel(encoder, self.ranks, settings.gradient, tokens, on_last, bag)
        return Step(
            self.config, wrapped, self.model.shard, self.optimizer, self.ranks, self.device,
            self.state.loss_scale, tokens, self.recorder, bag,
        )  # fmt: skip

    def settle(self) -> None:
        """Makes `state` that of all steps; before, it may lack whether the last was skipped."""
        self.recorder.enter("reduce")  # where others may keep it waiting
        self._step.settle()
        self._follow()

    def _follow(self) -> None:
        """Counts the step before, once it is known whether it was skipped.

        Raises:
            ReneeError: it was the last of too many in a row.
        """
        result, before, step = self._last, self._in_a_row, self.state.step
        if result is None:
            return
        self._last = None
        self.state.skipped += result.skipped
        self.recorder.count(skipped=int(result.skipped))
        self._in_a_row = before + 1 if result.skipped else 0
        speaks = self.ranks.rank == 0
        if speaks and result.skipped and not before:
            what = (
                "the encoder's gradient is not finite, and only the classifier is updated"
                if result.classifier_updated
                else "an embedding is not finite, and nothing is updated"
            )
            log.warning("step %d: skipped by all workers: %s", step, what)
        if speaks and not result.skipped and before > 1:
            log.warning("steps %d to %d were skipped", step - before, step - 1)
        if self._in_a_row >= min(MOST_SKIPPED, self.schedule.total):
            raise ReneeError(
                f"all of the last {self._in_a_row} steps, up to step {step}, were skipped: "
                f"the embeddings or the encoder's gradient are not finite; lower "
                f"encoder.learning_rate and classifier.learning_rate or set encoder.autocast=off "
                f"and classifier.precision=fp32, and give another output"
            )

    def _sample(self, result: StepResult, rows: int) -> None:
        """Exchanges the loss with all ranks, and tells how the run is doing."""
        self.recorder.enter("loss")
        since = self.recorder.sample(self.ranks)
        pace = max(self.recorder.paces[self.ranks.rank].step, 1e-9)
        loss = float(all_sum(self.ranks, result.loss.clone())) / max(1, result.rows)
        step, total = self.state.step, self.schedule.total
        factor = self._rate(step - 1)
        record = {
            "step": step,
            "total_steps": total,
            "epoch": self.schedule.epochs_done(step),
            "loss": loss,
            "rows_per_second": rows / (pace * since["steps"]),
            "padding": 1 - since["tokens"] / since["cells"] if since["cells"] else 0.0,
            "encoder_lr": self.config.encoder.learning_rate * factor,
            "classifier_lr": self.config.classifier.learning_rate * factor,
            "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            **gpu_memory(self.device),
            "thread_s": time.thread_time(),
            "skipped": self.state.skipped,
            "loss_scale": self.state.loss_scale.value,
            "seconds_left": (total - step) * pace,
            "time_s": time.time(),
        }
        self.on_progress(record)

    def _evaluate(self) -> dict[str, float]:
        """Scores the validation split; empty if there is none."""
        if self.validation is None:
            return {}
        sums = self.scored(self.config.evaluation.tail)
        metrics = sums.metrics()
        others = {"points": sums.points, "by_frequency": sums.by_frequency()}
        self.state.evaluated(self.schedule.epochs_done(self.state.step), metrics, others)
        return metrics

    def scored(self, tail: float, neighbours: Neighbours | None = None) -> MetricSums:
        """Returns the sums of metrics of the validation split, which there must be, for a tail."""
        encoder, shard, given = self.model.encoder, self.model.shard, self.validation
        assert given is not None
        scorer = Scorer(encoder, shard, self.ranks, self.device, given.offset(tail), neighbours)
        batches = self.recorder.each(given.batches(), "evaluation_data", "evaluation")
        return evaluate(scorer, batches, given.propensities)


def _mixed(*numbers: int) -> int:
    """Returns one seed made of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
