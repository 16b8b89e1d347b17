"""A training worker: its model, new or as the last checkpoint left it, and what surrounds it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from renee_ray.checkpoint.resume import resume
from renee_ray.checkpoint.state import Checkpoint, State, set_moments
from renee_ray.checkpoint.writer import CheckpointWriter, Written
from renee_ray.config.schema import RunConfig
from renee_ray.data.dataset import Dataset
from renee_ray.data.order import Order
from renee_ray.data.storage import awaited
from renee_ray.data.targets import Targets
from renee_ray.errors import ReneeError
from renee_ray.model.initialise import initialise_classifier, weigh_ngrams
from renee_ray.model.model import Model, build_model
from renee_ray.rank.batch import Batch
from renee_ray.rank.collectives import Ranks
from renee_ray.rank.rounds import Rounds
from renee_ray.scoring.metrics import best_tail
from renee_ray.scoring.scorer import Propensities, prior_offset, read_counts, without_labels
from renee_ray.service.cluster.driver_channel import DriverChannel
from renee_ray.service.cluster.feed import embed_voters, feed, scoring_feed, training_orders
from renee_ray.service.cluster.launch import quiet, worker_device
from renee_ray.service.cluster.preemption import requests
from renee_ray.service.observe.observe import Observer
from renee_ray.service.observe.profile import profiled
from renee_ray.service.run.directory import RUN_FILE, RunDirectory
from renee_ray.service.run.history import History
from renee_ray.training.loop import Trainer, Validation
from renee_ray.training.schedule import Schedule

LAST_ATTEMPTS, LAST_PAUSE_S = 5, 20.0
"""Attempts to write the last checkpoint, and the pause between two: a disk may be full."""


def train_worker(arguments: dict[str, Any]) -> dict[str, Any]:
    """Trains as one Ray Train worker, on a fresh start and after every failure."""
    output = arguments["config"]["output"]
    if awaited(lambda: RunDirectory(output).read(RUN_FILE)) is None:
        raise ReneeError(
            f"{output} has no {RUN_FILE} here, which the driver wrote there; give an output that "
            f"all nodes share"
        )
    with prepared(arguments) as (trainer, batches, observer, writer):
        if trainer.ranks.rank == 0:
            requests.follow(arguments["channel"])
        with profiled(trainer.config, trainer.ranks.rank) as stepped:

            def wish() -> int:
                stepped()
                return requests.take(trainer.state.step)

            trainer.wish = wish
            trainer.run(batches)
        _finish(trainer, writer)
        observer.stopped = trainer.stopped
        if trainer.config.evaluation.tails and not trainer.stopped:
            _choose_tail(trainer, arguments["channel"])
    return outcome(trainer.state, trainer.config) | {"stopped": trainer.stopped}


def outcome(state: State, config: RunConfig) -> dict[str, Any]:
    """Returns what `train` returns, from the state of the last checkpoint."""
    return {
        "step": state.step,
        "skipped": state.skipped,
        "best": state.best.get(config.evaluation.metric),
        "validation": state.evaluation["metrics"] if state.evaluation else {},
    }


@contextlib.contextmanager
def prepared(
    arguments: dict[str, Any],
) -> Iterator[tuple[Trainer, Iterator[Batch], Observer, CheckpointWriter]]:
    """Yields what a worker trains with, which is observed until the end of the context.

    That is a trainer, the batches that remain for it, its observer and its checkpoint writer.
    """
    quiet()
    share = _Share.of(arguments)
    config, ranks, directory = share.config, share.ranks, RunDirectory(share.config.output)
    start: Checkpoint | None = None  # of another run, which is gone, perhaps, after a restart

    def build(found: Checkpoint | None) -> Model:
        nonlocal start
        if found is None and arguments["start"]:
            start = RunDirectory(config.start).checkpoints().at(arguments["start"])
        return share.model(found or start)

    model, checkpoint, moments = resume(directory.checkpoints(), ranks, build)
    if start and not checkpoint:
        start.load_encoder(model.encoder)
        start.load_shard(model.shard, without=("average",))
        moments = start.moments()
    state = checkpoint.state if checkpoint else State(facts=share.facts(model, start))
    history = History.read(directory, state) if ranks.rank == 0 else None
    launched_s = arguments["launched_s"]
    with Observer(
        config, ranks, share.device, share.channel, state, launched_s, history
    ) as observer:
        writer = share.writer(model, observer)
        trainer = share.trainer(model, state, writer, observer)
        writer.averages = trainer.averages.tensors
        if checkpoint:
            trainer.averages.take(moments)
        points, told = partial(share.scoring, "train"), (observer.recorder, share.channel.say)
        num_points = share.dataset.manifest.num_points("train")
        if model.encoder.remembered is not None:
            rounds = Rounds(ranks, "embeddings", num_points, *told)
            model.encoder.remembered.embed_all(points(), share.device, rounds)
        if checkpoint or start:
            set_moments(model.encoder, trainer.optimizer, moments)
            if not checkpoint:  # the other run's points may lack n-grams of these
                weigh_ngrams(model, config, share.dataset, points, ranks, *told)
            moments.clear()  # the optimizer keeps those in use
        else:
            initialise_classifier(model, config, share.dataset, points, ranks, *told)
        writer.reserve(model.encoder, model.shard)  # in place of the centroids of first weights
        batches = feed(
            share.dataset, share.orders, ranks.rank, ranks.num_ranks, start=state.position,
            max_length=config.encoder.max_length, pad_multiple=8 if config.encoder.compile else 1,
            prefetch=config.feed.prefetch,
            targets=Targets.of(config.feed.targets, share.dataset), wait_s=ranks.wait_s,
        )  # fmt: skip
        yield trainer, batches, observer, writer


@dataclass(frozen=True)
class _Share:
    """A worker's share of a run: its rank and device, and the pieces that training needs."""

    config: RunConfig
    dataset: Dataset
    ranks: Ranks
    device: torch.device
    channel: DriverChannel
    orders: list[Order]

    @classmethod
    def of(cls, arguments: dict[str, Any]) -> _Share:
        config = RunConfig.model_validate(arguments["config"])
        dataset = _same_dataset(config.data, arguments["manifest_hash"])
        ranks = Ranks.of_process_group(config.timeout_s)
        channel: DriverChannel = arguments["channel"]
        channel.forward_warnings()
        orders = training_orders(config, dataset)
        return cls(config, dataset, ranks, worker_device(), channel, orders)

    def model(self, checkpoint: Checkpoint | None) -> Model:
        """Builds a model, with the precision of a checkpoint that it will be loaded from."""
        precision = checkpoint.state.facts.get("precision") if checkpoint else None
        return build_model(
            self.config, self.dataset.manifest.num_labels, self.ranks, self.device,
            precision=precision,
        )  # fmt: skip

    def facts(self, model: Model, start: Checkpoint | None) -> dict[str, Any]:
        """Returns what every checkpoint of a new run says of the model."""
        retired = start.state.retired.tolist() if start else []
        return {
            **({"retired": retired} if retired else {}),
            "num_labels": self.dataset.manifest.num_labels,
            "dim": model.encoder.dim,
            "precision": model.shard.weights.precision,
            "tokenizer": self.dataset.manifest.tokenizer,
        }

    def scoring(self, split: str) -> Iterator[Batch]:
        rows, length = self.config.evaluation.batch_size, self.config.encoder.max_length
        return scoring_feed(self.dataset, split, rows, length, self.ranks)

    def writer(self, model: Model, observer: Observer) -> CheckpointWriter:
        def on_written(written: Written) -> None:
            if written.committed:
                observer.checkpointed(written.step, written.seconds, written.bytes)
            requests.written(written)

        settings, metric = self.config.checkpoint, self.config.evaluation.metric
        return CheckpointWriter(
            RunDirectory(self.config.output).checkpoints(), self.ranks, settings.keep, metric,
            settings.background, on_written, observer.flush_history,
        ).start()  # fmt: skip

    def trainer(
        self, model: Model, state: State, writer: CheckpointWriter, observer: Observer
    ) -> Trainer:
        owned, settings = model.shard.owned, self.config.evaluation
        batches = tuple(order.num_batches for order in self.orders)
        schedule = Schedule(batches, settings.every, self.config.checkpoint.every_steps)
        validation = None
        if self.dataset.manifest.num_points("validation"):
            hidden = np.zeros(owned.num_labels, dtype=bool)
            hidden[state.retired] = True
            counts, own = read_counts(self.dataset, owned), hidden[owned.start : owned.stop]
            validation = Validation(
                lambda: without_labels(self.scoring("validation"), hidden),
                Propensities.read(self.dataset, owned, self.ranks),
                partial(prior_offset, counts, device=self.device, hidden=own),
            )

        def on_checkpoint(metrics: dict[str, float]) -> None:
            observer.recorder.enter("checkpoint")
            if metrics:
                observer.evaluated(state.step, metrics)
            observer.write_history()  # which the checkpoint's commit waits for
            writer.save(state, model.encoder, trainer.optimizer, model.shard, metrics)

        trainer = Trainer(
            self.config, model, self.ranks, self.device, schedule, validation,
            observer.record, on_checkpoint, state, observer.recorder,
        )  # fmt: skip
        return trainer


