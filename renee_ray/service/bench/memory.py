"""Resident memory of this process and of all below it."""

from __future__ import annotations

import contextlib
import threading

import psutil

SAMPLE_S = 0.5
"""Seconds between two samples, each of which looks at every process of the machine."""


class ResidentPeak:
    """The highest resident memory while it is entered, sampled: `bytes` of all processes together.

    Pages that several processes share count once for each: the result is an upper bound.
    """

    def __init__(self) -> None:
        self.bytes = 0
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
        while not self._over.wait(SAMPLE_S):
            total = 0
            for process in (own, *own.children(recursive=True)):
                with contextlib.suppress(psutil.Error):  # it has ended
                    total += process.memory_info().rss
            self.bytes = max(self.bytes, total)
