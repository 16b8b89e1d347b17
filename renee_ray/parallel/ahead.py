"""Items that a thread makes, one ahead of their consumer.

A step waits for the GPU in its middle, which must not be idle while the next batch is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from itertools import islice
from typing import TypeVar

from renee_ray.parallel.threads import in_thread

T = TypeVar("T")

PATIENT_S = 15
"""Seconds that a worker waits for data before it says so."""


def one_ahead(
    items: Iterator[T], count: int | None = None, on_wait: Callable[[], None] = lambda: None
) -> Iterator[T]:
    """Yields `count` items, or all, each of which is made while the one before it is used.

    on_wait: is called each time that an item has not come for PATIENT_S.

    Raises:
        Exception: what `items` raises, in place of the item.
    """
    ended = object()
    source = islice(items, count)

    def make() -> Future[T | object]:
        # In a daemon: the last item may never come, and the process ends all the same.
        return in_thread(lambda: next(source, ended), "ahead")

    pending = make()
    while True:
        while not wait([pending], timeout=PATIENT_S).done:
            on_wait()
        if (item := pending.result()) is ended:
            return
        pending = make()
        yield item  # type: ignore[misc]  # not `ended`
