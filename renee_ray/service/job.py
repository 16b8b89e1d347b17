"""Running a worker function as a Ray Train job, and what every such worker does first."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import wait
from typing import Any

import ray
import ray.train
import torch
from ray.train import FailureConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from renee_ray.config import OPENMP, ReneeError, RunConfig
from renee_ray.data import models
from renee_ray.data.storage import storage_error
from renee_ray.program import at_signals
from renee_ray.service.cluster import started_here
from renee_ray.service.wishes import Regroup, SignalHandler
from renee_ray.training.threads import in_thread

NICENESS = int(os.environ.get("RAY_worker_niceness", "15"))  # noqa: SIM112
"""Of Ray's workers, as Ray sets it: on a machine with other work it decides who gets the cores."""


def launch(
    function: Callable[[dict[str, Any]], Any],
    arguments: dict[str, Any],
    config: RunConfig,
    use_gpu: bool,
    *,
    on_stop: Callable[[], bool] | None = None,
) -> Any:
    """Runs a worker function as a TorchTrainer; returns what rank 0 returned.

    on_stop: asks the workers to end, at the first SIGTERM or SIGINT, and returns whether they have
        anything to save; None: they are just ended.

    Raises:
        ReneeError: the cluster's nodes cannot hold the workers as they are to be placed.
    """
    check_placement(config, use_gpu, ray.nodes())
    # Checkpoints are our own business, so Ray Train has nothing to keep.
    with tempfile.TemporaryDirectory(prefix="renee-ray-", ignore_cleanup_errors=True) as scratch:
        trainer = _trainer(function, arguments, config, use_gpu, scratch)
        return _unwrapped(lambda: interruptible(trainer.fit, on_stop, config)).return_value


class _Trainer(TorchTrainer):
    """Without actors that do nothing for it: an idle process of Ray's polls, and takes 0.2 GB."""

    def _create_default_callbacks(self) -> list[Any]:
        # Workers read for themselves (service/feed.py), so the trainer is given no datasets.
        unused: tuple[type, ...] = (DatasetsCallback,)
        if started_here():  # what a controller leaves behind ends with this process
            unused += (PlacementGroupCleanerCallback,)
        callbacks = super()._create_default_callbacks()  # type: ignore[misc]  # V2's
        return [each for each in callbacks if not isinstance(each, unused)]


def _trainer(
    function: Callable[[dict[str, Any]], Any],
    arguments: dict[str, Any],
    config: RunConfig,
    use_gpu: bool,
    scratch: str,
) -> TorchTrainer:
    grace_s = config.checkpoint.grace_s
    return _Trainer(
        function,
        train_loop_config=arguments,
        torch_config=TorchConfig(timeout_s=config.timeout_s),
        scaling_config=ScalingConfig(  # type: ignore[call-arg]  # mypy sees the V1 class
            num_workers=config.num_workers,  # type: ignore[arg-type]
            elastic_resize_monitor_interval_s=config.regroup_s,
            use_gpu=use_gpu,
            **placement(config, use_gpu),
        ),
        run_config=ray.train.RunConfig(  # type: ignore[call-arg]  # mypy sees the V1 class
            storage_path=scratch,
            name="job",
            failure_config=FailureConfig(max_failures=config.checkpoint.max_failures),
            callbacks=[SignalHandler(grace_s), Regroup(grace_s)],  # type: ignore[list-item]
            worker_runtime_env={"env_vars": worker_environment(config, use_gpu)},
        ),
    )


def placement(config: RunConfig, use_gpu: bool) -> dict[str, Any]:
    """Where Ray Train puts workers and what each reserves, as arguments of ScalingConfig."""
    cpus = config.cpus_per_worker or (0 if use_gpu else 1)
    return {
        "resources_per_worker": {"GPU": int(use_gpu), "CPU": cpus},
        "placement_strategy": config.placement_strategy,
        "accelerator_type": config.accelerator_type or None,
    }


