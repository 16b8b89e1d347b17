"""Resident memory of this process and of all below it."""

from __future__ import annotations

import contextlib
import threading

import psutil

SAMPLE_S = 0.2
"""Seconds between two samples of the memory of all processes."""
SAMPLES_A_SEARCH = 5
"""Samples for one search for new processes, which reads every process of the machine."""


class ResidentPeak:
    """The highest resident memory while it is entered, sampled.

    A process counts from the next search on, at most about a second after its start. Pages that
    several processes share count once for each: the result is an upper bound.

    bytes: all processes together; greatest: the largest process but Ray's raylet, which holds the
    object store; command: the beginning of its command line.
    """

    def __init__(self) -> None:
        self.bytes, self.greatest, self.command = 0, 0, ""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> ResidentPeak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        own = psutil.Process()
        while True:
            processes = [own, *own.children(recursive=True)]
            for _ in range(SAMPLES_A_SEARCH):
                self._sample(processes)
                if self._over.wait(SAMPLE_S):
                    return

    def _sample(self, processes: list[psutil.Process]) -> None:
        total = 0
        for process in processes:
            with contextlib.suppress(psutil.Error):  # it has ended
                resident = process.memory_info().rss
                total += resident
                if resident > self.greatest:
                    command = " ".join(process.cmdline())[:80]
                    if command and "raylet/raylet" not in command:
                        self.greatest, self.command = resident, command
        self.bytes = max(self.bytes, total)
