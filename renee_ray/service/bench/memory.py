"""Resident memory of this process and of all below it."""

from __future__ import annotations

import threading

import psutil

SAMPLE_S = 0.2
"""Seconds between two looks at the memory of all processes."""
SAMPLES_A_SEARCH = 5
"""Looks to one search for new processes: that reads of every process of the machine."""


class ResidentPeak:
    """Highest resident memory while it is entered, sampled.

    A process counts from the next search on, about a second at most after its start. Pages that
    several processes share count once for each: an upper bound.

    bytes: of all processes together; greatest: of one process that is not Ray's raylet, which
    holds the object store; command: the beginning of its command line.
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
        while True:
            processes = processes_below()
            for _ in range(SAMPLES_A_SEARCH):
                self._look(processes)
                if self._over.wait(SAMPLE_S):
                    return

    def _look(self, processes: list[psutil.Process]) -> None:
        found = {process: _resident(process) for process in processes}
        self.bytes = max(self.bytes, sum(found.values()))
        for process, resident in found.items():
            command = _command(process) if resident > self.greatest else ""
            if command and "raylet/raylet" not in command:
                self.greatest, self.command = resident, command


def resident_bytes() -> int:
    """Resident memory of this process and its descendants now."""
    return sum(map(_resident, processes_below()))


def processes_below() -> list[psutil.Process]:
    """This process and its descendants."""
    own = psutil.Process()
    return [own, *own.children(recursive=True)]


def _resident(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.Error:  # it has ended
        return 0


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())[:80]
    except psutil.Error:
        return ""
