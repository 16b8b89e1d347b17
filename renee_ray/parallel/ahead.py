"""Items that a thread makes, one ahead of their consumer.

A step waits for the GPU in its middle, which must not be idle while the next batch is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from itertools import islice
from typing import TypeVar

from renee_ray.parallel.threads import in_thread

T = TypeVar("T")


def one_ahead(items: Iterator[T], count: int) -> Iterator[T]:
    """Yields `count` items, each of which is made while the one before it is used.

    Raises:
        Exception: what `items` raises, in place of the item.
    """
    ended = object()
    source = islice(items, count)

    def make() -> Future[T | object]:
        # In a daemon: the last item may never come, and the process ends all the same.
        return in_thread(lambda: next(source, ended), "ahead")

    pending = make()
    while (item := pending.result()) is not ended:
        pending = make()
        yield item  # type: ignore[misc]  # not `ended`
