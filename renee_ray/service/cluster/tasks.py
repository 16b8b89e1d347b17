"""Ray Data tasks that take numbers and return counts; texts never pass through the driver.

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

from renee_ray.data.storage import read_file, replace_file
from renee_ray.errors import ReneeError, reason
from renee_ray.service.cluster.ray_compat import without_actors

log = logging.getLogger(__name__)

SECONDS_BETWEEN_MESSAGES = 1.0
REFUSED = "refused.txt"
"""File of a journal with the sentence that ends the command."""


class Interrupted(ReneeError):
    """A task died, or storage failed it: nothing is wrong with what it was given."""


def stream(
    work: Callable[[Any, int], dict[str, Any]], plan: Any, tasks: int, journal: str | None = None
) -> Iterator[Any]:
    """Yields the results of work(plan, i) for i in [0, tasks), in the order in which tasks finish.

    Args:
        journal: a directory where each result is kept. A result that is there is not computed
            again, so that an interrupted command goes on where it was.

    Raises:
        ReneeError: the sentence of the first task that failed; with a journal when all others have
            ended, so that none writes any more.
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
            refusal: str | None = None
            batch: pa.Table
            for batch in results.iter_batches(batch_size=None, batch_format="pyarrow"):
                for text in batch.column("result").to_pylist():
                    result = json.loads(text)
                    if "error" not in result:
                        yield result
                    elif result["interrupted"]:
                        raise Interrupted(result["error"])
                    elif journal is None:
                        raise ReneeError(result["error"])
                    else:
                        refusal = refusal or result["error"]
            if refusal is not None:
                raise ReneeError(refusal)
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
    except ReneeError as error:
        return json.dumps({"error": str(error), "interrupted": False})
    except OSError as error:
        sentence = (
            f"a task cannot read or write ({reason(error)}); check that source and destination "
            f"can be reached and have room, then run the command again"
        )
        return json.dumps({"error": sentence, "interrupted": True})
    except Exception as error:
        # Nothing that the same command would do better: its sentence, and the traceback for us.
        log.exception("a task of %s failed", work.__name__)
        sentence = f"a task failed ({type(error).__name__}: {reason(error):.300}); see Ray's logs"
        return json.dumps({"error": sentence, "interrupted": False})


def attempt(
    work: Callable[[Any, int], dict[str, Any]], plan: Any, i: int, journal: str | None
) -> str:
    """Returns the result of work(plan, i) as JSON, from the journal if it is there.

    The journal keeps a user's error too, which ends all tasks that have not begun.
    """
    if journal is None:
        return json.dumps(work(plan, i))
    name, refused = f"{journal}/{work.__name__}-{i}.json", f"{journal}/{REFUSED}"
    if (sentence := read_file(refused)) is not None:
        raise ReneeError(sentence.decode())
    if (known := read_file(name)) is not None:
        return known.decode()
    try:
        result = json.dumps(work(plan, i))
    except Interrupted:
        raise
    except ReneeError as error:
        replace_file(refused, str(error).encode())
        raise
    # Whole or not at all: a reader of half a result would take it for one.
    replace_file(name, result.encode())
    return result


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences Ray Data's bars and its account of the plan: the caller reports progress."""
    without_actors()
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
    """Reports how many of `total` are done, at most once every SECONDS_BETWEEN_MESSAGES."""

    def __init__(self, what: str, total: int, on_progress: Callable[[str], None]) -> None:
        self.what, self.total, self.on_progress = what, total, on_progress
        self.done, self.last = 0, time.monotonic()

    def one_more(self) -> None:
        self.done += 1
        now = time.monotonic()
        if self.done == self.total or now - self.last >= SECONDS_BETWEEN_MESSAGES:
            self.last = now
            self.on_progress(f"{self.what}: {self.done} of {self.total}")
