"""Feeds one worker by Ray Data: windows of rows, read ahead in tasks, in exactly the given order.

Ray Data has no seekable position and its splits give no order, so the order does not come from
it. A Ray dataset is a list of windows to come. Each task reads one window of this worker's rows
(`data.rows.Window`, which holds no more than that), and `preserve_order` keeps them in sequence.

A Ray dataset here is `prefetch` windows long, and is read whole while the one before it is
consumed. One endless execution would be simpler, but Ray Data 2.60 polls without a pause while
its consumer holds it back: half a core a worker, taken from training.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice

import numpy as np
import pyarrow as pa
import ray
import torch

from renee_ray.config.schema import RunConfig
from renee_ray.data.dataset import Dataset
from renee_ray.data.order import OTHER_TEXTS, Order, scoring_order, training_order
from renee_ray.data.rows import BATCH, Window
from renee_ray.data.targets import Targets
from renee_ray.model.encoder import Encoder
from renee_ray.rank.batch import Batch, Position, cut_batches
from renee_ray.rank.collectives import Ranks
from renee_ray.rank.threads import one_ahead
from renee_ray.scoring.neighbours import Neighbours
from renee_ray.service.cluster.ray_compat import in_local_ray, without_actors

log = logging.getLogger(__name__)

READ_CPUS = 0.25
"""CPUs of a reading task: several share the one that the workers leave free, and wait for storage.
In a local Ray each has one to itself: a process more would take 1.7 s of CPU to start."""


def training_orders(config: RunConfig, dataset: Dataset) -> list[Order]:
    """Returns the order of every epoch of a run."""
    manifest = dataset.manifest
    # A point whose filter labels are positives teaches the texts of these labels already.
    others = config.feed.filter_labels == "positive"
    texts = manifest.other_texts if others else [part.rows for part in manifest.splits["labels"]]
    points = [part.rows for part in manifest.splits["train"]]
    return [
        training_order(
            points, list(texts) if manifest.has_label_texts else [], augment=config.feed.augment,
            texts=OTHER_TEXTS if others else "labels", seed=config.seed, epoch=epoch,
            batch_size=config.batch_size, streams=config.feed.streams, window=config.feed.window,
        )
        for epoch in range(config.epochs)
    ]  # fmt: skip


def scoring_feed(
    dataset: Dataset,
    split: str,
    batch_size: int,
    max_length: int,
    ranks: Ranks,
    first: int = 0,
    **options: int,
) -> Iterator[Batch]:
    """Returns this rank's rows of a split, once, from batch `first` on.

    options: those of `scoring_order`.
    """
    parts = [part.rows for part in dataset.manifest.splits[split]]
    order = scoring_order(split, parts, batch_size=batch_size, num_ranks=ranks.num_ranks, **options)
    return feed(
        dataset, [order], ranks.rank, ranks.num_ranks, start=Position(0, first),
        max_length=max_length, wait_s=ranks.wait_s,
    )  # fmt: skip


def feed(
    dataset: Dataset,
    orders: Sequence[Order],
    rank: int,
    num_ranks: int,
    *,
    start: Position,
    max_length: int,
    pad_multiple: int = 1,
    prefetch: int = 2,
    targets: Targets | None = None,
    wait_s: float = math.inf,
) -> Iterator[Batch]:
    """Returns this rank's rows of every batch from `start` to the end of the last epoch.

    Args:
        orders: one an epoch; `start.epoch` indexes them.
        targets: what a teacher predicts for the training points, which is read along with them.
        wait_s: seconds that data is waited for. A rank that hangs keeps the CPUs that it reads by.

    Raises:
        TimeoutError: while iterating, if no data has come for so long.
    """

    def on_wait(seconds: float) -> None:
        said = f"no data for {seconds:.0f} s: storage is slow or away, or no CPU is free to read"
        if seconds > wait_s:
            raise TimeoutError(said)
        log.warning("%s; waiting for it", said)

    windows = (
        Window.of(dataset, orders[epoch], orders[epoch].slots_of(rank, num_ranks), window, targets)
        for epoch in range(start.epoch, len(orders))
        for window in range(orders[epoch].num_windows)
        if epoch > start.epoch or (window + 1) * orders[epoch].window > start.batch
    )
    positions = (
        Position(epoch, batch)
        for epoch in range(start.epoch, len(orders))
        for batch in range(start.batch if epoch == start.epoch else 0, orders[epoch].num_batches)
    )
    groups = iter(lambda: list(islice(windows, prefetch)), [])
    read = (_tables(group, start) for group in groups)
    tables = chain.from_iterable(one_ahead(read, on_wait=on_wait))
    return cut_batches(tables, positions, dataset.manifest.pad_id, max_length, pad_multiple)


def reading(
    windows: Sequence[Window], start: Position
) -> Callable[[dict[str, np.ndarray]], Iterator[pa.Table]]:
    """Returns what a task runs on numbers of windows; the closure is all that a task carries."""
    # As numbers: a task that unpickled a Position would import torch for it, for two seconds.
    start_epoch, start_batch = start.epoch, start.batch

    def read(ids: dict[str, np.ndarray]) -> Iterator[pa.Table]:
        for index in ids["id"]:
            table, epoch = windows[index].read(), windows[index].order.epoch
            if epoch == start_epoch:
                first = int(np.searchsorted(table[BATCH].to_numpy(), start_batch))
                table = table.slice(first)
            yield table.append_column("epoch", pa.array(np.full(len(table), epoch)))

    return read


def _tables(windows: Sequence[Window], start: Position) -> list[pa.Table]:
    without_actors()
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    # Ray Data's own error would not carry what was raised out of another process.
    context.raise_original_map_exception = True
    # `ray.data.range` would need a task more for each window, which waits for a whole CPU.
    ids = ray.data.from_arrow([pa.table({"id": [index]}) for index in range(len(windows))])
    cpus = 1 if in_local_ray() else READ_CPUS
    rows = ids.map_batches(reading(windows, start), batch_size=None, num_cpus=cpus)
    return list(rows.iter_batches(batch_size=None, batch_format="pyarrow"))


def embed_voters(
    config: RunConfig,
    voters: Dataset,
    encoder: Encoder,
    ranks: Ranks,
    device: torch.device,
    follow: Callable[[Iterator[Batch]], Iterator[Batch]] = lambda batches: batches,
) -> Neighbours:
    """Embeds the training points of `voters`; a collective of all ranks.

    follow: passes the batches on, and notes what this rank is doing meanwhile.
    """
    settings, length = config.evaluation, config.encoder.max_length
    points = follow(scoring_feed(voters, "train", settings.batch_size, length, ranks))
    count, weight = settings.neighbours, settings.neighbour_weight
    return Neighbours.embed(encoder, points, ranks, device, count, weight)
