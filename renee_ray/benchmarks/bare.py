"""Bare training steps: the reference that a whole run is measured against.

R processes of torch.distributed, without Ray, train the batches that a run of the same
configuration would train, held in memory before the first step: the rows that `data.order` gives
each position, their tokens dropped already. No loss, no progress, no checkpoint, no validation.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from renee_ray.benchmarks.processes import run_processes
from renee_ray.config.schema import RunConfig
from renee_ray.data.dataset import Dataset
from renee_ray.data.order import Order
from renee_ray.data.rows import read_window
from renee_ray.model.model import Model, build_model
from renee_ray.parallel.batch import Batch, Position, cut_batches
from renee_ray.parallel.collectives import Ranks, all_sum
from renee_ray.training.loop import Trainer
from renee_ray.training.schedule import Schedule
from renee_ray.xfc.shard import Shard


@dataclass(frozen=True)
class Job:
    """`warmup` untimed steps, `steps` timed ones, and one that ends the last of them.

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
        return self.warmup + self.steps + 1

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


class ClockedShard(Shard):
    """A shard that notes the seconds of each of its steps."""

    seconds: list[float]

    @classmethod
    def of(cls, shard: Shard) -> ClockedShard:
        clocked = cls(shard.owned, shard.weights, shard.chunk, shard.operations)
        clocked.seconds = []
        return clocked

    def step(self, *arguments: Any, **options: Any) -> Tensor:
        start = time.perf_counter()
        loss = super().step(*arguments, **options)
        self.seconds.append(time.perf_counter() - start)
        return loss


def run_bare(job: Job, environment: dict[str, str], niceness: int) -> dict[str, Any]:
    """Runs `time_bare_steps` in processes of its own; returns what rank 0 returned."""
    config = job.config
    return run_processes(
        time_bare_steps, {"job": job}, config.max_workers, use_gpu=job.use_gpu,
        timeout_s=config.timeout_s, environment=environment, niceness=niceness,
    )  # fmt: skip


def time_bare_steps(ranks: Ranks, device: torch.device, job: Job) -> dict[str, Any]:
    """Times the job's steps, on every rank.

    Returns:
        seconds of all timed steps, and classifier_seconds of them on a CPU, else None (a GPU works
        behind the host's back); rows of the global batches; tokens, cells of the padded matrices,
        of all ranks; threads; precision; weights, as `weight_norms` of the end.
    """
    config = job.config.model_copy(update={"loss_every": 0})
    model = build_model(config, job.dataset.manifest.num_labels, ranks, device, training=True)
    shard = ClockedShard.of(model.shard)
    shard.initialise_normal(config.classifier.init_std, config.seed)
    model = replace(model, shard=shard)
    trainer = Trainer(
        config, model, ranks, device, job.schedule, None, lambda record: None, lambda metrics: None
    )  # fmt: skip
    batches = [trainer.prepared(batch) for batch in held_batches(job, ranks)]

    clock = Clock(iter(batches))
    for batch in clock:
        trainer.train_on(batch)

    timed = slice(job.warmup, job.warmup + job.steps)
    sums = torch.tensor(
        [(len(batch), *batch.padding(job.config.encoder.micro_batch)) for batch in batches[timed]]
    ).sum(0)
    rows, tokens, cells = all_sum(ranks, sums).tolist()
    return {
        "seconds": clock.seconds(timed.start, timed.stop),
        "classifier_seconds": sum(shard.seconds[timed]) if device.type == "cpu" else None,
        "rows": rows,
        "tokens": tokens,
        "cells": cells,
        "threads": torch.get_num_threads(),
        "precision": shard.weights.precision,
        "weights": weight_norms(model, ranks),
    }


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
