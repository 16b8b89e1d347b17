"""What the benchmarks share: a classifier step's inputs, drawn from a seed; medians of interleaved
timings, and the peak of memory."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil
import torch
from torch import Tensor

from renee_ray.errors import ReneeError
from renee_ray.xfc.device import free_memory
from renee_ray.xfc.labels import LabelRange
from renee_ray.xfc.shard import Pairs, Shard
from renee_ray.xfc.weights.storages import Weights

POSITIVES_PER_ROW = 5


@dataclass(frozen=True)
class Problem:
    """A batch. embeddings: float32 [B, D]; rows, labels: int64 [m], the distinct positives."""

    num_labels: int
    embeddings: Tensor
    rows: Tensor
    labels: Tensor

    @property
    def owned(self) -> LabelRange:
        return LabelRange(0, self.num_labels, self.num_labels)

    @property
    def dim(self) -> int:
        return self.embeddings.shape[1]

    def shard(
        self, precision: str, momentum: float, chunk: int = 0, owned: LabelRange | None = None
    ) -> Shard:
        """Makes a shard with weights N(0, 0.02), drawn on the device; owned: None: all labels."""
        owned, device = self.owned if owned is None else owned, self.embeddings.device
        weights = Weights(precision, len(owned), self.dim, momentum > 0, device)
        shard = Shard(owned, weights, chunk)
        shard.initialise_normal(0.02, seed=0)
        return shard

    def positives(self) -> Pairs:
        return Pairs(self.rows, self.labels, self.owned, self.embeddings.device)


def make_problem(labels: int, dim: int, batch: int, device: torch.device) -> Problem:
    """Draws `batch` standard normal rows, and `POSITIVES_PER_ROW` random labels for each."""
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(batch, dim, generator=generator)
    drawn = torch.randint(0, labels, (batch, POSITIVES_PER_ROW), generator=generator)
    rows = torch.arange(batch).repeat_interleave(POSITIVES_PER_ROW)
    pairs = torch.stack([rows, drawn.flatten()], 1).unique(dim=0)
    return Problem(labels, embeddings.to(device), pairs[:, 0], pairs[:, 1])


def check_memory(labels: int, numbers: int, device: torch.device) -> None:
    """Checks that arrays of `numbers` float32 in all will fit.

    Raises:
        ReneeError: they will not.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of what was measured before
    free = free_memory(device)
    if 4 * numbers > free:
        raise ReneeError(
            f"--labels {labels} and its references need {4 * numbers / 2**30:,.1f} GiB and "
            f"{free / 2**30:,.1f} GiB of memory are free; give fewer --labels or "
            f"--references, or a lower --dim"
        )


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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
