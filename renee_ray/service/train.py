"""Training as a Ray Train job: TorchTrainer around training/loop."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray.train
import torch

from renee_ray.config import ReneeError, RunConfig
from renee_ray.data.dataset import Dataset
from renee_ray.data.order import OTHER_TEXTS, Order, scoring_order, training_order
from renee_ray.data.storage import absolute
from renee_ray.data.tokenizer import load as load_tokenizer
from renee_ray.service.cluster import ensure_ray
from renee_ray.service.feed import feed
from renee_ray.service.job import decide_gpu, launch, quiet, worker_device
from renee_ray.service.observe import Observer, following, run_name
from renee_ray.service.progress import Channel, Display, evaluation_line
from renee_ray.service.run import HISTORY_FILE, RUN_FILE, RunDirectory, beats
from renee_ray.service.sinks import check_sinks
from renee_ray.service.watch import Watch
from renee_ray.training.batch import Batch, Position
from renee_ray.training.checkpoint import Checkpoint, State, save
from renee_ray.training.collectives import Ranks, all_sum
from renee_ray.training.initialise import initialise_classifier
from renee_ray.training.loop import Plan, Trainer
from renee_ray.training.model import Model, build_model
from renee_ray.training.scoring import Propensities, prior_offset, read_counts
from renee_ray.xfc.labels import split_range

MAY_CHANGE = {
    "data", "output", "num_workers", "use_gpu", "threads", "timeout_s", "checkpoint",
    "evaluation", "loss_every", "observe",
}  # fmt: skip
"""Keys that a resumed run may set anew; any other would change the trajectory it continues."""
BEFORE = {
    "feed.filter_labels": "negative", "feed.token_dropout": 0.0, "encoder.micro_batch": 0,
}  # fmt: skip
"""What runs did whose configuration does not have these keys yet."""


def train(
    config: RunConfig, on_progress: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Trains, or resumes what is at `config.output`.

    Returns:
        the metrics of the last evaluation, with "step", "skipped" and "best".

    Raises:
        ReneeError: the dataset, the run directory or the cluster do not fit the configuration.
    """
    dataset = Dataset.open(config.data)
    config = config.model_copy(update={"data": dataset.path, "output": absolute(config.output)})
    check(config, dataset)
    directory = RunDirectory(config.output)
    _check_resumable(config, directory, dataset)
    ensure_ray(config.num_workers + 1)
    use_gpu = decide_gpu(config.use_gpu, config.num_workers)
    directory.write(RUN_FILE, {"config": config.model_dump(), "dataset": _identity(dataset)})
    if not dataset.manifest.has_label_texts:
        on_progress(
            f"{dataset.path} has no label texts: feed.augment has no effect, and "
            f"classifier.init=label_text starts from the labels' training points alone"
        )
    on_progress(
        f"training on {dataset.manifest.num_points('train'):,} points and "
        f"{dataset.manifest.num_labels:,} labels with {config.num_workers} "
        f"{'GPU' if use_gpu else 'CPU'} workers"
    )
    watch, launched_s = Watch(config.timeout_s), time.time()
    with Display(watch=watch) as display, following(config, watch, launched_s):
        arguments = {
            "config": config.model_dump(),
            "manifest": dataset.manifest,
            "queue": display.queue,
            "launched_s": launched_s,
        }
        return launch(train_worker, arguments, config, use_gpu)


def orders(config: RunConfig, dataset: Dataset) -> list[Order]:
    """The order of every epoch of a run."""
    manifest = dataset.manifest
    # A point whose filter labels are positives teaches the texts of these labels already.
    others = config.feed.filter_labels == "positive"
    texts = manifest.other_texts if others else [part.rows for part in manifest.splits["labels"]]
    return [
        training_order(
            [part.rows for part in manifest.splits["train"]],
            list(texts) if manifest.has_label_texts else [],
            augment=config.feed.augment,
            texts=OTHER_TEXTS if others else "labels",
            seed=config.seed,
            epoch=epoch,
            batch_size=config.batch_size,
            streams=config.feed.streams,
            window=config.feed.window,
        )
        for epoch in range(config.epochs)
    ]


