"""`renee-ray train`: starts or resumes a run as a Ray Train job, and follows it to its end."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray

from renee_ray.config.schema import NO_TRANSFORMER, RunConfig
from renee_ray.data.dataset import Dataset
from renee_ray.data.targets import Targets
from renee_ray.data.tokenizer import load as load_tokenizer
from renee_ray.errors import LeaseLost, ReneeError
from renee_ray.model.encoder import check_positions
from renee_ray.plan.devices import cluster_device, local_device, usable_gpus
from renee_ray.plan.plan import Plan, plan_or_refuse
from renee_ray.service.cluster.connect import ensure_ray, started_here
from renee_ray.service.cluster.feed import training_orders
from renee_ray.service.cluster.launch import decide_gpu, launch
from renee_ray.service.observe.observe import following
from renee_ray.service.observe.progress import Display
from renee_ray.service.observe.sinks import check_sinks
from renee_ray.service.observe.watch import Watch
from renee_ray.service.run.directory import RUN_FILE, RunDirectory
from renee_ray.service.run.lease import Lease
from renee_ray.service.train.resuming import identity, is_finished, located, resumed, start_of
from renee_ray.service.train.worker import outcome, train_worker


class Stopped(ReneeError):
    """A run was asked to end early, and did with a checkpoint."""

    status = 130


def train(
    config: RunConfig,
    on_progress: Callable[[str], None] = lambda text: None,
    *,
    force: bool = False,
    stopping: Callable[[], bool] = lambda: False,
    chosen: Sequence[str] = (),
) -> dict[str, Any]:
    """Trains, or resumes what is at `config.output`; of a finished run it only tells.

    force: trains even if the plan says that this machine lacks the memory.
    stopping: is asked several times a second whether the run shall end, as at a signal.
    chosen: sentences on the settings that were chosen, for run.json.

    Returns:
        the metrics of the last evaluation, with "step", "skipped" and "best".

    Raises:
        ReneeError: the dataset, the run directory or the cluster do not fit the configuration.
        LeaseHeld, LeaseLost: another driver trains this run, or has taken it over.
        Stopped: by a signal, after a checkpoint.
    """
    dataset = Dataset.open(config.data)
    config = located(config.model_copy(update={"data": dataset.path}))
    directory = RunDirectory(config.output)
    config = resumed(config, directory, dataset, on_progress)
    check(config, dataset)
    newest = directory.checkpoints().newest()
    if newest and is_finished(directory, newest.state, training_orders(config, dataset)):
        on_progress(f"{directory.path} is finished, after step {newest.state.step}; nothing to do")
        return outcome(newest.state, config)
    start_of(config, dataset, newest)
    plan = _plan(config, dataset, force, on_progress)
    if newest:
        on_progress(f"going on with {directory.path} after step {newest.state.step}")
    with Lease(directory.path, on_progress) as lease:
        # Another command may have started the run since, or changed its labels.
        config = resumed(config, directory, dataset, on_progress=lambda text: None)
        start = start_of(config, dataset, directory.checkpoints().newest())
        try:
            return _train(config, dataset, plan, start, lease, on_progress, stopping, chosen)
        except LeaseLost:
            ray.shutdown()  # and with it the workers
            raise


def _train(
    config: RunConfig, dataset: Dataset, plan: Plan | None, start: str, lease: Lease,
    on_progress: Callable[[str], None], stopping: Callable[[], bool], chosen: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """Trains as the holder of the run's lease, a new run from the checkpoint `start`."""
    ensure_ray(1, local_cpus=config.max_workers + 1)
    use_gpu = decide_gpu(config.use_gpu, config.min_workers)
    known, directory = identity(dataset), RunDirectory(config.output)
    content = {
        "config": config.model_dump(), "dataset": known, "plan": plan and asdict(plan),
        "chosen": list(chosen) or (directory.read(RUN_FILE) or {}).get("chosen", []),
    }  # fmt: skip
    directory.write(RUN_FILE, content)
    if not dataset.manifest.has_label_texts:
        on_progress(
            f"{dataset.path} has no label texts: feed.augment has no effect, and "
            f"classifier.init=label_text starts from the labels' training points alone"
        )
    workers = " to ".join(map(str, sorted({config.min_workers, config.max_workers})))
    kind = "GPU" if use_gpu else "CPU"
    on_progress(
        f"training on {dataset.manifest.num_points('train'):,} points and "
        f"{dataset.manifest.num_labels:,} labels with {workers} "
        f"{kind} worker{'s' * (config.max_workers > 1)}"
    )
    watch, launched_s = Watch(config.timeout_s), time.time()
    with Display(watch=watch) as display, following(config, watch, launched_s):

        def stop() -> bool:
            if watch.training:
                on_progress("stopping after a checkpoint; once more to stop at once")
                display.channel.stop()
            return watch.training

        arguments = {
            "config": config.model_dump(),
            "manifest_hash": known["manifest_hash"],
            "channel": display.channel,
            "launched_s": launched_s,
            "start": start,
        }
        found = launch(
            train_worker, arguments, config, use_gpu, on_stop=stop, check=lease.check,
            stopping=stopping,
        )  # fmt: skip
    if found.pop("stopped"):
        raise Stopped(
            f"stopped after step {found['step']}, with a checkpoint; give the same command again "
            f"to go on from there"
        )
    return found


def _plan(
    config: RunConfig, dataset: Dataset, force: bool, on_progress: Callable[[str], None]
) -> Plan | None:
    """Plans for this machine, before Ray starts, or for a cluster; refuses what cannot fit it.

    None: the plan does not know the cluster's GPUs.
    """
    if os.environ.get("RAY_ADDRESS") or (ray.is_initialized() and not started_here()):
        ensure_ray(1, local_cpus=config.min_workers + 1)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        on_gpu = decide_gpu(config.use_gpu, config.min_workers)
        device = cluster_device(nodes, on_gpu)
        whose = "the largest GPU of the cluster" if on_gpu else "the whole cluster"
    else:
        on_gpu = config.use_gpu != "no" and usable_gpus() >= config.min_workers
        device, whose = local_device(on_gpu), "the GPU" if on_gpu else "this machine"
    if device is None:
        return None
    return plan_or_refuse(config, dataset, device, whose, on_progress, force=force)


def check(config: RunConfig, dataset: Dataset) -> None:
    """Raises ReneeError where the dataset or the encoder do not fit the configuration."""
    manifest = dataset.manifest
    if not manifest.num_points("train"):
        raise ReneeError(f"{dataset.path} has no training points; convert one that has")
    if config.evaluation.tails and not manifest.num_points("validation"):
        raise ReneeError(
            f"evaluation.tails are compared on validation points, and {dataset.path} has none; "
            f"leave evaluation.tails out, or convert it with validation=0.1"
        )
    name = config.encoder.name
    if name != NO_TRANSFORMER and load_tokenizer(name).hash != manifest.vocabulary_hash:
        raise ReneeError(
            f"{dataset.path} was tokenised with {manifest.tokenizer!r}, whose vocabulary is not "
            f"that of encoder.name={config.encoder.name!r}; convert it with "
            f"tokenizer={config.encoder.name}"
        )
    check_positions(config.encoder, manifest.max_length)
    Targets.of(config.feed.targets, dataset)
    check_sinks(config)
    if config.encoder.weights and not Path(config.encoder.weights).is_file():
        raise ReneeError(f"encoder.weights={config.encoder.weights!r} is not a file")
