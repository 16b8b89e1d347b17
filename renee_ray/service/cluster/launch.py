"""Runs a worker function as a Ray Train job, and prepares every such worker's process."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from typing import Any

import ray
import ray.train
import torch
from ray.train import FailureConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.config import LoggingConfig

from renee_ray.config.schema import RunConfig
from renee_ray.data import models
from renee_ray.errors import LeaseLost, ReneeError
from renee_ray.machine import OPENMP
from renee_ray.rank.threads import in_thread, use_threads
from renee_ray.service.cluster.connect import node_name, started_here
from renee_ray.service.cluster.policies import (
    Elastic,
    Failures,
    Fixed,
    is_final,
    places_for,
    user_error,
    workers_beside_reading,
)
from renee_ray.service.cluster.preemption import CheckpointBeforeResize, SignalHandler
from renee_ray.service.cluster.ray_compat import (
    ControllerHere,
    DatasetsCallback,
    PlacementGroupCleanerCallback,
    node_cpus,
)
from renee_ray.signals import at_signals, of_command

log = logging.getLogger(__name__)

GPU_THREADS = 4
"""Most threads of a worker that has a GPU."""
NICENESS = int(os.environ.get("RAY_worker_niceness", "15"))  # noqa: SIM112
"""Niceness of Ray's workers, as Ray sets it: beside other work it decides who gets the cores."""


def launch(
    function: Callable[[dict[str, Any]], Any],
    arguments: dict[str, Any],
    config: RunConfig,
    use_gpu: bool,
    *,
    on_stop: Callable[[], bool] | None = None,
    check: Callable[[], None] = lambda: None,
    stopping: Callable[[], bool] = lambda: False,
) -> Any:
    """Runs a worker function as a TorchTrainer; returns what rank 0 returned.

    Args:
        on_stop: asks the workers to end, at the first SIGTERM or SIGINT, and returns whether they
            have anything to save. None: they are ended at once.
        check: is called several times a second; what it raises is raised.
        stopping: is asked as often whether the run shall end, as at a signal.

    Raises:
        ReneeError: the cluster's nodes cannot hold the workers as they are to be placed.
    """
    check_placement(config, use_gpu, ray.nodes())
    _tell_of_idle_gpus(config)
    grace_s = config.checkpoint.grace_s
    # Checkpoints are our own business, so Ray Train has nothing to keep.
    with tempfile.TemporaryDirectory(prefix="renee-ray-", ignore_cleanup_errors=True) as scratch:
        trainer = _Trainer(
            _worker(function, config, use_gpu),
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
                # Its notices would be on the terminal; for a controller here, see ControllerHere.
                logging_config=LoggingConfig(log_level="CRITICAL"),
                callbacks=[SignalHandler(grace_s), CheckpointBeforeResize(grace_s)],
                worker_runtime_env={"env_vars": worker_environment()},
            ),
        )
        with _ending(trainer):
            return interruptible(trainer.fit, on_stop, grace_s, check, stopping).return_value


@contextlib.contextmanager
def _ending(trainer: _Trainer) -> Iterator[None]:
    """Ends the workers where the command ends early, and raises a user's error as itself."""
    try:
        yield
    except KeyboardInterrupt:
        if not of_command():  # a notebook goes on, and its workers must not
            trainer.here.cancel()
            ray.shutdown()
        raise
    except LeaseLost:  # raised by `check`, in this process, and followed by Ray's shutdown
        trainer.here.cancel()
        raise
    except Exception as error:
        found = user_error(error)
        if found is None or found is error:
            raise
        raise found from error


def _worker(
    function: Callable[[dict[str, Any]], Any], config: RunConfig, use_gpu: bool
) -> Callable[[dict[str, Any]], Any]:
    """Wraps `function` with what each worker needs around it.

    The worker gets its share of the node's cores. A user's error is raised as itself, since its
    cause does not travel, and on a cluster it names the node.
    """

    def work(arguments: dict[str, Any]) -> Any:
        sharing = ray.train.get_context().get_local_world_size()
        use_threads(threads_of(config, use_gpu, sharing))
        try:
            return function(arguments)
        except Exception as error:
            if not is_final(error):
                raise
            several = sum(node["Alive"] for node in ray.nodes()) > 1
            raise ReneeError(
                f"{user_error(error)}{f' (on node {node_name()})' if several else ''}"
            ) from error

    return work


