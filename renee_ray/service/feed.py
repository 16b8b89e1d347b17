"""Ray Data feeding one worker: windows of rows, read ahead in tasks, in exactly the given order.

Ray Data has no seekable position and its splits give no order, so the order is not asked of
it: the Ray dataset is the list of windows still to come, each task reads one window of this
worker's streams with `data.rows.read_window`, and `preserve_order` keeps them in sequence.
One execution spans all remaining epochs, so no epoch waits for a pipeline to start.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import ray

from renee_ray.data.dataset import Dataset
from renee_ray.data.order import Order
from renee_ray.data.rows import BATCH, read_window
from renee_ray.training.batch import Batch, Position, cut_batches

READ_CPUS = 0.25
"""CPUs of a reading task: several share the one that the workers leave free."""


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
) -> Iterator[Batch]:
    """This rank's rows of every batch from `start` to the end of the last epoch.

    Args:
        orders: one an epoch; `start.epoch` indexes it.
    """
    windows = [
        (epoch, window)
        for epoch in range(start.epoch, len(orders))
        for window in range(orders[epoch].num_windows)
        if epoch > start.epoch or (window + 1) * orders[epoch].window > start.batch
    ]
    if not windows:
        return iter(())
    positions = (
        Position(epoch, batch)
        for epoch in range(start.epoch, len(orders))
        for batch in range(start.batch if epoch == start.epoch else 0, orders[epoch].num_batches)
    )
    tables = _tables(dataset, orders, windows, rank, num_ranks, start, prefetch)
    return cut_batches(tables, positions, dataset.manifest.pad_id, max_length, pad_multiple)


def _tables(
    dataset: Dataset,
    orders: Sequence[Order],
    windows: list[tuple[int, int]],
    rank: int,
    num_ranks: int,
    start: Position,
    prefetch: int,
) -> Iterator[pa.Table]:
    shared = ray.put((dataset, list(orders), windows))

    def read(ids: dict[str, np.ndarray]) -> Iterator[pa.Table]:
        source, epochs, todo = ray.get(shared)
        for index in ids["id"]:
            epoch, window = todo[index]
            order = epochs[epoch]
            table = read_window(source, order, order.streams_of(rank, num_ranks), window)
            if epoch == start.epoch:
                first = int(np.searchsorted(table[BATCH].to_numpy(), start.batch))
                table = table.slice(first)
            yield table.append_column("epoch", pa.array(np.full(len(table), epoch)))

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    rows = ray.data.range(len(windows), override_num_blocks=len(windows)).map_batches(
        read, batch_size=None, num_cpus=READ_CPUS, concurrency=1
    )
    return iter(
        rows.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=prefetch)
    )
