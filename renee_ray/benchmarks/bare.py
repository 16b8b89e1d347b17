"""Bare training steps: the reference that a whole run is measured against.

R processes of torch.distributed, without Ray, train the batches that a run of the same
configuration would train, held in memory before the first step: the rows that `data.order` gives
each position, their tokens dropped already. No loss, no progress, no checkpoint, no validation.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from renee_ray.benchmarks.problem import interleaved, wait_for
from renee_ray.config.schema import RunConfig
from renee_ray.data.dataset import Dataset
from renee_ray.data.order import Order
from renee_ray.data.rows import read_window
from renee_ray.model.encoder import Encoder
from renee_ray.model.model import Model, build_model
from renee_ray.rank.batch import Batch, Position, cut_batches
from renee_ray.rank.collectives import Ranks, all_sum
from renee_ray.rank.recorder import Recorder, gpu_memory
from renee_ray.training.loop import Trainer
from renee_ray.training.schedule import Schedule

PROFILED = 4
"""Steps after the timed ones, whose kernels are counted."""


@dataclass(frozen=True)
class Job:
    """`warmup` untimed steps, `steps` timed ones, and `PROFILED` more.

    orders: one an epoch; pad_multiple: as the run pads rows; use_gpu: rank r takes GPU r.
    """

    config: RunConfig
    dataset: Dataset
    orders: tuple[Order, ...]
    warmup: int
    steps: int
    pad_multiple: int
    use_gpu: bool

    @property
    def total(self) -> int:
        return self.warmup + self.steps + PROFILED

    @property
    def schedule(self) -> Schedule:
        """The schedule of `total` steps, in the batches of as many epochs as they reach into."""
        left, batches = self.total, []
        for order in self.orders:
            batches.append(min(left, order.num_batches))
            left -= batches[-1]
        return Schedule(tuple(n for n in batches if n), 0, self.config.checkpoint.every_steps)


class Clock(Iterator[Batch]):
    """Batches, with the times at which each was asked for and came."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches
        self.asked: list[float] = []
        self.came: list[float] = []

    def __next__(self) -> Batch:
        self.asked.append(time.perf_counter())
        batch = next(self._batches)
        self.came.append(time.perf_counter())
        return batch

    def seconds(self, first: int, stop: int) -> float:
        """Returns the seconds from asking for batch `first` to asking for batch `stop`."""
        return self.asked[stop] - self.asked[first]

    def waited(self, first: int, stop: int) -> float:
        """Returns the seconds spent waiting for batches [first, stop)."""
        pairs = zip(self.asked[first:stop], self.came[first:stop], strict=True)
        return sum(came - asked for asked, came in pairs)


