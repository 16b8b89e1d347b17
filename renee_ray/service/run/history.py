"""RUN/history.json, the curves of a run, and the thread that writes a run's small files.

    steps    records of training/loop at sampled losses, ascending; older ones are thinned out
    evals    evaluations of the validation split, ascending: {"step", "epoch", "time_s", "metrics",
             "points", "by_frequency": {"2-5": {"labels", "recall@5"}, ...}}

A checkpoint does not hold the curves: a run that resumes reads them up to its own step. If the
file is lost or damaged, the run goes on without its earlier curves.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from renee_ray.checkpoint.state import State
from renee_ray.errors import ReneeError, reason
from renee_ray.service.run.directory import HISTORY_FILE, RunDirectory

log = logging.getLogger(__name__)

MOST_STEPS = 10_000
"""Most records of losses that are kept."""
RETRY_S, CLOSING_RETRY_S = 10.0, 1.0
"""Seconds before a write that failed is tried again."""
Records = list[dict[str, Any]]


class History:
    """The curves of a run so far, as rank 0 holds them."""

    def __init__(self, steps: Records, evals: Records) -> None:
        self.steps, self.evals = steps, evals

    @classmethod
    def read(cls, directory: RunDirectory, state: State) -> History:
        """Reads what a run that goes on from `state` keeps: nothing that comes after it."""
        if state.step == 0 and state.evaluation is None:
            return cls([], [])
        where = f"{directory.path}/{HISTORY_FILE}"
        try:
            if (found := directory.read(HISTORY_FILE)) is None:
                raise ReneeError(f"{where} is missing")
            evaluated = state.evaluation["step"] if state.evaluation else -1
            evals = [each for each in found["evals"] if each["step"] <= evaluated]
            for each in evals:
                dict(each["metrics"])
            if state.evaluation and not (evals and evals[-1]["step"] == evaluated):
                log.warning(
                    "%s lacks what came before the checkpoint of step %d", where, state.step
                )
                evals.append(state.evaluation)
            return cls([each for each in found["steps"] if each["step"] <= state.step], evals)
        except (ReneeError, OSError, LookupError, TypeError, ValueError) as error:
            log.warning(
                "the curves begin anew after step %d: %s cannot be used (%s)",
                state.step, where, reason(error),
            )  # fmt: skip
            return cls([], [state.evaluation] if state.evaluation else [])

    def add(self, record: dict[str, Any]) -> None:
        """Takes a record; beyond MOST_STEPS, every other one of the older half is dropped."""
        self.steps.append(record)
        if len(self.steps) > MOST_STEPS:
            half = len(self.steps) // 2
            self.steps[:half] = self.steps[:half:2]

    def best(self, metric: str) -> dict[str, Any] | None:
        """Returns the evaluation of the highest `metric`; the earliest of several.

        That before the first step is it only where there is no other.
        """

        def value(each: dict[str, Any]) -> tuple[bool, float]:
            return each["step"] > 0, each["metrics"].get(metric, 0.0)

        return max(self.evals, key=value, default=None)

    def content(self) -> dict[str, Records]:
        """Returns the content of the file, which later additions do not change."""
        return {"steps": list(self.steps), "evals": list(self.evals)}


class BackgroundWriter:
    """Writes JSON files of a run from a thread that `start` starts; the latest content wins.

    Only `flush` and `close` wait for storage. A write that fails is reported once, and is tried
    again with the next content, or after RETRY_S.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory
        self._pending: dict[str, dict[str, Any]] = {}
        self._changed = threading.Condition()
        self._until: float | None = None
        self._reported = self._busy = False
        self._thread = threading.Thread(target=self._run, name="run files", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, name: str, content: dict[str, Any]) -> None:
        """Takes the content of a file, which must not be changed any more."""
        with self._changed:
            self._pending[name] = content
            self._changed.notify()

    def flush(self, seconds: float) -> None:
        """Waits until all that was handed over is written, for `seconds` at most."""
        with self._changed:
            self._changed.wait_for(lambda: not self._pending and not self._busy, seconds)

    def close(self, seconds: float) -> bool:
        """Ends the thread; returns whether everything was written within `seconds`."""
        with self._changed:
            self._until = time.monotonic() + seconds
            self._changed.notify()
        self._thread.join(seconds)
        with self._changed:
            return not self._pending and not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._until is not None)
                taken, self._pending = self._pending, {}
                self._busy = True
            failed = {name: each for name, each in taken.items() if not self._written(name, each)}
            with self._changed:
                self._pending, self._busy = failed | self._pending, False
                self._changed.notify_all()
                if self._until is not None and (
                    not self._pending or time.monotonic() >= self._until
                ):
                    return
                if failed:
                    self._changed.wait(RETRY_S if self._until is None else CLOSING_RETRY_S)

    def _written(self, name: str, content: dict[str, Any]) -> bool:
        try:
            self._directory.write(name, content, patience=0)
        except Exception as error:  # whatever it is, the run goes on
            if not self._reported:
                log.warning(
                    "%s/%s is not written: %s; training goes on, and it is tried again",
                    self._directory.path, name, reason(error),
                )  # fmt: skip
            self._reported = True
            return False
        self._reported = False
        return True
