"""Training as a Ray Train job: TorchTrainer around training/loop."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import ray
import ray.train
import torch
from ray.train import CheckpointConfig, FailureConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from renee_ray.config import ReneeError, RunConfig, make_config
from renee_ray.data.dataset import Dataset, absolute, filesystem_of
from renee_ray.data.order import Order, scoring_order, training_order
from renee_ray.data.tokenizer import load as load_tokenizer
from renee_ray.service.cluster import ensure_ray
from renee_ray.service.feed import feed
from renee_ray.service.progress import Channel, Display, evaluation_line
from renee_ray.training.batch import Batch, Position
from renee_ray.training.checkpoint import Checkpoint, State, save
from renee_ray.training.collectives import Ranks
from renee_ray.training.initialise import initialise_classifier
from renee_ray.training.loop import Plan, Trainer
from renee_ray.training.model import build_model
from renee_ray.training.scoring import Propensities, prior_offset, read_counts
from renee_ray.xfc.labels import split_range

log = logging.getLogger(__name__)

RUN_FILE, HISTORY_FILE = "run.json", "history.json"
MAY_CHANGE = {
    "data", "output", "num_workers", "use_gpu", "threads", "timeout_s", "checkpoint",
    "evaluation", "loss_every",
}  # fmt: skip
"""Keys that a resumed run may set anew; any other would change the trajectory it continues."""


@dataclass(frozen=True)
class RunDirectory:
    """A run's directory, local or remote, and the two files in it that are not Ray Train's."""

    path: str

    def _located(self) -> tuple[pafs.FileSystem, str]:
        return filesystem_of(self.path)

    def read(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the run; None where it is not there."""
        filesystem, root = self._located()
        if filesystem.get_file_info(f"{root}/{name}").type != pafs.FileType.File:
            return None
        with filesystem.open_input_file(f"{root}/{name}") as file:
            return json.loads(file.read())

    def write(self, name: str, content: dict[str, Any]) -> None:
        filesystem, root = self._located()
        filesystem.create_dir(root, recursive=True)
        with filesystem.open_output_stream(f"{root}/{name}.tmp") as sink:
            sink.write(json.dumps(content, indent=1).encode())
        filesystem.move(f"{root}/{name}.tmp", f"{root}/{name}")

    def config(self) -> RunConfig:
        """The configuration that the run was started with.

        Raises:
            ReneeError: there is no run here.
        """
        saved = self.read(RUN_FILE)
        if saved is None:
            raise ReneeError(
                f"{self.path} is not a run of renee_ray: no {RUN_FILE}; "
                f"run `renee-ray train CONFIG data=DATASET output={self.path}` first"
            )
        return make_config(RunConfig, saved["config"], where=f"{self.path}/{RUN_FILE}")

    def checkpoint(self, which: str, metric: str) -> tuple[Checkpoint, dict[str, Any]]:
        """(the `best` or `last` committed checkpoint, the metrics reported with it)."""
        try:
            result = ray.train.Result.from_path(*self._for_ray())
        except (RuntimeError, ValueError, FileNotFoundError) as error:
            raise ReneeError(
                f"{self.path} holds no committed checkpoint yet; wait for the first evaluation, "
                f"or run `renee-ray train` on it again"
            ) from error
        found = list(result.best_checkpoints or [])
        scored = [pair for pair in found if pair[1].get(metric) is not None]
        if which == "best" and scored:
            committed, metrics = max(scored, key=lambda pair: pair[1][metric])
        elif result.checkpoint is not None:
            committed, metrics = result.checkpoint, result.metrics or {}
        else:
            raise ReneeError(f"{self.path} holds no committed checkpoint yet")
        return Checkpoint(committed.filesystem, committed.path), metrics

    def _for_ray(self) -> tuple[str, pafs.FileSystem | None]:
        if "://" not in self.path:
            return absolute(self.path), None
        filesystem, root = self._located()
        return root, filesystem


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
    _check(config, dataset)
    directory = RunDirectory(config.output)
    _check_resumable(config, directory, dataset)
    ensure_ray(config.num_workers + 1)
    use_gpu = decide_gpu(config.use_gpu, config.num_workers)
    directory.write(RUN_FILE, {"config": config.model_dump(), "dataset": _identity(dataset)})
    on_progress(
        f"training on {dataset.manifest.num_points('train'):,} points and "
        f"{dataset.manifest.num_labels:,} labels with {config.num_workers} "
        f"{'GPU' if use_gpu else 'CPU'} workers"
    )
    with Display() as display:
        arguments = {
            "config": config.model_dump(),
            "manifest": dataset.manifest,
            "queue": display.queue,
        }
        return launch(train_worker, arguments, config, use_gpu)


