"""One worker's life: steps over any iterator of batches, validation, checkpoints, progress.

Runs under plain torch.distributed; what surrounds it (Ray Train, or a test) passes in the
batches and two callbacks.
"""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from renee_ray.checkpoint.state import State
from renee_ray.config.schema import RunConfig
from renee_ray.errors import ReneeError
from renee_ray.model.encoder import adamw, data_parallel
from renee_ray.model.loss_scale import LossScale
from renee_ray.model.model import Model
from renee_ray.model.token_gradient import TokenGradient
from renee_ray.parallel.ahead import one_ahead
from renee_ray.parallel.batch import Batch, Position
from renee_ray.parallel.collectives import Ranks, all_sum
from renee_ray.parallel.recorder import Recorder
from renee_ray.scoring.scorer import Propensities, Scorer, evaluate
from renee_ray.training.schedule import warmup_cosine
from renee_ray.training.step import Step, StepResult
from renee_ray.xfc.weights.storages import SGD

log = logging.getLogger(__name__)


CHECKPOINT, STOP = 1, 2
"""What a rank may wish for: a checkpoint after the step at hand; to end the run with it."""
MOST_SKIPPED = 100
"""Steps in a row whose skipping ends a run. A loss scale that has to fit first takes 24 at most."""


@dataclass(frozen=True)
class Plan:
    """What is to be done, known before the first step.

    batches: number of batches of each epoch.
    """

    batches: tuple[int, ...]
    evaluate_every: float
    checkpoint_every: int

    @property
    def total(self) -> int:
        return sum(self.batches)

    def evaluation_steps(self) -> set[int]:
        """Numbers of done steps after which the validation split is scored; the end among them."""
        if not self.evaluate_every:
            return {self.total}
        count = int(len(self.batches) / self.evaluate_every)
        marks = {self._steps_at((i + 1) * self.evaluate_every) for i in range(count)}
        return marks | {self.total}

    def epochs_done(self, step: int) -> float:
        """Epochs, with their fraction, after `step` steps."""
        for epoch, batches in enumerate(self.batches):
            if step < batches:
                return epoch + step / batches
            step -= batches
        return float(len(self.batches))

    def _steps_at(self, epochs: float) -> int:
        whole = int(epochs)
        if whole >= len(self.batches):  # a multiple of the share may round to just above the end
            return self.total
        part = epochs - whole
        steps = sum(self.batches[:whole])
        return steps + (round(part * self.batches[whole]) if part else 0)


@dataclass
class Meter:
    """Sums since the last sample of the loss."""

    rows: int = 0
    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0
    cells: int = 0

    def rate(self) -> float:
        return self.rows / self.seconds if self.seconds else 0.0


