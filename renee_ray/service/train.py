"""Training as a Ray Train job: TorchTrainer around training/loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ray

from renee_ray.config import ReneeError, RunConfig, dotted
from renee_ray.data.dataset import Dataset
from renee_ray.data.order import OTHER_TEXTS, Order, scoring_order, training_order
from renee_ray.data.storage import absolute
from renee_ray.data.tokenizer import load as load_tokenizer
from renee_ray.service.cluster import ensure_ray
from renee_ray.service.feed import feed
from renee_ray.service.job import decide_gpu, launch, placement, quiet, worker_device
from renee_ray.service.observe import Observer, following, run_name
from renee_ray.service.progress import Channel, Display, evaluation_line
from renee_ray.service.run import HISTORY_FILE, RUN_FILE, RunDirectory
from renee_ray.service.sinks import check_sinks
from renee_ray.service.watch import Watch
from renee_ray.service.wishes import wishes
from renee_ray.status import STATUS_FILE
from renee_ray.training.batch import Batch, Position
from renee_ray.training.checkpoint import Checkpoint, State, set_moments
from renee_ray.training.checkpoint_writer import CheckpointWriter, Written
from renee_ray.training.collectives import Ranks
from renee_ray.training.encoder import check_positions
from renee_ray.training.initialise import initialise_classifier
from renee_ray.training.loop import Plan, Trainer
from renee_ray.training.model import Model, build_model
from renee_ray.training.resume import resume
from renee_ray.training.scoring import Propensities, prior_offset, read_counts

MAY_CHANGE = {
    "data", "output", "num_workers", "use_gpu", "threads", "timeout_s", "checkpoint",
    "evaluation", "loss_every", "observe", "placement_strategy", "accelerator_type",
    "cpus_per_worker", "regroup_s",
}  # fmt: skip
"""Keys that a resumed run may set anew; any other would change the trajectory it continues."""
BEFORE = {
    "feed.filter_labels": "negative", "feed.token_dropout": 0.0, "encoder.micro_batch": 0,
}  # fmt: skip
"""What runs did whose configuration does not have these keys yet."""
LAST_ATTEMPTS, LAST_PAUSE_S = 5, 20.0
"""To write the last checkpoint once more, where a disk is full, say."""


class Stopped(ReneeError):
    """A run that was asked to end early, and did with a checkpoint."""

    status = 130


def train(
    config: RunConfig, on_progress: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Trains, or resumes what is at `config.output`; of a finished run it only tells.

    Returns:
        the metrics of the last evaluation, with "step", "skipped" and "best".

    Raises:
        ReneeError: the dataset, the run directory or the cluster do not fit the configuration.
        Stopped: by a signal, after a checkpoint.
    """
    dataset = Dataset.open(config.data)
    config = config.model_copy(update={"data": dataset.path, "output": absolute(config.output)})
    check(config, dataset)
    directory = RunDirectory(config.output)
    _check_resumable(config, directory, dataset)
    newest = directory.checkpoints().newest()
    if newest is None:
        directory.refuse_old_format()
    elif is_finished(directory, newest.state, orders(config, dataset)):
        on_progress(f"{directory.path} is finished, after step {newest.state.step}; nothing to do")
        return _outcome(newest.state)
    ensure_ray(config.min_workers + 1, local_cpus=config.max_workers + 1)
    use_gpu = decide_gpu(config.use_gpu, config.min_workers)
    directory.write(RUN_FILE, {"config": config.model_dump(), "dataset": _identity(dataset)})
    if not dataset.manifest.has_label_texts:
        on_progress(
            f"{dataset.path} has no label texts: feed.augment has no effect, and "
            f"classifier.init=label_text starts from the labels' training points alone"
        )
    on_progress(
        f"training on {dataset.manifest.num_points('train'):,} points and "
        f"{dataset.manifest.num_labels:,} labels with {_workers(config)} "
        f"{'GPU' if use_gpu else 'CPU'} workers"
    )
    watch, launched_s = Watch(config.timeout_s), time.time()
    with Display(watch=watch) as display, following(config, watch, launched_s):

        def stop() -> None:
            on_progress("stopping after a checkpoint; once more to stop at once")
            display.mail.stop()

        arguments = {
            "config": config.model_dump(),
            "manifest": dataset.manifest,
            "mail": display.mail,
            "launched_s": launched_s,
        }
        found = launch(train_worker, arguments, config, use_gpu, on_stop=stop)
    if found.pop("stopped"):
        raise Stopped(
            f"stopped after step {found['step']}, with a checkpoint; give the same command again "
            f"to go on from there"
        )
    return found


