"""Ray Data tasks that are given numbers and return counts; texts never pass through the driver.

A user's error inside a task comes back as a value, so that Ray logs no traceback for it.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import ray
import ray.data

from renee_ray.config import ReneeError, reason
from renee_ray.data.storage import read_file, replace_file

log = logging.getLogger(__name__)

SECONDS_BETWEEN_MESSAGES = 1.0


class Interrupted(ReneeError):
    """A task died, or storage failed it: nothing is wrong with what it was given."""


def stream(
    work: Callable[[Any, int], dict[str, Any]], plan: Any, tasks: int, journal: str | None = None
) -> Iterator[Any]:
    """The results of work(plan, i) for i in [0, tasks), as Ray Data tasks finish, in any order.

    Args:
        journal: a directory where each result is kept; what is there already is not worked out
            again, so that what was cut off goes on where it was.

    Raises:
        ReneeError: the sentence of the first task that failed.
        Interrupted: a task died or could not read or write.
    """
    if tasks == 0:
        return
    reference = ray.put(plan)

    def run(batch: pa.Table) -> pa.Table:
        shared = ray.get(reference)
        results = [_attempt(work, shared, i, journal) for i in batch.column("id").to_pylist()]
        return pa.table({"result": pa.array(results, pa.large_string())})

    with _quiet():
        results = ray.data.range(tasks, override_num_blocks=tasks).map_batches(
            run, batch_size=None, batch_format="pyarrow", num_cpus=1
        )
        try:
            batch: pa.Table
            for batch in results.iter_batches(batch_size=None, batch_format="pyarrow"):
                for text in batch.column("result").to_pylist():
                    result = json.loads(text)
                    if "error" in result:
                        kind = Interrupted if result["interrupted"] else ReneeError
                        raise kind(result["error"])
                    yield result
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None) or error
            raise Interrupted(
                f"a task died ({type(cause).__name__}: "
                f"{reason(cause)}); see Ray's logs, then run the command again"
            ) from error


def _attempt(
    work: Callable[[Any, int], dict[str, Any]], plan: Any, i: int, journal: str | None
) -> str:
    try:
        return attempt(work, plan, i, journal)
    except (ReneeError, OSError) as error:
        return json.dumps({"error": str(error), "interrupted": isinstance(error, OSError)})
    except Exception as error:
        # Nothing that the same command would do better: its sentence, and the traceback for us.
        log.exception("a task of %s failed", work.__name__)
        sentence = f"a task failed ({type(error).__name__}: {reason(error):.300}); see Ray's logs"
        return json.dumps({"error": sentence, "interrupted": False})


def attempt(
    work: Callable[[Any, int], dict[str, Any]], plan: Any, i: int, journal: str | None
) -> str:
    """The result of work(plan, i) as JSON, from the journal where it is there."""
    if journal is None:
        return json.dumps(work(plan, i))
    name = f"{journal}/{work.__name__}-{i}.json"
    if (known := read_file(name)) is not None:
        return known.decode()
    result = json.dumps(work(plan, i))
    # Whole or not at all: a reader of half a result would take it for one.
    replace_file(name, result.encode())
    return result


@contextmanager
def _quiet() -> Iterator[None]:
    """Ray Data without bars and without its account of the plan: the caller reports progress."""
    context = ray.data.DataContext.get_current()
    logger = logging.getLogger("ray.data")
    before = context.enable_progress_bars, logger.level
    context.enable_progress_bars = False
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars = before[0]
        logger.setLevel(before[1])


class Reporter:
    """Says how many of `total` are done, not more than once in a while."""

    def __init__(self, what: str, total: int, on_progress: Callable[[str], None]) -> None:
        self.what, self.total, self.on_progress = what, total, on_progress
        self.done, self.last = 0, time.monotonic()

    def one_more(self) -> None:
        self.done += 1
        now = time.monotonic()
        if self.done == self.total or now - self.last >= SECONDS_BETWEEN_MESSAGES:
            self.last = now
            self.on_progress(f"{self.what}: {self.done} of {self.total}")
