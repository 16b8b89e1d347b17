"""Number of threads of a rank; calls in threads that its end does not wait for; items one ahead."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from itertools import islice
from typing import TypeVar

T = TypeVar("T")

PATIENT_S = 15
"""Seconds that a worker waits for data before it says so."""


def use_threads(threads: int) -> None:
    """Sets what OMP_NUM_THREADS sets, in a process whose libraries have read it already."""
    import pyarrow
    import torch  # a command that only submits needs neither

    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    pyarrow.set_cpu_count(threads)


def in_thread(call: Callable[[], T], name: str) -> Future[T]:
    """Starts `call` in a daemon thread, which does not keep the process alive."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def one_ahead(
    items: Iterator[T],
    count: int | None = None,
    on_wait: Callable[[float], None] = lambda seconds: None,
) -> Iterator[T]:
    """Yields `count` items, or all, each of which is made while the one before it is used.

    A step waits for the GPU in its middle, which must not be idle while the next batch is made.

    on_wait: is called each PATIENT_S, with the seconds that an item has not come for.

    Raises:
        Exception: what `items` raises, in place of the item, or `on_wait`.
    """
    ended = object()
    source = islice(items, count)

    def make() -> Future[T | object]:
        # In a daemon: the last item may never come, and the process ends all the same.
        return in_thread(lambda: next(source, ended), "ahead")

    pending = make()
    while True:
        began = time.monotonic()
        while not wait([pending], timeout=PATIENT_S).done:
            on_wait(time.monotonic() - began)
        if (item := pending.result()) is ended:
            return
        pending = make()
        yield item  # type: ignore[misc]  # not `ended`
