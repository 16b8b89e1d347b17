"""Training as a Ray Train job: TorchTrainer around training/loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ray

from renee_ray.checkpoint.resume import resume
from renee_ray.checkpoint.state import Checkpoint, State, set_moments
from renee_ray.checkpoint.writer import CheckpointWriter, Written
from renee_ray.config.overrides import dotted, make_config
from renee_ray.config.schema import RunConfig
from renee_ray.data.dataset import Dataset
from renee_ray.data.order import OTHER_TEXTS, Order, scoring_order, training_order
from renee_ray.data.storage import absolute
from renee_ray.data.tokenizer import load as load_tokenizer
from renee_ray.errors import ReneeError
from renee_ray.model.encoder import check_positions
from renee_ray.model.initialise import initialise_classifier
from renee_ray.model.model import Model, build_model
from renee_ray.parallel.batch import Batch, Position
from renee_ray.parallel.collectives import Ranks
from renee_ray.report.status import STATUS_FILE
from renee_ray.scoring.scorer import Propensities, prior_offset, read_counts
from renee_ray.service.cluster import ensure_ray
from renee_ray.service.feed import Epochs, feed
from renee_ray.service.launch import decide_gpu, launch, quiet, worker_device
from renee_ray.service.observe.observe import Observer, following, run_name
from renee_ray.service.observe.progress import Channel, Display, evaluation_line
from renee_ray.service.observe.sinks import check_sinks
from renee_ray.service.observe.watch import Watch
from renee_ray.service.run.directory import RUN_FILE, RunDirectory
from renee_ray.service.run.history import History
from renee_ray.service.run.lease import Lease, LeaseLost
from renee_ray.service.train.preemption import wishes
from renee_ray.training.loop import Trainer, Validation
from renee_ray.training.schedule import Schedule

MAY_CHANGE = {
    "data", "output", "num_workers", "use_gpu", "threads", "timeout_s", "checkpoint",
    "evaluation", "loss_every", "observe", "placement_strategy", "accelerator_type",
    "cpus_per_worker", "regroup_s",
}  # fmt: skip
"""Keys that a resumed run may set anew; any other would change the trajectory it continues."""
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
        LeaseHeld, LeaseLost: another driver trains this run, or has taken it over.
        Stopped: by a signal, after a checkpoint.
    """
    dataset = Dataset.open(config.data)
    config = config.model_copy(update={"data": dataset.path, "output": absolute(config.output)})
    directory = RunDirectory(config.output)
    config = resumed(config, directory, dataset, on_progress)
    check(config, dataset)
    newest = directory.checkpoints().newest()
    if newest is None:
        directory.refuse_old_format()
    elif is_finished(directory, newest.state, orders(config, dataset)):
        on_progress(f"{directory.path} is finished, after step {newest.state.step}; nothing to do")
        return _outcome(newest.state, config)
    with Lease(directory.path, on_progress) as lease:
        # Another driver may have started the run since.
        config = resumed(config, directory, dataset, on_progress=lambda text: None)
        try:
            return _train(config, dataset, lease, on_progress)
        except LeaseLost:
            ray.shutdown()  # and with it the workers
            raise


def _train(
    config: RunConfig, dataset: Dataset, lease: Lease, on_progress: Callable[[str], None]
) -> dict[str, Any]:
    """Trains as the holder of the run's lease."""
    ensure_ray(config.min_workers + 1, local_cpus=config.max_workers + 1)
    use_gpu = decide_gpu(config.use_gpu, config.min_workers)
    known = identity(dataset)
    RunDirectory(config.output).write(RUN_FILE, {"config": config.model_dump(), "dataset": known})
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

        def stop() -> bool:
            if watch.training:
                on_progress("stopping after a checkpoint; once more to stop at once")
                display.mail.stop()
            return watch.training

        arguments = {
            "config": config.model_dump(),
            "manifest_hash": known["manifest_hash"],
            "mail": display.mail,
            "launched_s": launched_s,
        }
        found = launch(train_worker, arguments, config, use_gpu, on_stop=stop, check=lease.check)
    if found.pop("stopped"):
        raise Stopped(
            f"stopped after step {found['step']}, with a checkpoint; give the same command again "
            f"to go on from there"
        )
    return found


def is_finished(directory: RunDirectory, state: State, epochs: Iterable[Order]) -> bool:
    """Whether a checkpoint's state is the end of the run, and `renee-ray status` says so too."""
    try:
        status = directory.read(STATUS_FILE) or {}
    except ReneeError:  # damaged: the workers write another
        return False
    at_end = state.step >= sum(order.num_batches for order in epochs)
    return at_end and status.get("state") == "finished"


def _outcome(state: State, config: RunConfig) -> dict[str, Any]:
    return {
        "step": state.step,
        "skipped": state.skipped,
        "best": state.best.get(config.evaluation.metric),
        "validation": state.evaluation["metrics"] if state.evaluation else {},
    }


def _workers(config: RunConfig) -> str:
    if config.min_workers == config.max_workers:
        return str(config.max_workers)
    return f"{config.min_workers} to {config.max_workers}"