def _finish(trainer: Trainer, writer: CheckpointWriter) -> None:
    """Waits for the last checkpoint, which the run must have; all ranks alike.

    Raises:
        ReneeError: it could not be written.
    """
    state, model = trainer.state, trainer.model
    last = state.evaluation
    metrics = last["metrics"] if last and last["step"] == state.step else {}
    for _ in range(LAST_ATTEMPTS):
        if writer.wait():
            return
        time.sleep(LAST_PAUSE_S)
        writer.save(state, model.encoder, trainer.optimizer, model.shard, metrics)
    if not writer.wait():
        raise ReneeError(
            f"the last checkpoint of {trainer.config.output}, of step {state.step}, cannot be "
            f"written; see the warnings, then give the same command again"
        )


def _choose_tail(trainer: Trainer, channel: DriverChannel) -> None:
    """Chooses among `tails` and `tail` by the best checkpoint, and writes it to run.json."""
    config, model, ranks = trainer.config, trainer.model, trainer.ranks
    directory, voters = RunDirectory(config.output), None
    best = directory.checkpoint("best")
    best.load_encoder(model.encoder)
    best.load_shard(model.shard, without=("momentum", "average"))
    if config.evaluation.neighbours:
        voters = embed_voters(
            config, Dataset.without_check(config.data), model.encoder, ranks, trainer.device,
            lambda batches: trainer.recorder.each(batches, "evaluation_data", "evaluation"),
        )  # fmt: skip
    own = config.evaluation.tail
    tails = sorted({*config.evaluation.tails, own})
    table = [{"tail": tail, **trainer.scored(tail, voters).metrics()} for tail in tails]
    chosen = best_tail(table, own)
    exported = next(row for row in table if row["tail"] == chosen)
    if voters is not None:  # which an export has not
        exported = trainer.scored(chosen).metrics()
    if ranks.rank == 0:
        saved = directory.read(RUN_FILE) or {}
        saved["config"]["evaluation"]["tail"] = chosen
        facts = {"checkpoint": best.name, "table": table, "without_votes": exported}
        directory.write(RUN_FILE, saved | {"tails": facts})
        channel.say(f"evaluation.tail={chosen}, the best for the validation points")


def _same_dataset(path: str, manifest_hash: str) -> Dataset:
    """Opens the dataset that the driver found; the manifest, which may be large, is read anew."""
    dataset = Dataset.without_check(path)
    if dataset.manifest.hash != manifest_hash:
        raise ReneeError(
            f"{path} was converted anew while it was trained on; train to another output"
        )
    return dataset
