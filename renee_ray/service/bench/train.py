"""`renee-ray bench train`: a whole run through Ray beside the same steps without it.

    full    what `renee-ray train` runs: Ray Train workers fed by Ray Data, token dropout, sampled
            losses, progress, and checkpoints where `checkpoint.every_steps` puts them
    bare    `benchmarks.bare`: as many processes with as many threads, the same batches in memory

Both begin with the same weights (N(0, init_std): the first weights do not matter to the time of a
step, and those from label texts cost a pass over all points) and train the same batches in the
same order; `weights_apart` compares what they come to.

They are timed in turns, bare full bare full, and Ray is stopped while bare runs, so that its
processes and reading tasks do not slow both. Ray Data reads `feed.prefetch` windows of
`feed.window` batches in one go, so a block is a whole number of these groups.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import ray
import torch

from renee_ray.benchmarks.bare import Clock, Job, time_bare_steps, weight_norms
from renee_ray.config.overrides import make_config
from renee_ray.config.schema import RunConfig
from renee_ray.data.dataset import Dataset
from renee_ray.errors import ReneeError
from renee_ray.plan.devices import usable_gpus
from renee_ray.rank.recorder import GPU_MEMORY, gpu_memory
from renee_ray.service.bench.processes import run_processes
from renee_ray.service.cluster.connect import ensure_ray
from renee_ray.service.cluster.feed import training_orders
from renee_ray.service.cluster.launch import launch
from renee_ray.service.observe.progress import Display
from renee_ray.service.train.train import check
from renee_ray.service.train.worker import prepared

WARMUP = 10
"""Untimed steps: pages and buffers are new, and Ray Data reads the second group meanwhile."""


def bench_train(
    recipe: dict[str, Any],
    overrides: dict[str, Any],
    steps: int,
    repeats: int,
    on_progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Times `repeats` blocks of at least `steps` steps of each, and returns medians.

    Args:
        recipe, overrides: a RunConfig without `output`: a run leaves nothing behind.

    Returns:
        rows_per_second, bare_rows_per_second and ratio_to_bare, their quotient; ratios, of each
        round; weights_apart, the largest relative difference of the two models' norms after a
        round; padding, share of the cells of token matrices; of a step, in seconds: feed_wait_s
        of the full run, classifier_s and the rest of the bare step, encoder_s, and its phases
        (on a GPU times of the device); matmul_share, what the bare matmuls of the encoder's linear
        layers take for the step's tokens, padding left out, as a share of encoder_s; idle_share of
        a GPU in a bare step, which `profiled` explains; `gpu_memory` of the full run; checkpoint_s,
        of one checkpoint, of which a run writes one an evaluation; and what was timed: steps of a
        block, repeats, batch_size, workers, threads, precision, labels.

    Raises:
        ReneeError: a cluster is set, `output` is given, or the dataset has too few steps.
    """
    job = _job(recipe, overrides, steps)
    full, bare = [], []
    for number in range(1, repeats + 1):
        on_progress(f"round {number} of {repeats}: {job.total} steps without Ray, then with it")
        bare.append(run_processes(partial(time_bare_steps, job=job), job.config, job.use_gpu))
        full.append(_run_full(job))
    return _figures(job, full, bare)


