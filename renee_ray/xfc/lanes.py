"""Threads that each take a part of a shard's labels, on a CPU.

If BLAS divided every product, a chunk would wake threads ten times, some 50 us each on a virtual
machine. Labels have nothing in common but dE and the k best. So each thread, called a lane, takes
its own labels through all operations, and what the lanes found is put together at the end.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

T = TypeVar("T")

LEAST_LABELS = 64
"""Labels of a lane; for fewer it is not worth starting one."""
MOST_BYTES = 512 << 20
"""Memory that all lanes together may take beside their chunks."""


def lane_count(labels: int, each: int, device: torch.device, threads: int = 0) -> int:
    """Returns the number of lanes for so many labels: torch's threads, or fewer to save memory.

    With one lane the threads share every matmul instead.
    each: bytes that every lane has for itself, beside its chunk; threads: 0: torch's.
    """
    threads = threads or torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or labels < threads * LEAST_LABELS:
        return 1
    return max(1, min(threads, MOST_BYTES // max(1, each)))


def run(tasks: Sequence[Callable[[], T]]) -> list[T]:
    """Runs tasks at once, the i-th always in lane i and a single one right here.

    Returns:
        what each task returned; what one raises is raised once all have ended.
    """
    if len(tasks) == 1:
        return [tasks[0]()]
    inference = torch.is_inference_mode_enabled()  # a mode is a thread's own

    def within(task: Callable[[], T]) -> T:
        with torch.inference_mode(inference), torch.set_grad_enabled(False):
            return task()

    running = [
        thread.submit(within, task)
        for thread, task in zip(_threads(len(tasks)), tasks, strict=True)
    ]
    wait(running)
    return [lane.result() for lane in running]


@functools.cache
def _threads(lanes: int) -> list[ThreadPoolExecutor]:
    """Returns pools of one thread each, on which torch computes alone.

    In a single pool a thread that is early could take two of the tasks, and fill their buffers.
    """
    before = torch.get_num_threads()
    threads = [ThreadPoolExecutor(1, f"classifier lane {i}") for i in range(lanes)]
    wait([thread.submit(_compute_alone) for thread in threads])
    torch.set_num_threads(before)  # which is also what threads not yet used by torch begin with
    return threads


os.register_at_fork(after_in_child=_threads.cache_clear)  # a child has none of these threads


def _compute_alone() -> None:
    torch.get_num_threads()  # at its first use in a thread torch would undo the next line
    torch.set_num_threads(1)
