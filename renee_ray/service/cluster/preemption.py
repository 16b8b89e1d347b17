"""Requests for a checkpoint, or for the end of the run, which a worker takes between two steps.

    SIGTERM to a worker          checkpoint; the process ends once it is committed
    its node is drained          checkpoint (Ray says so when a spot node is to be taken away)
    more nodes are there         checkpoint; the controller then starts a larger group from it
    SIGTERM or Ctrl-C, driver    checkpoint, and the run ends

A request to any worker reaches all of them with the row counts of the next step.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import ray
import ray.train

from renee_ray.checkpoint.writer import Written
from renee_ray.service.cluster.driver_channel import DriverChannel
from renee_ray.service.cluster.ray_compat import (
    ControllerCallback,
    ResizingState,
    WorkerCallback,
    WorkerGroupCallback,
    preemption,
)
from renee_ray.training.loop import CHECKPOINT, STOP

log = logging.getLogger(__name__)

TERMINATED = 143
"""Exit status of a process that ended after SIGTERM."""


def _end_process(warning: str, number: float) -> None:
    """Ends this process as soon as the driver has been told."""
    try:
        log.warning(warning, number)
        logging.shutdown()  # flushes: the warning goes to the driver through an actor
    finally:
        os._exit(TERMINATED)


class Requests:
    """The requests to this process; any thread asks, and the training thread takes them."""

    def __init__(self) -> None:
        self._bits = 0
        self._changed = threading.Condition()
        self._due: int | None = None
        self._committed = -1
        self._known_preemption: Any = None
        self.terminated = False

    def ask(self, bits: int) -> None:
        """Asks for a checkpoint, the end, or both."""
        with self._changed:
            self._bits |= bits
            self._due = None

    def take(self, step: int) -> int:
        """Takes what is asked for, once; it is granted after the step that follows `step` ones."""
        self._look_for_preemption()
        if not self._bits:
            return 0
        with self._changed:
            bits, self._bits, self._due = self._bits, 0, step + 1
            return bits

    def written(self, written: Written) -> None:
        """Notes that a checkpoint has ended; after SIGTERM, ends the process with it."""
        with self._changed:
            if written.committed:
                self._committed = max(self._committed, written.step)
            self._changed.notify_all()
        if self.terminated and self._granted():
            _end_process("ended by SIGTERM after the checkpoint of step %d", written.step)

    def checkpoint_within(self, seconds: float) -> bool:
        """Asks for a checkpoint and waits for it; returns whether it was committed in time."""
        self.ask(CHECKPOINT)
        with self._changed:
            return self._changed.wait_for(self._granted, seconds)

    def terminate(self, grace_s: float) -> None:
        """Asks for a checkpoint after SIGTERM, and ends the process within `grace_s` seconds."""
        # Without taking the lock: a signal may come while this very thread holds it.
        self._bits, self._due = self._bits | CHECKPOINT, None
        self.terminated = True

        def late() -> None:
            time.sleep(grace_s)
            _end_process("ended by SIGTERM after %.0f s without a checkpoint", grace_s)

        threading.Thread(target=late, daemon=True).start()

    def follow(self, channel: DriverChannel) -> None:
        """Starts a thread that asks for the end when the driver does."""

        def run() -> None:
            with contextlib.suppress(Exception):  # without its driver this process ends too
                channel.wait_for_stop()
                self.ask(STOP)

        threading.Thread(target=run, name="stop", daemon=True).start()

    def _granted(self) -> bool:
        return self._due is not None and self._committed >= self._due

    def _look_for_preemption(self) -> None:
        info = preemption()
        if info is not None and info != self._known_preemption:
            self._known_preemption = info
            log.warning(
                "nodes of ranks %s are to be taken away: a checkpoint is written",
                list(info.preempted_ranks),
            )
            self.ask(CHECKPOINT)


requests = Requests()
"""The requests to this process."""


def ask_for_checkpoint(seconds: float) -> bool:
    """Asks this worker for a checkpoint; runs in its main thread, beside training."""
    written = requests.checkpoint_within(seconds)
    if not written and ray.train.get_context().get_world_rank() == 0:
        # Here, whose warnings the driver shows: the controller may be a process of its own.
        log.warning(
            "no checkpoint within %.0f s before the workers are regrouped: the steps since the "
            "last one are done again", seconds,
        )  # fmt: skip
    return written


class SignalHandler(WorkerCallback):
    """Handles SIGTERM in a worker; installed in its main thread, where Python demands it."""

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s

    def after_init_train_context(self) -> None:
        def handle(number: int, frame: FrameType | None) -> None:
            requests.terminate(self._grace_s)

        signal.signal(signal.SIGTERM, handle)


class CheckpointBeforeResize(ControllerCallback, WorkerGroupCallback):
    """Takes a checkpoint before workers are stopped so that more can start: no step is lost."""

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._group: Any = None

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        self._group = worker_group

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        if not isinstance(current_state, ResizingState) or self._group is None:
            return
        try:
            asked = self._group.execute_async(ask_for_checkpoint, self._grace_s)
            ray.get(asked, timeout=self._grace_s + 10)
        except Exception as error:  # it costs the steps since the last checkpoint, not the run
            log.warning("no checkpoint before the workers are regrouped: %s", error)