def orders(config: RunConfig, dataset: Dataset) -> Sequence[Order]:
    """The order of every epoch of a run, made when it is asked for."""
    manifest = dataset.manifest
    # A point whose filter labels are positives teaches the texts of these labels already.
    others = config.feed.filter_labels == "positive"
    texts = manifest.other_texts if others else [part.rows for part in manifest.splits["labels"]]
    points = [part.rows for part in manifest.splits["train"]]

    def made(epoch: int) -> Order:
        return training_order(
            points,
            list(texts) if manifest.has_label_texts else [],
            augment=config.feed.augment,
            texts=OTHER_TEXTS if others else "labels",
            seed=config.seed,
            epoch=epoch,
            batch_size=config.batch_size,
            streams=config.feed.streams,
            window=config.feed.window,
        )

    return Epochs(made, config.epochs)


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
    dataset = _same_dataset(config.data, arguments["manifest_hash"])
    ranks, device = Ranks.of_process_group(config.timeout_s), worker_device()
    epochs = orders(config, dataset)
    schedule = Schedule(
        tuple(order.num_batches for order in epochs),
        config.evaluation.every,
        config.checkpoint.every_steps,
    )
    channel = Channel(arguments["mail"], ranks.rank)
    channel.forward_warnings()
    num_labels = dataset.manifest.num_labels

    def build(checkpoint: Checkpoint | None) -> Model:
        precision = checkpoint.state.facts.get("precision") if checkpoint else None
        return build_model(config, num_labels, ranks, device, training=True, precision=precision)

    checkpoints = RunDirectory(config.output).checkpoints()
    model, checkpoint, moments = resume(checkpoints, ranks, build)
    state = checkpoint.state if checkpoint else State(facts=_facts(dataset, model))
    history = _history(config, checkpoint, state) if ranks.rank == 0 else None
    observer = Observer(config, ranks, device, channel, state, arguments["launched_s"], history)
    settings = config.checkpoint
    writer = CheckpointWriter(
        checkpoints,
        ranks,
        settings.keep,
        config.evaluation.metric,
        settings.background,
        lambda written: _written(written, observer),
        observer.flush_history,
    ).start()
    writer.reserve(model.encoder, model.shard)
    length, pad_multiple = config.encoder.max_length, 8 if config.encoder.compile else 1
    validation = None
    if dataset.manifest.num_points("validation"):
        validation = Validation(
            lambda: scoring_feed(
                dataset, "validation", config.evaluation.batch_size, length, ranks
            ),
            Propensities.read(dataset, model.shard.owned, ranks),
            prior_offset(read_counts(dataset, model.shard.owned), config.evaluation.tail, device),
        )
    trainer = Trainer(
        config,
        model,
        ranks,
        device,
        schedule,
        validation,
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
            observer.recorder,
            channel.say,
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
    return _outcome(trainer.state, trainer.config) | {"stopped": trainer.stopped}


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
    observer.write_history()  # which the checkpoint's commit waits for
    writer.save(state, model.encoder, trainer.optimizer, model.shard, metrics)
    if metrics and trainer.ranks.rank == 0:
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


def _same_dataset(path: str, manifest_hash: str) -> Dataset:
    """The dataset as the driver found it. The manifest, which may be large, is read anew."""
    dataset = Dataset.without_check(path)
    if dataset.manifest.hash != manifest_hash:
        raise ReneeError(
            f"{path} was converted anew while it was trained on; train to another output"
        )
    return dataset


def _history(config: RunConfig, checkpoint: Checkpoint | None, state: State) -> History:
    earlier = checkpoint.manifest.history if checkpoint else None
    return History.read(RunDirectory(config.output), state, earlier)


def _facts(dataset: Dataset, model: Model) -> dict[str, Any]:
    return {
        "num_labels": dataset.manifest.num_labels,
        "dim": model.encoder.dim,
        "precision": model.shard.weights.precision,
        "tokenizer": dataset.manifest.tokenizer,
    }


def identity(dataset: Dataset) -> dict[str, Any]:
    """What run.json says of the dataset, and a resumed run's dataset must have too."""
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


def resumed(
    config: RunConfig,
    directory: RunDirectory,
    dataset: Dataset,
    on_progress: Callable[[str], None],
) -> RunConfig:
    """The configuration to go on with: what was not given now is as the run has it.

    Raises:
        ReneeError: the run that is there has another configuration or dataset.
    """
    saved = directory.read(RUN_FILE)
    if saved is None:
        return config
    own = directory.config().model_dump(exclude=MAY_CHANGE)
    given, before = config.model_dump(exclude_unset=True), dict(dotted(own))
    for key, value in dotted(given):
        if before.get(key, value) != value:
            raise ReneeError(
                f"{directory.path} is a run with {key}={before[key]!r} and not {value!r}; "
                f"give the same configuration to resume it, or another output"
            )
    for key, value in identity(dataset).items():
        # Earlier runs have no hash of the labels, whose dataset's manifest_hash tells as much.
        if key not in ("path", "labels_hash") and saved["dataset"].get(key) != value:
            raise ReneeError(
                f"{directory.path} was trained on a dataset with {key}="
                f"{saved['dataset'].get(key)!r} and {dataset.path} has {value!r}; "
                f"give the same dataset to resume it, or another output"
            )
    for key, value in dotted(config.model_dump()):
        if before.get(key, value) != value:
            on_progress(f"{directory.path} goes on with its {key}={before[key]!r}, not {value!r}")
    return make_config(RunConfig, own, given)