def is_finished(directory: RunDirectory, state: State, epochs: list[Order]) -> bool:
    """Whether a checkpoint's state is the end of the run, and `renee-ray status` says so too."""
    try:
        status = directory.read(STATUS_FILE) or {}
    except ReneeError:  # damaged: the workers write another
        return False
    at_end = state.step >= sum(order.num_batches for order in epochs)
    return at_end and status.get("state") == "finished"


def _outcome(state: State) -> dict[str, Any]:
    evals = state.history["evals"]
    return {
        "step": state.step,
        "skipped": state.skipped,
        "best": state.best,
        "validation": evals[-1]["metrics"] if evals else {},
    }


def _workers(config: RunConfig) -> str:
    if config.min_workers == config.max_workers:
        return str(config.max_workers)
    return f"{config.min_workers} to {config.max_workers}"


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
    dataset: Dataset, split: str, batch_size: int, max_length: int, ranks: Ranks, **options: int
) -> Iterator[Batch]:
    """This rank's rows of a split, once. options: of `scoring_order`."""
    parts = [part.rows for part in dataset.manifest.splits[split]]
    order = scoring_order(split, parts, batch_size=batch_size, num_ranks=ranks.num_ranks, **options)
    return feed(
        dataset, [order], ranks.rank, ranks.num_ranks, start=Position(), max_length=max_length
    )


class Prepared(NamedTuple):
    """A worker's trainer, new or as the last checkpoint left it; the batches that remain; who is
    told of both; who writes."""

    trainer: Trainer
    batches: Iterator[Batch]
    observer: Observer
    writer: CheckpointWriter


def prepare(arguments: dict[str, Any]) -> Prepared:
    """What a worker trains with."""
    quiet()
    config = RunConfig.model_validate(arguments["config"])
    dataset = Dataset(config.data, arguments["manifest"])
    ranks, device = Ranks.of_process_group(config.timeout_s), worker_device()
    epochs = orders(config, dataset)
    plan = Plan(
        tuple(order.num_batches for order in epochs),
        config.evaluation.every,
        config.checkpoint.every_steps,
    )
    channel = Channel(arguments["mail"], ranks.rank)
    channel.forward_warnings()
    leave_room_for_reading(config, ranks, device.type == "cuda")
    num_labels = dataset.manifest.num_labels

    def build(checkpoint: Checkpoint | None) -> Model:
        precision = checkpoint.state.facts.get("precision") if checkpoint else None
        return build_model(config, num_labels, ranks, device, training=True, precision=precision)

    checkpoints = RunDirectory(config.output).checkpoints()
    model, checkpoint, moments = resume(checkpoints, ranks, build)
    state = checkpoint.state if checkpoint else State(facts=_facts(dataset, model))
    observer = Observer(config, ranks, device, channel, state, arguments["launched_s"])
    settings = config.checkpoint
    writer = CheckpointWriter(
        checkpoints,
        ranks,
        settings.keep,
        config.evaluation.metric,
        settings.background,
        lambda written: _written(written, observer),
    )
    writer.reserve(model.shard)
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
        lambda metrics: _save(trainer, writer, metrics, channel, observer),
        state,
        observer.recorder,
    )
    if checkpoint:
        set_moments(model.encoder, trainer.optimizer, moments)
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
    return Prepared(trainer, batches, observer, writer)


