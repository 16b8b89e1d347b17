"""Medians of interleaved timings, and the peak of memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

import torch


def interleaved(
    functions: Mapping[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, float]:
    """Median wall seconds of each function, called in turns so that all meet the same machine.

    Every function is called once before, untimed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for round_number in range(repeats + 1):
        for name, function in functions.items():
            taken = _timed(function, device)
            if round_number:
                seconds[name].append(taken)
    return {name: median(all_taken) for name, all_taken in seconds.items()}


def fastest(
    functions: Mapping[int, Callable[[], object]], device: torch.device, repeats: int = 2
) -> int:
    """The key whose function takes the shortest time."""
    taken = interleaved({str(key): f for key, f in functions.items()}, repeats, device)
    return int(min(taken, key=lambda key: taken[key]))


def peak_extra_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Bytes by which memory grows at most while `function` runs: device memory, or resident.

    On a CPU it counts what libraries allocate too, such as the packed operands of BLAS.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    before = _resident_now()
    function()
    return max(0, _resident_peak() - before)


def _timed(function: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    function()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _resident_now() -> int:
    """Bytes; where Linux allows it, the peak starts anew from here."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return _resident_peak()


def _resident_peak() -> int:
    try:
        return _status("VmHWM")
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(field: str) -> int:
    """A size in /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