def scoring_feed(
    dataset: Dataset, split: str, batch_size: int, max_length: int, ranks: Ranks
) -> Iterator[Batch]:
    """This rank's rows of a split, once."""
    parts = [part.rows for part in dataset.manifest.splits[split]]
    order = scoring_order(split, parts, batch_size=batch_size, num_ranks=ranks.num_ranks)
    return feed(
        dataset, [order], ranks.rank, ranks.num_ranks, start=Position(), max_length=max_length
    )


def prepare(arguments: dict[str, Any]) -> tuple[Trainer, Iterator[Batch], Observer]:
    """A worker's trainer, new or as the last checkpoint left it; the batches that remain; who
    is told of both."""
    quiet()
    config = RunConfig.model_validate(arguments["config"])
    dataset = Dataset(config.data, arguments["manifest"])
    ranks, device = Ranks.of_process_group(), worker_device()
    epochs = orders(config, dataset)
    plan = Plan(
        tuple(order.num_batches for order in epochs),
        config.evaluation.every,
        config.checkpoint.every_steps,
    )
    committed = ray.train.get_checkpoint()
    checkpoint = Checkpoint(committed.filesystem, committed.path) if committed else None
    precision = checkpoint.state.facts.get("precision") if checkpoint else None
    state = checkpoint.state if checkpoint else State()
    channel = Channel(arguments["queue"], ranks.rank)
    channel.forward_warnings()
    observer = Observer(config, ranks, device, channel, state, arguments["launched_s"])
    model = build_model(
        config, dataset.manifest.num_labels, ranks, device, training=True, precision=precision
    )
    if not checkpoint:
        state.facts = _facts(dataset, model)
    length, pad_multiple = config.encoder.max_length, 8 if config.encoder.compile else 1
    trainer = Trainer(
        config,
        model,
        ranks,
        device,
        plan,
        lambda: scoring_feed(dataset, "validation", config.evaluation.batch_size, length, ranks),
        Propensities.read(dataset, model.shard.owned, ranks)
        if dataset.manifest.num_points("validation")
        else None,
        prior_offset(read_counts(dataset, model.shard.owned), config.evaluation.tail, device),
        observer.record,
        lambda metrics: _report(trainer, config, metrics, channel, observer),
        state,
        observer.recorder,
    )
    if checkpoint:
        checkpoint.load_encoder(model.encoder)
        checkpoint.load_optimizer(model.encoder, trainer.optimizer)
        checkpoint.load_shard(model.shard)
        if ranks.rank == 0:
            RunDirectory(config.output).settle_best(
                config.evaluation.metric, state.history["evals"], state.step
            )
    else:
        initialise_classifier(
            model,
            config,
            dataset,
            lambda: scoring_feed(dataset, "train", config.evaluation.batch_size, length, ranks),
            ranks,
            device,
        )
    batches = feed(
        dataset,
        epochs,
        ranks.rank,
        ranks.num_ranks,
        start=trainer.state.position,
        max_length=length,
        pad_multiple=pad_multiple,
        prefetch=config.feed.prefetch,
        run=run_name(config),
    )
    return trainer, batches, observer


def train_worker(arguments: dict[str, Any]) -> dict[str, Any]:
    """What each Ray Train worker runs, on a fresh start and after every failure."""
    trainer, batches, observer = prepare(arguments)
    with observer:
        trainer.run(batches)
    evals = trainer.state.history["evals"]
    return {
        "step": trainer.state.step,
        "skipped": trainer.state.skipped,
        "best": trainer.state.best,
        "validation": evals[-1]["metrics"] if evals else {},
    }


