"""Resident memory of this process and of all below it, by /proc (Linux)."""

from __future__ import annotations

import os
import threading
from pathlib import Path

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
            pids = processes_below()
            for _ in range(SAMPLES_A_SEARCH):
                self._look(pids)
                if self._over.wait(SAMPLE_S):
                    return

    def _look(self, pids: set[int]) -> None:
        found = {pid: _resident(pid) for pid in pids}
        self.bytes = max(self.bytes, sum(found.values()))
        for pid, resident in found.items():
            command = _command(pid) if resident > self.greatest else ""
            if command and "raylet/raylet" not in command:
                self.greatest, self.command = resident, command


def resident_bytes() -> int:
    """Resident memory of this process and its descendants now; 0 where there is no /proc."""
    return sum(map(_resident, processes_below()))


def processes_below() -> set[int]:
    """Process ids of this process and of its descendants."""
    parent: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        if fields := _stat(int(entry.name)):
            parent[int(entry.name)] = int(fields[1])
    own = {os.getpid()}
    while more := {pid for pid, above in parent.items() if above in own} - own:
        own |= more
    return own


def _resident(pid: int) -> int:
    fields = _stat(pid)
    return int(fields[21]) * os.sysconf("SC_PAGE_SIZE") if fields else 0


def _stat(pid: int) -> list[str]:
    """What proc(5) lists of a process from its state on, the third of all; none if it has ended."""
    try:
        raw = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return []
    return raw.rpartition(b")")[2].decode().split()  # its name may hold anything


def _command(pid: int) -> str:
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return ""
    return raw.replace(b"\0", b" ").decode(errors="replace").strip()[:80]
