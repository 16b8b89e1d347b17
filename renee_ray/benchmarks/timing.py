"""Medians of interleaved timings, and the peak of memory."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

import psutil
import torch

CHUNKS = {"cpu": (256, 512, 1024, 2048, 4096), "cuda": (8192, 32768, 131072)}
"""Chunk sizes among which, besides the shard's own, the bare matmuls take the fastest."""


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    repeats: int,
    device: torch.device,
    calls: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Returns the median seconds of each function, called in turns to meet the same machine.

    Every function is called before, untimed. calls: of a function in each turn; clock: of seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for round_number in range(repeats + 1):
        for name, function in functions.items():
            wait_for(device)
            start = clock()
            for _ in range(calls):
                function()
            wait_for(device)
            if round_number:
                seconds[name].append((clock() - start) / calls)
    return {name: median(all_taken) for name, all_taken in seconds.items()}


def fastest(
    matmuls: Callable[[int], Callable[[], object]], labels: int, own: int, device: torch.device
) -> Callable[[], object]:
    """Returns the matmuls over chunks of all labels, of the chunk size that is fastest here.

    own: labels of a chunk of the shard, which is tried too.
    """
    sizes = {min(size, labels) for size in (*CHUNKS[device.type], own)}
    functions = {str(size): matmuls(size) for size in sorted(sizes)}
    taken = interleaved(functions, 2, device)
    return functions[min(taken, key=taken.__getitem__)]


def peak_extra_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Returns the bytes by which memory grows while `function` runs: the device's, or resident.

    On a CPU it counts what libraries allocate too, such as the packed operands of BLAS. Where the
    kernel does not let the peak start anew, it is the peak of the whole process.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak is the present from here on
    before = psutil.Process().memory_info().rss
    function()
    return max(0, _resident_peak() - before)


def _resident_peak() -> int:
    """Bytes since `clear_refs` (Linux): ru_maxrss would be that of the parent, if it is larger."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def wait_for(device: torch.device) -> None:
    """Waits until a GPU has done all that it was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