def _report(
    trainer: Trainer,
    config: RunConfig,
    metrics: dict[str, float],
    channel: Channel,
    observer: Observer,
) -> None:
    """Saves this rank's part of a checkpoint and hands it to Ray Train, which commits it."""
    state, ranks, began = trainer.state, trainer.ranks, time.perf_counter()
    observer.recorder.enter("checkpoint")
    if metrics:
        observer.evaluated(state.step, metrics)
    ranges = [
        split_range(trainer.model.shard.owned.num_labels, ranks.num_ranks, rank)
        for rank in range(ranks.num_ranks)
    ]
    run, metric = RunDirectory(config.output), config.evaluation.metric
    best = _is_best(run, metric, metrics, state.step, ranks)
    directory = tempfile.mkdtemp(prefix="renee-ray-checkpoint-")
    try:
        save(
            directory, state, trainer.model.encoder, trainer.optimizer, trainer.model.shard,
            ranges, ranks.rank,
        )  # fmt: skip
        written = sum(path.stat().st_size for path in Path(directory).iterdir())
        if best:
            run.copy_to_best(directory, state.step)
        # A barrier: after it every rank has copied its files.
        ray.train.report(
            {**metrics, "step": state.step, "skipped": state.skipped},
            ray.train.Checkpoint.from_directory(directory),
            checkpoint_dir_name=f"step-{state.step:09d}",
        )
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    observer.checkpointed(state.step, time.perf_counter() - began, written)
    if ranks.rank == 0:
        if best:
            run.publish_best(state.step, metrics)
        run.write(HISTORY_FILE, state.history)
        if metrics:
            channel.say(evaluation_line(state.step, metrics))


def _is_best(
    run: RunDirectory, metric: str, metrics: dict[str, float], step: int, ranks: Ranks
) -> bool:
    """Rank 0 decides for all: a remote file may look older to another."""
    if not metrics:
        return False
    decided = ranks.rank == 0 and beats(run.best(), step, metric, metrics)
    return bool(all_sum(ranks, torch.tensor(int(decided))))


def _facts(dataset: Dataset, model: Model) -> dict[str, Any]:
    return {
        "num_labels": dataset.manifest.num_labels,
        "dim": model.encoder.dim,
        "precision": model.shard.weights.precision,
        "tokenizer": dataset.manifest.tokenizer,
    }


def _identity(dataset: Dataset) -> dict[str, Any]:
    manifest = dataset.manifest
    return {
        "path": dataset.path,
        "num_labels": manifest.num_labels,
        "num_points": manifest.num_points("train"),
        "tokenizer": manifest.tokenizer,
        "vocabulary_hash": manifest.vocabulary_hash,
        "has_label_texts": manifest.has_label_texts,
        "manifest_hash": manifest.hash,
    }


def check(config: RunConfig, dataset: Dataset) -> None:
    """Raises ReneeError where the dataset or the encoder do not fit the configuration."""
    manifest = dataset.manifest
    if not manifest.num_points("train"):
        raise ReneeError(f"{dataset.path} has no training points; convert one that has")
    if load_tokenizer(config.encoder.name).hash != manifest.vocabulary_hash:
        raise ReneeError(
            f"{dataset.path} was tokenised with {manifest.tokenizer!r}, whose vocabulary is not "
            f"that of encoder.name={config.encoder.name!r}; convert it with "
            f"tokenizer={config.encoder.name}"
        )
    check_sinks(config)
    if config.encoder.weights and not Path(config.encoder.weights).is_file():
        raise ReneeError(f"encoder.weights={config.encoder.weights!r} is not a file")


def _check_resumable(config: RunConfig, directory: RunDirectory, dataset: Dataset) -> None:
    saved = directory.read(RUN_FILE)
    if saved is None:
        return
    before = {**BEFORE, **dict(_dotted(saved["config"]))}
    now = dict(_dotted(config.model_dump()))
    for key, value in now.items():
        if key.partition(".")[0] not in MAY_CHANGE and before.get(key) != value:
            raise ReneeError(
                f"{directory.path} is a run with {key}={before.get(key)!r} and not {value!r}; "
                f"give the same configuration to resume it, or another output"
            )
    for key, value in _identity(dataset).items():
        if key != "path" and saved["dataset"].get(key) != value:
            raise ReneeError(
                f"{directory.path} was trained on a dataset with {key}="
                f"{saved['dataset'].get(key)!r} and {dataset.path} has {value!r}; "
                f"give the same dataset to resume it, or another output"
            )


def _dotted(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