def launch(
    function: Callable[[dict[str, Any]], Any],
    arguments: dict[str, Any],
    config: RunConfig,
    use_gpu: bool,
    *,
    stored: bool = True,
) -> Any:
    """Runs a worker function as a TorchTrainer; returns what rank 0 returned.

    stored: its checkpoints go to `config.output`; otherwise it has none.
    """
    parent, name = os.path.split(config.output.rstrip("/")) if stored else (None, None)
    trainer = TorchTrainer(
        function,
        train_loop_config=arguments,
        torch_config=TorchConfig(timeout_s=config.timeout_s),
        scaling_config=ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=use_gpu,
            resources_per_worker=None if use_gpu else {"CPU": 1},
        ),
        run_config=ray.train.RunConfig(  # type: ignore[call-arg]  # mypy sees the V1 class
            name=name,
            storage_path=parent,
            failure_config=FailureConfig(max_failures=config.checkpoint.max_failures),
            checkpoint_config=CheckpointConfig(
                num_to_keep=config.checkpoint.keep,
                checkpoint_score_attribute=config.evaluation.metric,
            )
            if stored
            else None,
            worker_runtime_env={"env_vars": worker_environment(config, use_gpu)},
        ),
    )
    return unwrapped(trainer.fit).return_value


def unwrapped(fit: Callable[[], Any]) -> Any:
    """Calls; a ReneeError that a worker raised comes out as itself."""
    try:
        return fit()
    except Exception as error:
        raise user_error(error) or error from error


def user_error(error: BaseException | None) -> ReneeError | None:
    """The ReneeError at the root of what Ray wrapped, if there is one."""
    seen: set[int] = set()
    queue = [error]
    while queue:
        current = queue.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, ReneeError):
            return ReneeError(str(current).splitlines()[-1].removeprefix("renee_ray.config."))
        failures = getattr(current, "worker_failures", None) or {}
        queue += [current.__cause__, getattr(current, "cause", None), *failures.values()]
    return None


