"""One item ahead, in order, and no more than that."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from renee_ray.rank.threads import one_ahead


def numbers(made: list[int], stop: int = 100) -> Iterator[int]:
    for i in range(stop):
        made.append(i)
        yield i


@pytest.mark.parametrize("count", [0, 1, 5])
def test_order_and_count(count: int) -> None:
    made: list[int] = []
    assert list(one_ahead(numbers(made), count)) == list(range(count))
    assert made == list(range(count)), "nothing behind the last one is asked for"


def test_fewer_than_wanted() -> None:
    assert list(one_ahead(numbers([], 3), 10)) == [0, 1, 2]


def test_the_next_is_made_while_one_is_used_and_no_other() -> None:
    made, ready = [], threading.Event()

    def source() -> Iterator[int]:
        for i in range(5):
            made.append((i, threading.current_thread() is threading.main_thread()))
            if i == 1:
                ready.set()
            yield i

    items = one_ahead(source(), 5)
    assert next(items) == 0
    assert ready.wait(30)
    assert made == [(0, False), (1, False)]
    items.close()


def test_an_error_takes_the_place_of_its_item() -> None:
    def source() -> Iterator[int]:
        yield 1
        raise ValueError("torn")

    items = one_ahead(source(), 5)
    assert next(items) == 1
    with pytest.raises(ValueError, match="torn"):
        next(items)


NEVER = """
import threading
from renee_ray.rank.threads import one_ahead

asked = threading.Event()

def items():
    yield 1
    asked.set()
    threading.Event().wait()

for item in one_ahead(items(), 5):
    asked.wait()
    raise SystemExit(3)
"""


def test_a_process_ends_though_its_next_item_never_comes() -> None:
    assert subprocess.run([sys.executable, "-c", NEVER], timeout=60).returncode == 3
