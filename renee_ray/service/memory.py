"""Resident memory of this process and of all below it, by /proc (Linux)."""

from __future__ import annotations

import os
import threading
from pathlib import Path

SAMPLE_S = 0.2
"""Seconds between two looks at the memory of all processes."""


class ResidentPeak:
    """Highest resident memory while it is entered, sampled.

    Pages that several processes share count once for each: an upper bound.

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
            found = processes_below()
            self.bytes = max(self.bytes, sum(found.values()))
            for pid, resident in found.items():
                command = _command(pid) if resident > self.greatest else ""
                if command and "raylet/raylet" not in command:
                    self.greatest, self.command = resident, command
            if self._over.wait(SAMPLE_S):
                return


def resident_bytes() -> int:
    """Resident memory of this process and its descendants now; 0 where there is no /proc."""
    return sum(processes_below().values())


def processes_below() -> dict[int, int]:
    """Resident bytes of this process and of each of its descendants, by process id."""
    parent: dict[int, int] = {}
    resident: dict[int, int] = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            lines = status.read_text().splitlines()
        except OSError:  # it has ended meanwhile
            continue
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        pid = int(status.parent.name)
        parent[pid] = int(fields["PPid"])
        resident[pid] = int(fields.get("VmRSS", "0 kB").split()[0]) * 1024
    own = {os.getpid()}
    while True:
        more = {pid for pid, above in parent.items() if above in own} - own
        if not more:
            return {pid: resident[pid] for pid in own if pid in resident}
        own |= more


def _command(pid: int) -> str:
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return ""
    return raw.replace(b"\0", b" ").decode(errors="replace").strip()[:80]