def leave_room_for_reading(config: RunConfig, ranks: Ranks, use_gpu: bool) -> None:
    """Raises ReneeError where the workers have taken every CPU: reading would wait for ever."""
    each = placement(config, use_gpu)["resources_per_worker"]["CPU"]
    spare = ray.cluster_resources().get("CPU", 0) - ranks.num_ranks * each
    if spare < 1:
        raise ReneeError(
            f"{ranks.num_ranks} workers leave no CPU of the cluster to read data with; lower "
            f"num_workers={config.num_workers} or add a node with more CPUs"
        )


def train_worker(arguments: dict[str, Any]) -> dict[str, Any]:
    """What each Ray Train worker runs, on a fresh start and after every failure."""
    trainer, batches, observer, writer = prepare(arguments)
    if trainer.ranks.rank == 0:
        wishes.follow(arguments["mail"])
    trainer.wish = lambda: wishes.take(trainer.state.step)
    with observer:
        trainer.run(batches)
        _finish(trainer, writer)
        observer.stopped = trainer.stopped
    return _outcome(trainer.state) | {"stopped": trainer.stopped}


def _save(
    trainer: Trainer,
    writer: CheckpointWriter,
    metrics: dict[str, float],
    channel: Channel,
    observer: Observer,
) -> None:
    """Starts a checkpoint, and says what was measured."""
    state, model = trainer.state, trainer.model
    observer.recorder.enter("checkpoint")
    if metrics:
        observer.evaluated(state.step, metrics)
    writer.save(state, model.encoder, trainer.optimizer, model.shard, metrics)
    if trainer.ranks.rank == 0:
        RunDirectory(trainer.config.output).write(HISTORY_FILE, state.history)
        if metrics:
            channel.say(evaluation_line(state.step, metrics))


def _written(written: Written, observer: Observer) -> None:
    if written.committed:
        observer.checkpointed(written.step, written.seconds, written.bytes)
    wishes.written(written)


def _finish(trainer: Trainer, writer: CheckpointWriter) -> None:
    """Waits for the last checkpoint, which the run must have; all ranks alike.

    Raises:
        ReneeError: it could not be written.
    """
    state, model = trainer.state, trainer.model
    evals = state.history["evals"]
    metrics = evals[-1]["metrics"] if evals and evals[-1]["step"] == state.step else {}
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
        "labels_hash": manifest.labels_hash,
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
    check_positions(config.encoder, manifest.max_length)
    check_sinks(config)
    if config.encoder.weights and not Path(config.encoder.weights).is_file():
        raise ReneeError(f"encoder.weights={config.encoder.weights!r} is not a file")


def _check_resumable(config: RunConfig, directory: RunDirectory, dataset: Dataset) -> None:
    saved = directory.read(RUN_FILE)
    if saved is None:
        return
    directory.config()  # is it one that we may write to?
    before = {**BEFORE, **dict(dotted(saved["config"]))}
    now = dict(dotted(config.model_dump()))
    for key, value in now.items():
        if key.partition(".")[0] not in MAY_CHANGE and before.get(key) != value:
            raise ReneeError(
                f"{directory.path} is a run with {key}={before.get(key)!r} and not {value!r}; "
                f"give the same configuration to resume it, or another output"
            )
    for key, value in _identity(dataset).items():
        # Earlier runs have no hash of the labels, whose dataset's manifest_hash tells as much.
        if key not in ("path", "labels_hash") and saved["dataset"].get(key) != value:
            raise ReneeError(
                f"{directory.path} was trained on a dataset with {key}="
                f"{saved['dataset'].get(key)!r} and {dataset.path} has {value!r}; "
                f"give the same dataset to resume it, or another output"
            )
