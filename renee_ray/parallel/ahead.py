"""Items made in a thread, one ahead of whoever uses them.

A step ends by waiting for the GPU, which must not then wait for the next batch to be made.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from itertools import islice
from typing import TypeVar

from renee_ray.parallel.threads import in_thread

T = TypeVar("T")


def one_ahead(items: Iterator[T], count: int) -> Iterator[T]:
    """The next `count` items, each asked for when the one before it is handed out.

    Raises:
        Exception: what `items` raises, in place of the item.
    """
    ended = object()
    wanted = islice(items, count)

    def make() -> Future[T | object]:
        # A daemon: the last item may be one that never comes, and the process ends all the same.
        return in_thread(lambda: next(wanted, ended), "ahead")

    pending = make()
    while (item := pending.result()) is not ended:
        pending = make()
        yield item  # type: ignore[misc]  # not `ended`
