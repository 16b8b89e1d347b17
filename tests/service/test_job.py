"""Waiting for workers: what a signal does meanwhile."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest

from renee_ray.config.schema import RunConfig
from renee_ray.service.cluster.launch import interruptible


def config(grace_s: float = 60) -> RunConfig:
    return RunConfig.model_validate(
        {"data": "d", "output": "o", "checkpoint": {"grace_s": grace_s}}
    )


class Workers:
    """`fit` ends once `on_stop` was called, if `obey`; sends this process a signal whenever it is
    asked for, the first time when it begins."""

    def __init__(self, obey: bool = True, signals: int = 1, has_something: bool = True) -> None:
        self.obey, self.signals, self.has_something = obey, signals, has_something
        self.asked, self.over = threading.Event(), threading.Event()

    def _signal(self) -> None:
        if self.signals:
            self.signals -= 1
            os.kill(os.getpid(), signal.SIGTERM if self.signals % 2 else signal.SIGINT)

    def fit(self) -> str:
        self._signal()
        assert self.asked.wait(30)
        self._signal()
        if not self.obey:
            self.over.wait(30)
        return "a checkpoint"

    def on_stop(self) -> bool:
        self.asked.set()
        return self.has_something


def wait_for(workers: Workers, on_stop: Callable[[], bool] | None, grace_s: float = 60) -> Any:
    try:
        return interruptible(workers.fit, on_stop, grace_s)
    finally:
        workers.asked.set()
        workers.over.set()


def test_a_first_signal_asks_for_a_checkpoint() -> None:
    workers = Workers()
    assert wait_for(workers, workers.on_stop) == "a checkpoint"


@pytest.mark.parametrize(
    ("workers", "grace_s"),
    [
        (Workers(obey=False, has_something=False), 60),
        (Workers(obey=False, signals=2), 60),
        (Workers(obey=False), 0.3),
    ],
    ids=["nothing to save", "a second signal", "grace is over"],
)
def test_otherwise_it_interrupts(workers: Workers, grace_s: float) -> None:
    with pytest.raises(KeyboardInterrupt):
        wait_for(workers, workers.on_stop, grace_s)


def test_of_workers_that_save_nothing_a_signal_is_an_interrupt() -> None:
    """Ray Train's own handler, in `fit`, would end them and return an error."""
    workers = Workers(obey=False)
    with pytest.raises(KeyboardInterrupt):
        wait_for(workers, None)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
