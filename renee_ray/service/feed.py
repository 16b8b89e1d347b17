"""Ray Data feeding one worker: windows of rows, read ahead in tasks, in exactly the given order.

Ray Data has no seekable position and its splits give no order, so the order is not asked of
it: a Ray dataset is a list of windows to come, each task reads one window of this worker's
rows with `data.rows.read_window`, and `preserve_order` keeps them in sequence.

A Ray dataset here is `prefetch` windows long and read whole while the ones before it are
consumed. One endless execution would be simpler, but Ray Data 2.60 polls without a pause as
long as its consumer holds it back: half a core a worker, taken from training.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import pyarrow as pa
import ray

from renee_ray.data.dataset import Dataset
from renee_ray.data.order import Order
from renee_ray.data.rows import BATCH, read_window
from renee_ray.service.metric import count_retries
from renee_ray.training.batch import Batch, Position, cut_batches

log = logging.getLogger(__name__)

PATIENT_S = 15
"""Seconds for which a worker waits for data without saying so."""
Window = tuple[int, int]
"""(epoch, number of the window in it)."""
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
    run: str = "",
) -> Iterator[Batch]:
    """This rank's rows of every batch from `start` to the end of the last epoch.

    Args:
        orders: one an epoch; `start.epoch` indexes it.
        run: by whose name retries of storage are counted; empty: they are not.
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
    tables = _read_ahead(
        lambda group: _tables(dataset, orders, group, rank, num_ranks, start, run),
        [tuple(windows[i : i + prefetch]) for i in range(0, len(windows), prefetch)],
    )
    return cut_batches(tables, positions, dataset.manifest.pad_id, max_length, pad_multiple)


def _read_ahead(
    read: Callable[[Sequence[Window]], list[pa.Table]], groups: list[tuple[Window, ...]]
) -> Iterator[pa.Table]:
    """Tables of all groups in order; one group is read while the one before it is consumed."""
    with ThreadPoolExecutor(1, "feed") as executor:
        pending = executor.submit(read, groups[0])
        for following in [*groups[1:], None]:
            if pending not in wait([pending], timeout=PATIENT_S).done:
                log.warning(
                    "no data for %d s: storage is slow or away, or no CPU of the cluster is free "
                    "to read; waiting for it", PATIENT_S,
                )  # fmt: skip
            tables = pending.result()
            if following is not None:
                pending = executor.submit(read, following)
            yield from tables


def _tables(
    dataset: Dataset,
    orders: Sequence[Order],
    windows: Sequence[Window],
    rank: int,
    num_ranks: int,
    start: Position,
    run: str,
) -> list[pa.Table]:
    epochs = {epoch: orders[epoch] for epoch, _ in windows}
    # As numbers: a task that unpickled a Position would import torch for it, for two seconds.
    start_epoch, start_batch = start.epoch, start.batch

    def read(ids: dict[str, np.ndarray]) -> Iterator[pa.Table]:
        if run:
            count_retries(run, rank)
        for index in ids["id"]:
            epoch, window = windows[index]
            order = epochs[epoch]
            table = read_window(dataset, order, order.slots_of(rank, num_ranks), window)
            if epoch == start_epoch:
                first = int(np.searchsorted(table[BATCH].to_numpy(), start_batch))
                table = table.slice(first)
            yield table.append_column("epoch", pa.array(np.full(len(table), epoch)))

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    # Wrapped in Ray Data's own, what was raised does not come with it from another process.
    context.raise_original_map_exception = True
    rows = ray.data.range(len(windows), override_num_blocks=len(windows)).map_batches(
        read, batch_size=None, num_cpus=READ_CPUS
    )
    return list(rows.iter_batches(batch_size=None, batch_format="pyarrow"))
