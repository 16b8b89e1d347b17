"""Progress of a run, from the workers to the driver's terminal: records, warnings, heartbeats."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from renee_ray.errors import reason
from renee_ray.service.cluster.driver_channel import DriverChannel
from renee_ray.service.observe.watch import Beat, Watch

LINE_SECONDS = 30
"""Seconds between two lines of progress, where there is no terminal that could show a bar."""
WATCH_SECONDS, LATE_SECONDS, LAST_SECONDS = 2.0, 0.5, 3.0
"""Seconds between two looks at who is silent, each of which calls an actor on the workers' cores;
at the end, seconds without a message that end it, and the most in all."""
SHOWN = ("P@1", "P@5", "PSP@1", "PSP@5", "recall@100")


class Display:
    """The driver's end: as a context, a channel and a thread that draws what arrives on it.

    watch: is given the workers' heartbeats; its complaints are shown.
    """

    channel: DriverChannel

    def __init__(self, watch: Watch | None = None) -> None:
        self._console, self.watch = Console(stderr=True), watch
        self._stop, self._shown_s = threading.Event(), -float(LINE_SECONDS)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Display:
        self.channel = DriverChannel()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        with contextlib.suppress(ConnectionError):  # Ray may have ended before
            self.channel.send({})  # wakes the thread
            self._thread.join(timeout=10)
            self.channel.close()

    def _run(self) -> None:
        with Progress(
            BarColumn(), TextColumn("{task.description}"), console=self._console,
            disable=not self._console.is_terminal,
        ) as self._bar:  # fmt: skip
            ends = math.inf
            while time.monotonic() < ends:
                if self._stop.is_set() and ends == math.inf:
                    ends = time.monotonic() + LAST_SECONDS
                # What workers sent last may come after what this process sent.
                timeout = LATE_SECONDS if self._stop.is_set() else WATCH_SECONDS
                try:
                    record = self.channel.receive(timeout)
                except Exception as error:  # the actor went away with the cluster
                    if not self._stop.is_set():
                        text = f"nothing more is shown of the run: {reason(error)}"
                        self._show({"text": text})
                    return
                if record is None and self._stop.is_set():
                    return
                for each in self._watched(record):
                    self._show(each)

    def _show(self, record: dict[str, Any]) -> None:
        """Shows a sentence or a record: as a bar, or for logs as a line every LINE_SECONDS."""
        text, now = record.get("text"), time.monotonic()
        if text is None and self._console.is_terminal:
            task = next(iter(self._bar.task_ids), None)
            task = self._bar.add_task("") if task is None else task
            self._bar.update(
                task, total=record["total_steps"], completed=record["step"],
                description=line(record),
            )  # fmt: skip
            return
        if text is None:
            if now - self._shown_s < LINE_SECONDS and record["step"] != record["total_steps"]:
                return
            self._shown_s, text = now, line(record)
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _watched(self, record: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
        """Yields the record, unless it is a heartbeat, and the watch's complaint, if any."""
        if record and "beat" not in record:
            yield record
        if self.watch is None:
            return
        now = time.monotonic()
        if record and "beat" in record:
            self.watch.saw(Beat(**record["beat"]), now)
        if complaint := self.watch.complaint(now):
            yield {"text": complaint}


def line(record: dict[str, Any]) -> str:
    """Formats a progress record as one line."""
    left = record["seconds_left"]
    return (
        f"epoch {record['epoch']:.2f}  step {record['step']}/{record['total_steps']}  "
        f"loss {record['loss']:.3f}  {record['rows_per_second']:.0f} rows/s  "
        f"{record['padding']:.0%} padding  "
        f"lr {record['encoder_lr']:.1e}/{record['classifier_lr']:.1e}  "
        f"{int(left // 60)}:{int(left % 60):02d} left"
    )


def evaluation_line(step: int, metrics: dict[str, float]) -> str:
    """Formats the figures of an evaluation as one line."""
    shown = "  ".join(f"{name} {metrics[name]:.2f}" for name in SHOWN if name in metrics)
    return f"validation after step {step}:  {shown}"