def time_bare_steps(ranks: Ranks, device: torch.device, job: Job) -> dict[str, Any]:
    """Times the job's steps, on every rank.

    Returns:
        seconds of all timed steps, and by phase (on a GPU the device's, as recorder.py measures
        them); rows of the global batches; tokens, cells of the padded matrices, of all ranks;
        matmul_s, `linear_seconds` of a step's own tokens; threads; precision; weights, as
        `weight_norms` of the end; `gpu_memory`; `profiled`.
    """
    config = job.config.model_copy(update={"loss_every": 0})
    model = build_model(config, job.dataset.manifest.num_labels, ranks, device)
    model.shard.initialise_normal(config.classifier.init_std, config.seed)
    model.encoder.train()
    trainer = Trainer(
        config, model, ranks, device, job.schedule, None, lambda record: None,
        lambda metrics: None, recorder=Recorder(device),
    )  # fmt: skip
    batches = [trainer.prepared(batch) for batch in held_batches(job, ranks)]
    recorder = trainer.recorder

    clock, begun, ended = Clock(iter(batches)), recorder.totals(), recorder.totals()
    timed = slice(job.warmup, job.warmup + job.steps)
    on_gpu = device.type == "cuda"
    seen = profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu)
    for step, batch in enumerate(clock):
        if step == timed.stop:  # which the profile slows from here on
            seen.start()
        # Of a GPU's phases those are counted that it has passed, which lags alike in both.
        begun = recorder.totals() if step == timed.start else begun
        ended = recorder.totals() if step == timed.stop else ended
        recorder.enter("data", step + 1)
        trainer.train_on(batch)
    wait_for(device)
    seen.stop()

    counted = [getattr(ended, key) - getattr(begun, key) for key in ("rows", "tokens", "cells")]
    sums = torch.tensor(counted, dtype=torch.int64)
    matmuls = linear_seconds(model.encoder, int(sums[1]) // job.steps, device)
    rows, tokens, cells = all_sum(ranks, sums).tolist()
    return {
        "seconds": clock.seconds(timed.start, timed.stop),
        "phases": {name: ended.seconds[name] - begun.seconds[name] for name in begun.seconds},
        "rows": rows,
        "tokens": tokens,
        "cells": cells,
        "matmul_s": matmuls,
        "threads": torch.get_num_threads(),
        "precision": model.shard.weights.precision,
        "weights": weight_norms(model, ranks),
        **gpu_memory(device),
        **profiled(seen),
    }


def linear_seconds(encoder: Encoder, tokens: int, device: torch.device) -> float:
    """Times the bare matmuls of all linear layers for a number of tokens, in the encoder's dtype.

    Of each layer it is the forward and both of the backward; the attention's are left out.
    """
    dtype, n = encoder.autocast or torch.float32, max(1, tokens)
    layers = [each for each in encoder.modules() if isinstance(each, nn.Linear)]
    counts = Counter((each.out_features, each.in_features) for each in layers)

    def matmuls(outputs: int, inputs: int) -> Callable[[], object]:
        w, x = torch.randn(outputs, inputs).to(device, dtype), torch.randn(n, inputs)
        g, x = torch.randn(n, outputs).to(device, dtype), x.to(device, dtype)
        return lambda: (x @ w.T, g @ w, g.T @ x)

    taken = interleaved({str(shape): matmuls(*shape) for shape in counts}, 5, device)
    return sum(count * taken[str(shape)] for shape, count in counts.items())


def held_batches(job: Job, ranks: Ranks) -> list[Batch]:
    """Reads this rank's rows of the first `job.total` batches."""
    length, pad_id = job.config.encoder.max_length, job.dataset.manifest.pad_id
    positions = (
        Position(epoch, batch)
        for epoch, order in enumerate(job.orders)
        for batch in range(order.num_batches)
    )
    wanted = islice(positions, job.total)
    return list(cut_batches(_tables(job, ranks), wanted, pad_id, length, job.pad_multiple))


def _tables(job: Job, ranks: Ranks) -> Iterator[pa.Table]:
    for epoch, order in enumerate(job.orders):
        slots = order.slots_of(ranks.rank, ranks.num_ranks)
        for window in range(order.num_windows):
            table = read_window(job.dataset, order, slots, window)
            yield table.append_column("epoch", pa.array(np.full(len(table), epoch)))


def weight_norms(model: Model, ranks: Ranks) -> tuple[float, float]:
    """Returns the norms of the encoder's parameters and of all ranks' shards together."""
    encoder = sum(float(p.detach().double().square().sum()) for p in model.encoder.parameters())
    weights = model.shard.weights
    own = torch.zeros((), dtype=torch.float64)
    for start, stop in model.shard.chunks(1):
        own += weights.read(start, stop).double().square().sum().cpu()
    return float(np.sqrt(encoder)), float(all_sum(ranks, own).sqrt())


def profiled(seen: profile) -> dict[str, Any]:
    """Returns, of a profiled step: busy_s of the GPU; its longest kernels, in seconds; their
    number; calls that wait for it. On a CPU all is nothing.
    """
    events: Any = seen.key_averages()
    on_gpu = [each for each in events if each.device_type == DeviceType.CUDA]
    own = [each for each in on_gpu if not each.is_user_annotation]
    seconds = {each.key[:60]: each.self_device_time_total / 1e6 / PROFILED for each in own}
    return {
        "busy_s": sum(seconds.values()),
        "kernels": dict(sorted(seconds.items(), key=lambda each: -each[1])[:12]),
        "launches": sum(each.count for each in own) / PROFILED,
        "waits": {e.key: e.count / PROFILED for e in events if "Synchronize" in e.key},
    }