def worker_environment(config: RunConfig, use_gpu: bool) -> dict[str, str]:
    """Threads must be set before torch loads: cores are shared by the workers of a machine."""
    cores = len(os.sched_getaffinity(0))
    threads = config.threads or (4 if use_gpu else max(1, cores // config.num_workers))
    return {
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }


def decide_gpu(choice: str, num_workers: int) -> bool:
    """Whether workers get a GPU each.

    Raises:
        ReneeError: GPUs are demanded and the cluster has too few.
    """
    have = ray.cluster_resources().get("GPU", 0)
    if choice == "yes" and have < num_workers:
        raise ReneeError(
            f"use_gpu=yes needs {num_workers} GPUs and the Ray cluster has {have:.0f}; "
            f"lower num_workers or set use_gpu=no"
        )
    return choice != "no" and have >= num_workers


def orders(config: RunConfig, dataset: Dataset) -> list[Order]:
    """The order of every epoch of a run."""
    splits = dataset.manifest.splits
    return [
        training_order(
            [part.rows for part in splits["train"]],
            [part.rows for part in splits["labels"]],
            augment=config.feed.augment,
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


def train_worker(arguments: dict[str, Any]) -> dict[str, Any]:
    """What each Ray Train worker runs, on a fresh start and after every failure."""
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
    model = build_model(config, dataset.manifest.num_labels, ranks, device, training=True)
    committed = ray.train.get_checkpoint()
    checkpoint = Checkpoint(committed.filesystem, committed.path) if committed else None
    channel = Channel(arguments["queue"], ranks.rank)
    channel.forward_warnings()
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
        channel.record,
        lambda metrics: _report(trainer, config, metrics, channel),
        checkpoint.state if checkpoint else State(facts=_facts(dataset, model)),
    )
    if checkpoint:
        checkpoint.load_encoder(model.encoder)
        checkpoint.load_optimizer(model.encoder, trainer.optimizer)
        checkpoint.load_shard(model.shard)
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
    )
    trainer.run(batches)
    evals = trainer.state.history["evals"]
    return {
        "step": trainer.state.step,
        "skipped": trainer.state.skipped,
        "encoder_skipped": trainer.state.encoder_skipped,
        "best": trainer.state.best,
        "validation": evals[-1]["metrics"] if evals else {},
    }


def worker_device() -> torch.device:
    """The device that Ray Train gave this worker."""
    return ray.train.torch.get_device()


def quiet() -> None:
    """Keeps a worker's libraries from writing bars and notices into the driver's terminal."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def _report(
    trainer: Trainer, config: RunConfig, metrics: dict[str, float], channel: Channel
) -> None:
    """Saves this rank's part of a checkpoint and hands it to Ray Train, which commits it."""
    state, ranks = trainer.state, trainer.ranks
    ranges = [
        split_range(trainer.model.shard.owned.num_labels, ranks.num_ranks, rank)
        for rank in range(ranks.num_ranks)
    ]
    directory = tempfile.mkdtemp(prefix="renee-ray-checkpoint-")
    try:
        save(
            directory, state, trainer.model.encoder, trainer.optimizer, trainer.model.shard,
            ranges, ranks.rank,
        )  # fmt: skip
        ray.train.report(
            {**metrics, "step": state.step, "skipped": state.skipped},
            ray.train.Checkpoint.from_directory(directory),
            checkpoint_dir_name=f"step-{state.step:09d}",
        )
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    if ranks.rank == 0:
        RunDirectory(config.output).write(HISTORY_FILE, state.history)
        if metrics:
            channel.say(evaluation_line(state.step, metrics))


def _facts(dataset: Dataset, model: Any) -> dict[str, Any]:
    return {
        "num_labels": dataset.manifest.num_labels,
        "dim": model.encoder.dim,
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
    }


def _check(config: RunConfig, dataset: Dataset) -> None:
    manifest = dataset.manifest
    texts = config.feed.augment > 0 or config.classifier.init == "label_text"
    if texts and not manifest.has_label_texts:
        raise ReneeError(
            f"{dataset.path} has no label texts; set feed.augment=0 and classifier.init=normal"
        )
    if not manifest.num_points("train"):
        raise ReneeError(f"{dataset.path} has no training points; convert one that has")
    if load_tokenizer(config.encoder.name).hash != manifest.vocabulary_hash:
        raise ReneeError(
            f"{dataset.path} was tokenised with {manifest.tokenizer!r}, whose vocabulary is not "
            f"that of encoder.name={config.encoder.name!r}; convert it with "
            f"tokenizer={config.encoder.name}"
        )
    if config.encoder.weights and not Path(config.encoder.weights).is_file():
        raise ReneeError(f"encoder.weights={config.encoder.weights!r} is not a file")


def _check_resumable(config: RunConfig, directory: RunDirectory, dataset: Dataset) -> None:
    saved = directory.read(RUN_FILE)
    if saved is None:
        return
    before = saved["config"]
    for key, value in config.model_dump().items():
        if key not in MAY_CHANGE and before.get(key) != value:
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