class _Trainer(TorchTrainer):
    """A TorchTrainer with our policies, and without actors that do nothing for it.

    An idle process of Ray's polls, and takes 0.2 GB. The controller's own takes 3.4 s of CPU to
    start, before the workers can, so a local one is `here`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.here = ControllerHere()

    def _initialize_and_run_controller(self, **of_controller: Any) -> Any:
        # Workers read for themselves (feed.py), so the trainer is given no datasets.
        unused: tuple[type, ...] = (DatasetsCallback,)
        if started_here():  # what a controller leaves behind ends with this process
            unused += (PlacementGroupCleanerCallback,)
        callbacks = [each for each in of_controller["callbacks"] if not isinstance(each, unused)]
        run: Any = self.run_config
        scaling: Any = self.scaling_config
        failures = Failures(run.failure_config)
        of_controller |= {"callbacks": callbacks, "failure_policy": failures}
        if scaling.elasticity_enabled:
            of_controller["scaling_policy"] = Elastic(scaling)
        elif started_here():
            of_controller["scaling_policy"] = Fixed(scaling)
        if started_here():
            return self.here.run(of_controller)
        return super()._initialize_and_run_controller(**of_controller)  # type: ignore[misc]


def placement(config: RunConfig, use_gpu: bool) -> dict[str, Any]:
    """Returns what each worker reserves and where it runs, as arguments of ScalingConfig."""
    cpus = config.cpus_per_worker or (0 if use_gpu else 1)
    return {
        "resources_per_worker": {"GPU": int(use_gpu), "CPU": cpus},
        "placement_strategy": config.placement_strategy,
        "accelerator_type": config.accelerator_type or None,
    }


def check_placement(config: RunConfig, use_gpu: bool, nodes: list[dict[str, Any]]) -> None:
    """Refuses workers that could never be placed, for which Ray would wait silently.

    Args:
        nodes: as `ray.nodes()` returns them.

    Raises:
        ReneeError: the nodes that are up have too few places.
    """
    kind = f"accelerator_type:{config.accelerator_type}" if config.accelerator_type else None
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    able = [resources for resources in alive if kind is None or kind in resources]
    needs = placement(config, use_gpu)["resources_per_worker"]
    cpus = sum(resources.get("CPU", 0) for resources in alive)
    beside = workers_beside_reading(cpus, needs["CPU"])
    if beside < config.min_workers:
        raise ReneeError(
            f"num_workers={config.min_workers} with {needs['CPU']} CPU each leave none of the Ray "
            f"cluster's {cpus:.0f} to read data with; add a node, or lower num_workers or "
            f"cpus_per_worker"
        )
    places = places_for(able, needs, config.placement_strategy)
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


def _tell_of_idle_gpus(config: RunConfig) -> None:
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if config.use_gpu == "auto" and 0 < gpus < config.min_workers:
        log.warning(
            "the GPUs, %d, are too few for %d workers, which run on CPUs; num_workers=%d uses them",
            gpus, config.min_workers, gpus,
        )  # fmt: skip


def interruptible(
    fit: Callable[[], Any],
    on_stop: Callable[[], bool] | None,
    grace_s: float,
    check: Callable[[], None] = lambda: None,
    stopping: Callable[[], bool] = lambda: False,
) -> Any:
    """Calls `fit`, which waits for workers; a first signal asks them to end with a checkpoint.

    A second signal, or `grace_s` seconds without an end, interrupts at once. So does the first
    without `on_stop`, or where it says that there is nothing to save.

    Raises:
        KeyboardInterrupt: interrupted at once.
    """
    in_main = threading.current_thread() is threading.main_thread()
    signals: list[int] = []
    limit = math.inf
    take = at_signals(lambda number, frame: signals.append(number))
    with take if in_main else contextlib.nullcontext():
        # In a thread, where Ray Train leaves the signals alone.
        found = in_thread(fit, "fit")
        while not wait([found], timeout=0.2).done:
            check()
            if (signals or stopping()) and limit == math.inf:
                limit = time.monotonic() + (grace_s if on_stop and on_stop() else 0)
            if len(signals) > 1 or time.monotonic() > limit:
                break
        else:
            return found.result()
    if signals:
        signal.raise_signal(signal.SIGINT)  # now as if it came first: signals.py sees to the end
    raise KeyboardInterrupt


def threads_of(config: RunConfig, use_gpu: bool, sharing: int) -> int:
    """Returns the threads of one of `sharing` workers on this node, whose cores they divide."""
    # Both limits matter: the cores that this process may use, and those of its container.
    cores = min(len(os.sched_getaffinity(0)), int(node_cpus(True)))
    each = max(1, cores // sharing)
    return config.threads or (min(each, GPU_THREADS) if use_gpu else each)


def worker_environment(threads: int = 1) -> dict[str, str]:
    """Returns the environment variables that a worker's libraries read when they load.

    threads: holds until `use_threads`, since only a worker knows the cores of its node.
    """
    return {
        **OPENMP,
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "MALLOC_ARENA_MAX": "1",  # glibc hardly reuses what threads other than the main one free
        # Every batch has shapes of its own: oneDNN would keep a kernel for each of the last 1,024.
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        # Tasks that read inherit it. Else each group of windows would leave a log file of its own.
        "RAY_DATA_LOG_LEVEL": "ERROR",
    }


def decide_gpu(choice: str, num_workers: int) -> bool:
    """Decides whether each worker gets a GPU.

    Raises:
        ReneeError: GPUs are demanded and the cluster has too few.
    """
    have = ray.cluster_resources().get("GPU", 0)
    if have and choice != "no" and started_here() and not torch.cuda.is_available():
        sentence = (
            f"torch {torch.__version__} cannot use the GPUs of this machine; install a build that "
            f"fits their driver"
        )
        if choice == "yes":
            raise ReneeError(f"use_gpu=yes: {sentence}, or set use_gpu=no")
        log.warning(sentence)
        have = 0
    if choice == "yes" and have < num_workers:
        raise ReneeError(
            f"use_gpu=yes needs {num_workers} GPUs and the Ray cluster has {have:.0f}; "
            f"lower num_workers or set use_gpu=no"
        )
    return choice != "no" and have >= num_workers


def worker_device() -> torch.device:
    """Returns the device that Ray Train gave this worker."""
    return ray.train.torch.get_device()


def quiet() -> None:
    """Keeps a worker's libraries from writing bars and notices into the driver's terminal."""
    models.quiet()
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what fails is raised besides
