"""Items made in a thread, one ahead of whoever uses them.

A step ends by waiting for the GPU, which must not then wait for the next batch to be made.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")


def one_ahead(items: Iterator[T], count: int) -> Iterator[T]:
    """The next `count` items, each asked for when the one before it is handed out.

    Raises:
        Exception: what `items` raises, in place of the item.
    """
    pool = ThreadPoolExecutor(1, "ahead")
    ended = object()
    wanted = islice(items, count)
    try:
        pending = pool.submit(next, wanted, ended)
        while (item := pending.result()) is not ended:
            pending = pool.submit(next, wanted, ended)
            yield item  # type: ignore[misc]  # not `ended`
    finally:
        # Not waited for: the last item may be one that never comes.
        pool.shutdown(wait=False, cancel_futures=True)