@dataclass
class Trainer:
    """A rank's model with its optimizers, at some state of a run.

    on_progress(record): at every sampled loss, on every rank.
    on_checkpoint(metrics): after each evaluation, every `checkpoint_every` steps and when a
        rank wishes for it; must save `state`, on every rank alike.
    wish(): before every step, what this rank wishes for.
    offset: added to the scores of own labels when validating, float32 [n], or None.
    validation(): the batches of the validation split; empty: there is no such split.
    recorder: of the time and work of this rank.
    """

    config: RunConfig
    model: Model
    ranks: Ranks
    device: torch.device
    plan: Plan
    validation: Callable[[], Iterable[Batch]]
    propensities: Propensities | None
    offset: Tensor | None
    on_progress: Callable[[dict[str, Any]], None]
    on_checkpoint: Callable[[dict[str, float]], None]
    state: State = field(default_factory=State)
    recorder: Recorder = field(default_factory=Recorder)
    wish: Callable[[], int] = lambda: 0
    stopped: bool = False

    def __post_init__(self) -> None:
        settings = self.config.encoder
        if self.model.encoder.autocast == torch.float16 and not self.state.loss_scale.dynamic:
            self.state.loss_scale = LossScale.start()
        self._skipped_in_a_row = self.state.step if self.state.skipped == self.state.step else 0
        self.optimizer = adamw(self.model.encoder, settings)
        # What is compiled has dense gradients only.
        tokens = (
            None
            if settings.compile
            else TokenGradient(self.model.encoder, self.ranks, mean=settings.gradient == "mean")
        )
        self._step = Step(
            data_parallel(
                self.model.encoder,
                self.ranks,
                settings.gradient,
                tokens,
                lambda: self.recorder.enter("reduce"),
            ),
            self.model.shard,
            self.optimizer,
            self.ranks,
            self.device,
            settings.dropout,
            self.config.seed,
            settings.clip_norm,
            self.state.loss_scale,
            settings.micro_batch,
            tokens,
            self.recorder,
        )

    def run(self, batches: Iterator[Batch]) -> None:
        """Trains on the remaining batches, which begin at `state.position`.

        `stopped`, afterwards: a rank wished for the end before it was reached.

        Raises:
            ReneeError: on all ranks; the steps were skipped, all of the run or many in a row.
        """
        evaluations = self.plan.evaluation_steps()
        every = self.plan.checkpoint_every
        if self.state.step == 0 and self.state.evaluation is None:
            self.on_checkpoint(self._evaluate())
        meter, started = Meter(), time.perf_counter()
        ready: Iterator[Batch] = map(self.prepared, batches)
        if self.device.type == "cuda":
            ready = one_ahead(ready, self.plan.total - self.state.step)
        while self.state.step < self.plan.total and not self.stopped:
            self.recorder.enter("data", self.state.step + 1)
            batch = next(ready)
            result, sampled = self.train_on(batch)
            meter.rows, meter.steps = meter.rows + result.rows, meter.steps + 1
            tokens, cells = batch.padding(self.config.encoder.micro_batch)
            meter.tokens, meter.cells = meter.tokens + tokens, meter.cells + cells
            self._record(batch, result, tokens, cells)
            if sampled:
                meter.seconds = time.perf_counter() - started
                self._sample(result, meter)
                meter, started = Meter(), time.perf_counter()
            if self.state.step in evaluations:
                pause = time.perf_counter()
                self.on_checkpoint(self._evaluate())
                started += time.perf_counter() - pause
            elif result.wishes or (every and self.state.step % every == 0):
                pause = time.perf_counter()
                self.on_checkpoint({})
                started += time.perf_counter() - pause
            self.stopped = bool(result.wishes & STOP)

    def prepared(self, batch: Batch) -> Batch:
        """A batch as it is read -> as the model trains on it."""
        feed = self.config.feed
        return batch.for_training(
            self.config.seed,
            token_dropout=feed.token_dropout,
            filter_labels_positive=feed.filter_labels == "positive",
        )

    def train_on(self, batch: Batch) -> tuple[StepResult, bool]:
        """The step at `state.step`, on a prepared batch; and whether its loss was computed."""
        config, state = self.config, self.state
        factor = warmup_cosine(state.step, self.plan.total, config.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = config.encoder.learning_rate * factor
        settings = config.classifier
        lr, decay = settings.learning_rate * factor, settings.weight_decay
        sgd = SGD(lr, settings.momentum, decay, seed=config.seed, step=state.step)
        # Dropout inside the encoder then differs between ranks and steps, and needs no saved state.
        torch.manual_seed(_mixed(config.seed, state.step, self.ranks.rank))
        sampled = bool(config.loss_every) and state.step % config.loss_every == 0
        result = self._step(batch, state.step, sgd, with_loss=sampled, wish=self.wish())
        self._count(batch.position, result)
        return result, sampled

    def _count(self, done: Position, result: StepResult) -> None:
        state = self.state
        state.step += 1
        state.skipped += result.skipped
        self._follow_skipped(result.skipped)
        last = done.batch + 1 == self.plan.batches[done.epoch]
        state.position = (
            Position(done.epoch + 1, 0) if last else Position(done.epoch, done.batch + 1)
        )

    def _follow_skipped(self, skipped: bool) -> None:
        step, before = self.state.step, self._skipped_in_a_row
        self._skipped_in_a_row = before + 1 if skipped else 0
        if self.ranks.rank == 0 and skipped and not before:
            log.warning("step %d: a value was not finite; skipped by all workers", step)
        if self.ranks.rank == 0 and not skipped and before > 1:
            log.warning("steps %d to %d were skipped", step - before, step - 1)
        if self._skipped_in_a_row >= min(MOST_SKIPPED, self.plan.total):
            raise ReneeError(
                f"all of the last {self._skipped_in_a_row} steps, up to step {step}, were skipped: "
                f"the embeddings or the encoder's gradient are not finite; lower "
                f"encoder.learning_rate and classifier.learning_rate or set encoder.autocast=off "
                f"and classifier.precision=fp32, and give another output"
            )

    def _record(self, batch: Batch, result: StepResult, tokens: int, cells: int) -> None:
        self.recorder.count(
            steps=1,
            skipped=int(result.skipped),
            rows=len(batch),
            label_rows=0 if result.skipped else result.rows * len(self.model.shard.owned),
            tokens=tokens,
            cells=cells,
        )

    def _sample(self, result: StepResult, meter: Meter) -> None:
        self.recorder.enter("loss")
        self.recorder.sample(self.ranks)
        loss = float(all_sum(self.ranks, result.loss.clone())) / max(1, result.rows)
        factor = warmup_cosine(self.state.step - 1, self.plan.total, self.config.warmup)
        record = {
            "step": self.state.step,
            "total_steps": self.plan.total,
            "epoch": self.plan.epochs_done(self.state.step),
            "loss": loss,
            "rows_per_second": meter.rate(),
            "padding": 1 - meter.tokens / meter.cells if meter.cells else 0.0,
            "encoder_lr": self.config.encoder.learning_rate * factor,
            "classifier_lr": self.config.classifier.learning_rate * factor,
            "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            "skipped": self.state.skipped,
            "loss_scale": self.state.loss_scale.value,
            "seconds_left": (self.plan.total - self.state.step)
            * (meter.seconds / meter.steps if meter.steps else 0.0),
            "time_s": time.time(),
        }
        self.on_progress(record)

    def _evaluate(self) -> dict[str, float]:
        if self.propensities is None:
            return {}
        scorer = Scorer(self.model.encoder, self.model.shard, self.ranks, self.device, self.offset)
        batches = self.recorder.each(self.validation(), "evaluation_data", "evaluation")
        metrics = evaluate(scorer, batches, self.propensities)
        self.state.evaluated(self.plan.epochs_done(self.state.step), metrics)
        return metrics


def _mixed(*numbers: int) -> int:
    """One seed of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
