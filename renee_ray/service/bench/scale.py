"""`renee-ray bench scale`: the classifier's step on R Ray Train workers, at any number of labels.

A planted problem without an encoder: B points with fixed embeddings, whose first component is
the same for all, and a few labels each. Every step sees all of them. Each rank owns B / R rows
and L / R labels, so the same bytes cross the ranks as in training.

For a speed-up rank 0 also holds all labels, and steps on them alone while the others wait, in
turns with the steps of all. Where Ray was started for this, the same is then measured in processes
without it, since Ray's idle processes slow the steps of all more than those of one worker.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import psutil
import ray
import torch
from torch import Tensor

from renee_ray.benchmarks.problem import Problem, make_problem
from renee_ray.config.overrides import make_config
from renee_ray.config.schema import RunConfig
from renee_ray.errors import ReneeError
from renee_ray.rank.collectives import Ranks, all_sum, gather_rows, route, scatter_rows
from renee_ray.service.bench.processes import run_processes
from renee_ray.service.cluster.connect import ensure_ray, started_here
from renee_ray.service.cluster.launch import decide_gpu, launch, worker_device
from renee_ray.xfc.labels import LabelRange, split_range
from renee_ray.xfc.shard import Pairs, Shard
from renee_ray.xfc.weights.storages import SGD

LR = 0.01
TIMEOUT_S = 1800
"""A step of 10^8 labels takes minutes on a CPU, and ranks need not end theirs together."""
SAMPLE_S = 0.5
"""Seconds between two samples, each of which looks at every process of the machine."""


class ResidentPeak:
    """The highest resident memory while it is entered, sampled: `bytes` of all processes together.

    Pages that several processes share count once for each: the result is an upper bound.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> ResidentPeak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        own = psutil.Process()
        while not self._over.wait(SAMPLE_S):
            total = 0
            for process in (own, *own.children(recursive=True)):
                with contextlib.suppress(psutil.Error):  # it has ended
                    total += process.memory_info().rss
            self.bytes = max(self.bytes, total)


def bench_scale(workers: int, threads: int, **arguments: Any) -> dict[str, Any]:
    """Times steps without momentum; arguments: those of `time_steps`.

    Returns:
        step_s, the median of `steps`; with `speedup`, one_worker_step_s, the same of one worker,
        speedup, their quotient, and, unless RAY_ADDRESS is set, bare_step_s,
        bare_one_worker_step_s and bare_speedup, the same without Ray; seconds_per_million_labels;
        initialise_s, of the first weights; bytes_per_weight; peak_rss_gib, resident memory of
        this process and all below it together (Ray's own and every worker's), at its highest, or
        null if RAY_ADDRESS is set;
        loss_first and loss_last, the BCE of a point summed over labels; threads, of a worker.

    Raises:
        ReneeError: a speed-up of one worker, or the cluster has too few CPUs.
    """
    if arguments["speedup"] and workers == 1:
        raise ReneeError("--speedup compares with one worker; give more --workers")
    ensure_ray(1, local_cpus=workers + 1)
    config = make_config(
        RunConfig,
        {"data": "unused", "output": "unused", "num_workers": workers, "batch_size": 8 * workers},
        {"timeout_s": TIMEOUT_S, "threads": threads},
    )
    use_gpu = decide_gpu("auto", workers)
    with ResidentPeak() as peak:
        found = launch(scale_worker, arguments, config, use_gpu)
    # In a Ray that was joined, the workers' processes are not below this one.
    resident = peak.bytes / 2**30 if started_here() else None
    found |= {"peak_rss_gib": resident, "workers": workers}
    if arguments["speedup"] and started_here():
        ray.shutdown()
        bare = run_processes(partial(time_steps, **arguments), config, use_gpu)
        found |= {f"bare_{key}": bare[key] for key in ("step_s", "one_worker_step_s", "speedup")}
    return {**arguments, **found}


def scale_worker(arguments: dict[str, Any]) -> dict[str, Any]:
    """Times the steps as one worker."""
    return time_steps(Ranks.of_process_group(), worker_device(), **arguments)


def time_steps(
    ranks: Ranks,
    device: torch.device,
    labels: int,
    dim: int,
    batch: int,
    precision: str,
    steps: int,
    speedup: bool = False,
) -> dict[str, Any]:
    """Returns the figures of `bench_scale`, but for memory; one worker's on rank 0 alone."""
    problem = make_problem(labels, dim, batch, device)
    problem.embeddings.mul_(dim**-0.5)[:, 0] = 1
    start = time.perf_counter()
    owned = LabelRange.of_rank(labels, ranks.num_ranks, ranks.rank)
    shard = problem.shard(precision, 0, owned=owned)
    initialise_s = time.perf_counter() - start
    alone = Ranks()
    whole = problem.shard(precision, 0) if speedup and ranks.rank == 0 else None

    first = _step(ranks, shard, problem, 0, with_loss=True)
    if whole is not None:
        _step(alone, whole, problem, 0)
    seconds: list[float] = []
    seconds_alone: list[float] = []
    for step in range(1, steps + 1):
        if whole is not None:
            seconds_alone.append(_timed_step(alone, whole, problem, step))
        if speedup:
            all_sum(ranks, torch.zeros(()))  # the others wait without a step of their own
        seconds.append(_timed_step(ranks, shard, problem, step))
    last = _step(ranks, shard, problem, steps + 1, with_loss=True)
    taken, held = median(seconds), torch.tensor(shard.weights.nbytes())
    found = {
        "step_s": taken,
        "seconds_per_million_labels": taken / labels * 1e6,
        "precision": shard.weights.precision,
        "bytes_per_weight": int(all_sum(ranks, held)) / (labels * dim),
        "initialise_s": initialise_s,
        "loss_first": first,
        "loss_last": last,
        "threads": torch.get_num_threads(),
    }
    if whole is not None:
        found["one_worker_step_s"] = median(seconds_alone)
        found["speedup"] = median(seconds_alone) / taken
    return found


def _timed_step(ranks: Ranks, shard: Shard, problem: Problem, step: int) -> float:
    start = time.perf_counter()
    _step(ranks, shard, problem, step)
    return time.perf_counter() - start


def _step(
    ranks: Ranks, shard: Shard, problem: Problem, step: int, *, with_loss: bool = False
) -> float:
    """Makes a step, from own rows to the gradient of own rows; returns the loss of a point."""
    batch = len(problem.embeddings)
    bounds = [split_range(batch, ranks.num_ranks, rank) for rank in range(ranks.num_ranks)]
    counts = [stop - start for start, stop in bounds]
    start, stop = bounds[ranks.rank]
    mine = (problem.rows >= start) & (problem.rows < stop)
    rows, labels = route(ranks, problem.rows[mine], problem.labels[mine], problem.num_labels)
    everyone = gather_rows(ranks, problem.embeddings[start:stop], counts)
    positives = Pairs(rows, labels, shard.owned, everyone.device)
    pending: list[Callable[[], Tensor]] = []
    loss = shard.step(
        everyone,
        positives,
        replace(SGD(LR, momentum=0), step=step),
        with_loss=with_loss,
        on_gradient=lambda dE: pending.append(scatter_rows(ranks, dE, counts)),
    )
    gradient = pending[0]()
    # On a GPU this is what waits for the step to end.
    if not bool(torch.isfinite(gradient).all()):
        raise ReneeError(
            f"step {step} diverged: the gradient is not finite; give a smaller --batch"
        )
    return float(all_sum(ranks, loss.cpu())) / batch
