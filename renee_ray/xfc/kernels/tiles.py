"""How the matmuls of `gpu` divide their work; which division is fastest is measured.

Candidates differ in what they have too little of: a large tile reads its operands less often from
L2, and small ones leave no multiprocessor idle and hide each other's epilogues.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

BYTES = 128
"""Bytes of each row or column that a program multiplies at once."""
GROUP = 8
"""Tile rows that are worked on side by side, so that they find the same columns in L2."""
REPEATS = 5
"""Launches of a measurement."""


@dataclass(frozen=True)
class Tiles:
    """One division of a product.

    m, n: rows and columns that a program computes at once.
    slices: parts of the columns that are finished one after the other, to save registers.
    resident: programs on a multiprocessor, which stay for tile after tile and get their operands
        by descriptors; 0: one program for each tile, and operands by pointers.
    """

    m: int
    n: int
    slices: int
    warps: int
    stages: int
    resident: int = 0

    def programs(self, tiles: int, device: torch.device) -> int:
        """Returns the number of programs for so many tiles."""
        if not self.resident or device.type != "cuda":
            return tiles
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        return min(tiles, self.resident * processors)


DESCRIBED = (
    Tiles(128, 256, 8, warps=8, stages=4, resident=1),
    Tiles(256, 128, 8, warps=8, stages=4, resident=1),
    Tiles(128, 128, 4, warps=8, stages=3, resident=2),
)
POINTED = (
    Tiles(128, 128, 4, warps=8, stages=3),
    Tiles(128, 256, 8, warps=8, stages=3),
    Tiles(64, 128, 4, warps=4, stages=3),
)
"""The first and the last of them fit the shared memory of every GPU from sm_80 on."""


def candidates(left: Tensor, right: Tensor) -> tuple[Tiles, ...]:
    """Returns the tiles to try for a product of two matrices; in the interpreter the first.

    Descriptors need rows of whole 16 bytes and, on a GPU, Hopper's hardware.
    """
    able = not left.is_cuda or (
        torch.version.hip is None and torch.cuda.get_device_capability(left.device) >= (9, 0)
    )
    for matrix in (left, right):
        row = matrix.stride(0) * matrix.element_size()
        able = able and matrix.numel() > 0 and matrix.data_ptr() % 16 == 0 and row % 16 == 0
    found = DESCRIBED + POINTED[:1] if able else POINTED
    return found if left.is_cuda else found[:1]


_fastest: dict[tuple[Any, ...], Tiles] = {}


def fastest(
    key: tuple[Any, ...],
    left: Tensor,
    right: Tensor,
    trial: Callable[[], Callable[[Tiles], Any]],
) -> Tiles:
    """Returns the tiles that multiply two matrices in least time; each key is measured once.

    Triton keeps what it compiled on disk, so a later process pays for the launches alone.
    trial: gives a launch that may be repeated, and may raise Triton's errors.
    """
    tried = candidates(left, right)
    if len(tried) == 1:
        return tried[0]
    key = (*key, tried)
    if key not in _fastest:
        launch, times = trial(), {}
        for tiles in tried:
            try:
                times[tiles] = milliseconds(functools.partial(launch, tiles))
            except Exception as error:  # too little shared memory, as a rule
                log.info("%s: %s does not run on this GPU: %s", key, tiles, error)
                if tiles == tried[-1] and not times:
                    raise
        _fastest[key] = min(times, key=times.__getitem__)
        log.info("%s: %s takes least of %s ms", key, _fastest[key], times)
    return _fastest[key]


def milliseconds(call: Callable[[], Any]) -> float:
    """Returns the time of some calls on the current GPU, after one that may have to compile."""
    call()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(REPEATS):
        call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)
