"""Ray Data feeding one worker: windows of rows, read ahead in tasks, in exactly the given order.

Ray Data has no seekable position and its splits give no order, so the order is not asked of
it: a Ray dataset is a list of windows to come, each task reads one window of this worker's
rows (`data.rows.Window`, which holds no more than that), and `preserve_order` keeps them in
sequence.

A Ray dataset here is `prefetch` windows long and read whole while the ones before it are
consumed. One endless execution would be simpler, but Ray Data 2.60 polls without a pause as
long as its consumer holds it back: half a core a worker, taken from training.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from itertools import islice
from typing import overload

import numpy as np
import pyarrow as pa
import ray

from renee_ray.data.dataset import Dataset
from renee_ray.data.order import Order
from renee_ray.data.rows import BATCH, Window
from renee_ray.parallel.batch import Batch, Position, cut_batches
from renee_ray.service.observe.metric import count_retries

log = logging.getLogger(__name__)

PATIENT_S = 15
"""Seconds for which a worker waits for data without saying so."""
READ_CPUS = 0.25
"""CPUs of a reading task: several share the one that the workers leave free."""


class Epochs(Sequence[Order]):
    """The order of each epoch, made when it is asked for; the last two are kept.

    An order names every part of the dataset, so those of all epochs would fill the memory.
    """

    def __init__(self, make: Callable[[int], Order], count: int) -> None:
        self._made, self._count = lru_cache(2)(make), count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, epoch: int) -> Order: ...
    @overload
    def __getitem__(self, epoch: slice) -> list[Order]: ...
    def __getitem__(self, epoch: int | slice) -> Order | list[Order]:
        if isinstance(epoch, slice):
            return [self._made(each) for each in range(self._count)[epoch]]
        return self._made(range(self._count)[epoch])


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
        orders: one an epoch, e.g. `Epochs`; `start.epoch` indexes it.
        run: by whose name retries of storage are counted; empty: they are not.
    """
    windows = (
        Window.of(dataset, orders[epoch], orders[epoch].slots_of(rank, num_ranks), window)
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
    tables = _read_ahead(lambda group: _tables(group, start, run, rank), groups)
    return cut_batches(tables, positions, dataset.manifest.pad_id, max_length, pad_multiple)


def _read_ahead(
    read: Callable[[Sequence[Window]], list[pa.Table]], groups: Iterable[Sequence[Window]]
) -> Iterator[pa.Table]:
    """Tables of all groups in order; one group is read while the one before it is consumed."""
    with ThreadPoolExecutor(1, "feed") as executor:
        source = iter(groups)

        def following() -> list[pa.Table] | None:
            group = next(source, None)
            return None if group is None else read(group)

        pending = executor.submit(following)
        while True:
            if pending not in wait([pending], timeout=PATIENT_S).done:
                log.warning(
                    "no data for %d s: storage is slow or away, or no CPU of the cluster is free "
                    "to read; waiting for it", PATIENT_S,
                )  # fmt: skip
            tables = pending.result()
            if tables is None:
                return
            pending = executor.submit(following)
            yield from tables


def reading(
    windows: Sequence[Window], start: Position, run: str, rank: int
) -> Callable[[dict[str, np.ndarray]], Iterator[pa.Table]]:
    """What a task runs: it is given numbers of windows. All that a task carries is in it."""
    # As numbers: a task that unpickled a Position would import torch for it, for two seconds.
    start_epoch, start_batch = start.epoch, start.batch

    def read(ids: dict[str, np.ndarray]) -> Iterator[pa.Table]:
        if run:
            count_retries(run, rank)
        for index in ids["id"]:
            table, epoch = windows[index].read(), windows[index].order.epoch
            if epoch == start_epoch:
                first = int(np.searchsorted(table[BATCH].to_numpy(), start_batch))
                table = table.slice(first)
            yield table.append_column("epoch", pa.array(np.full(len(table), epoch)))

    return read


def _tables(windows: Sequence[Window], start: Position, run: str, rank: int) -> list[pa.Table]:
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    # Wrapped in Ray Data's own, what was raised does not come with it from another process.
    context.raise_original_map_exception = True
    rows = ray.data.range(len(windows), override_num_blocks=len(windows)).map_batches(
        reading(windows, start, run, rank), batch_size=None, num_cpus=READ_CPUS
    )
    return list(rows.iter_batches(batch_size=None, batch_format="pyarrow"))