def check_placement(config: RunConfig, use_gpu: bool, nodes: list[dict[str, Any]]) -> None:
    """Raises ReneeError where the workers could never be placed, for which Ray would wait silently.

    nodes: as `ray.nodes()` returns them.
    """
    kind = f"accelerator_type:{config.accelerator_type}" if config.accelerator_type else None
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    able = [resources for resources in alive if kind is None or kind in resources]
    needs = placement(config, use_gpu)["resources_per_worker"]
    room = [
        min(int(resources.get(name, 0) // count) for name, count in needs.items() if count)
        for resources in able
    ]
    spare = sum(resources.get("CPU", 0) for resources in alive) - config.min_workers * needs["CPU"]
    if config.cpus_per_worker and spare < 1:
        raise ReneeError(
            f"cpus_per_worker={config.cpus_per_worker} for {config.min_workers} workers leaves no "
            f"CPU of the cluster to read data with; lower it or add a node"
        )
    places = {
        "STRICT_PACK": max(room, default=0),
        "STRICT_SPREAD": sum(1 for each in room if each),
    }.get(config.placement_strategy, sum(room))
    if places < config.min_workers:
        asked = {name: count for name, count in needs.items() if count}
        each = " and ".join(f"{count} {name}" for name, count in asked.items())
        only = f" on nodes with {config.accelerator_type}" if kind else ""
        raise ReneeError(
            f"num_workers={config.min_workers} with {each} each, placed "
            f"{config.placement_strategy}{only}, do not fit the cluster, which has room for "
            f"{places}; add nodes, lower num_workers or change placement_strategy, "
            f"accelerator_type or cpus_per_worker"
        )


def interruptible(
    fit: Callable[[], Any], on_stop: Callable[[], bool] | None, config: RunConfig
) -> Any:
    """Calls `fit`, which waits for workers; a first signal asks them to end with a checkpoint.

    A second one, or `checkpoint.grace_s` without an end, interrupts at once, as does the first
    where `on_stop` says that there is nothing to save.

    Raises:
        KeyboardInterrupt: interrupted at once.
    """
    if threading.current_thread() is not threading.main_thread():
        return fit()
    signals: list[int] = []
    limit = math.inf
    taken = at_signals(lambda number, frame: signals.append(number))
    with taken if on_stop else contextlib.nullcontext():
        # In a thread, where Ray Train leaves the signals alone.
        found = in_thread(fit, "fit")
        while not wait([found], timeout=0.2).done:
            if on_stop and signals and limit == math.inf:
                limit = time.monotonic() + (config.checkpoint.grace_s if on_stop() else 0)
            if len(signals) > 1 or time.monotonic() > limit:
                break
        else:
            return found.result()
    signal.raise_signal(signal.SIGINT)  # now as if it came first: program.py sees to the end
    raise KeyboardInterrupt


def _unwrapped(fit: Callable[[], Any]) -> Any:
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
        if isinstance(current, OSError) and "AWS Error" in str(current):
            return storage_error(OSError(_said(current)))
        failures = getattr(current, "worker_failures", None) or {}
        queue += [current.__cause__, getattr(current, "cause", None), *failures.values()]
    return None


def _said(error: BaseException) -> str:
    """What an error that Ray wrapped said itself, without the traceback."""
    return next(line for line in reversed(str(error).splitlines()) if "AWS Error" in line)


def worker_environment(config: RunConfig, use_gpu: bool) -> dict[str, str]:
    """Threads must be set before torch loads: cores are shared by the workers of a machine."""
    cores = len(os.sched_getaffinity(0))
    threads = config.threads or (4 if use_gpu else max(1, cores // config.max_workers))
    return {
        **OPENMP,
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


def worker_device() -> torch.device:
    """The device that Ray Train gave this worker."""
    return ray.train.torch.get_device()


def quiet() -> None:
    """Keeps a worker's libraries from writing bars and notices into the driver's terminal."""
    models.quiet()
    logging.getLogger("ray.data").setLevel(logging.ERROR)