def _job(recipe: dict[str, Any], overrides: dict[str, Any], steps: int) -> Job:
    if os.environ.get("RAY_ADDRESS"):
        raise ReneeError("bench train starts and stops Ray on this machine; unset RAY_ADDRESS")
    if "output" in overrides:
        raise ReneeError("bench train leaves no run behind; leave out output")
    fixed = {"output": "unused", "average": 0, "classifier": {"init": "normal"}}
    config = make_config(RunConfig, recipe, overrides, fixed, where="bench train")
    if not config.encoder.trains_transformer or config.feed.targets:
        raise ReneeError(
            "bench train times a transformer that is trained on given labels; leave out "
            "encoder.frozen, encoder.lora, encoder.name=none and feed.targets"
        )
    dataset = Dataset.open(config.data)
    config = config.model_copy(update={"data": dataset.path})
    check(config, dataset)
    group = config.feed.window * config.feed.prefetch
    epochs = tuple(training_orders(config, dataset))
    use_gpu = config.use_gpu != "no" and usable_gpus() >= config.max_workers
    multiple = 8 if config.encoder.compile else 1
    job = Job(config, dataset, epochs, WARMUP, -(-steps // group) * group, multiple, use_gpu)
    have = sum(order.num_batches for order in epochs)
    if job.total > have:
        raise ReneeError(
            f"a block takes {job.total} steps (--steps, in multiples of feed.window times "
            f"feed.prefetch = {group}) and {config.epochs} epochs have {have}; raise epochs or "
            f"lower feed.prefetch"
        )
    return job


def _run_full(job: Job) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="renee-ray-bench-") as output:
        config = job.config.model_copy(update={"output": f"{output}/run"})
        ensure_ray(config.max_workers + 1)
        try:
            with Display() as display:
                arguments = {
                    "config": config.model_dump(),
                    "manifest_hash": job.dataset.manifest.hash,
                    "channel": display.channel,
                    "launched_s": 0.0,
                    "start": "",
                    "job": job,
                }
                found: dict[str, Any] = launch(full_worker, arguments, config, job.use_gpu)
                return found
        finally:
            ray.shutdown()


def full_worker(arguments: dict[str, Any]) -> dict[str, Any]:
    """Does what `train_worker` does for `job.total` steps, timed, as one worker."""
    job: Job = arguments["job"]
    with prepared(arguments) as (trainer, batches, _, writer):
        trainer.schedule, trainer.validation = job.schedule, None  # a validation is no step
        save, taken = trainer.on_checkpoint, []

        def timed_save(metrics: dict[str, float]) -> None:
            start = time.perf_counter()
            save(metrics)
            taken.append(time.perf_counter() - start)

        trainer.on_checkpoint = timed_save
        clock = Clock(batches)
        trainer.run(clock)
        writer.wait()
    block = (job.warmup, job.warmup + job.steps)
    return {
        "seconds": clock.seconds(*block),
        "feed_wait": clock.waited(*block),
        "checkpoint": median(taken),
        "threads": torch.get_num_threads(),
        **gpu_memory(trainer.device),
        "weights": weight_norms(trainer.model, trainer.ranks),
    }


def _figures(job: Job, full: list[dict[str, Any]], bare: list[dict[str, Any]]) -> dict[str, Any]:
    first, steps = bare[0], job.steps
    rates = [[first["rows"] / each["seconds"] for each in runs] for runs in (full, bare)]
    step_s = median(each["seconds"] for each in bare) / steps
    phases = {
        name: median(each["phases"][name] for each in bare) / steps
        for name, seconds in first["phases"].items()
        if seconds
    }
    return {
        "rows_per_second": median(rates[0]),
        "bare_rows_per_second": median(rates[1]),
        "ratio_to_bare": median(rates[0]) / median(rates[1]),
        "ratios": [ours / theirs for ours, theirs in zip(*rates, strict=True)],
        "weights_apart": max(
            abs(a / b - 1)
            for f, g in zip(full, bare, strict=True)
            for a, b in zip(f["weights"], g["weights"], strict=True)
        ),
        "padding": 1 - first["tokens"] / first["cells"],
        "encoder_s": step_s - phases["classifier"],
        "matmul_share": median(each["matmul_s"] for each in bare) / (step_s - phases["classifier"]),
        "classifier_s": phases["classifier"],
        "phases": phases,
        "idle_share": 1 - first["busy_s"] / step_s if job.use_gpu else None,
        **{name: first[name] for name in ("busy_s", "kernels", "launches", "waits")},
        "feed_wait_s": median(each["feed_wait"] for each in full) / steps,
        "checkpoint_s": median(each["checkpoint"] for each in full),
        "steps": steps,
        "repeats": len(full),
        "batch_size": job.config.batch_size,
        "workers": job.config.max_workers,
        "threads": full[0]["threads"],
        "bare_threads": first["threads"],
        "precision": first["precision"],
        "labels": job.dataset.manifest.num_labels,
        **{name: full[-1][name] for name in GPU_MEMORY},
    }
