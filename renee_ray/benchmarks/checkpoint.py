"""`renee-ray bench checkpoint`: what a checkpoint costs training, and what resuming reads.

Two processes of torch.distributed hold a classifier of a given size. They step, save in the
background and go on stepping; the reference is the plain writing, and fsync, of as many bytes to
the same place. Then a group of three reads its shards while the bytes read are counted.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow.fs as pafs
import torch
import torch.distributed as dist
from torch import nn

from renee_ray.benchmarks.processes import run_processes
from renee_ray.checkpoint.registry import Checkpoints
from renee_ray.checkpoint.state import Checkpoint, State
from renee_ray.checkpoint.writer import CheckpointWriter, Written
from renee_ray.config.schema import EncoderConfig
from renee_ray.model.encoder import adamw
from renee_ray.parallel.collectives import Ranks, gather_numbers
from renee_ray.xfc.labels import LabelRange
from renee_ray.xfc.shard import Shard
from renee_ray.xfc.weights.storages import Weights

WRITERS, READERS, ROUNDS = 2, 3, 3
CPU = torch.device("cpu")
PIECE = 1 << 24
TIMEOUT_S = 1800
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def bench_checkpoint(gib: float, dim: int, directory: str | None) -> dict[str, Any]:
    """Times saving `gib` GiB of weights, `ROUNDS` times, below `directory` (None: a temporary one).

    Returns:
        bytes, of all weights; write_s, of as many by plain writing, its median; stalled_s, for
        which training stood still, the longest of all ranks, its median; ratio_of_stall, of the
        two; background_s, until the commit; read_ratio, of the bytes that a rank of `READERS` read
        to those that it needed, the highest.
    """
    labels = int(gib * 2**30 / (4 * dim))
    with tempfile.TemporaryDirectory(prefix="renee-ray-bench-", dir=directory) as run:
        write_s, saved = [], []
        for _ in range(ROUNDS):
            write_s.append(_plain_write(Path(run, "plain"), labels * dim * 4))
            saved.append(_on_ranks(WRITERS, _save, labels, dim, run))
        read = _on_ranks(READERS, _load, labels, dim, run)
    stalled, plain = median(each["stalled_s"] for each in saved), median(write_s)
    return {
        "bytes": labels * dim * 4,
        "write_s": plain,
        "stalled_s": stalled,
        "ratio_of_stall": stalled / plain,
        "background_s": median(each["seconds"] for each in saved),
        "read_ratio": read["ratio"],
        "writers": WRITERS,
        "readers": READERS,
    }


def _plain_write(path: Path, size: int) -> float:
    piece = os.urandom(PIECE)
    start = time.perf_counter()
    with path.open("wb") as file:
        for first in range(0, size, PIECE):
            file.write(piece[: min(PIECE, size - first)])
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return seconds


def _on_ranks(num_ranks: int, work: Any, labels: int, dim: int, run: str) -> dict[str, float]:
    """Runs `work` in `num_ranks` processes of one thread; returns what rank 0 returned."""
    return run_processes(
        work, {"labels": labels, "dim": dim, "run": run}, num_ranks, use_gpu=False,
        timeout_s=TIMEOUT_S, environment=ENVIRONMENT, niceness=0,
    )  # fmt: skip


def _shard(ranks: Ranks, labels: int, dim: int) -> Shard:
    owned = LabelRange.of_rank(labels, ranks.num_ranks, ranks.rank)
    return Shard(owned, Weights("fp32", len(owned), dim, False, CPU))


def _save(ranks: Ranks, device: torch.device, labels: int, dim: int, run: str) -> dict[str, float]:
    shard = _shard(ranks, labels, dim)
    encoder = nn.Linear(8, 8)
    optimizer = adamw(encoder, EncoderConfig())  # type: ignore[arg-type]
    written: list[Written] = []
    writer = CheckpointWriter(Checkpoints(run), ranks, 1, "P@1", on_written=written.append).start()
    writer.reserve(encoder, shard)  # type: ignore[arg-type]
    dist.barrier(group=ranks.host)
    writer.save(State(), encoder, optimizer, shard, {})  # type: ignore[arg-type]
    assert writer.wait()
    stalled = [each for (each,) in gather_numbers(ranks, [written[0].stalled_s])]
    return {"stalled_s": max(stalled), "seconds": written[0].seconds}


class _Counting:
    """A local filesystem that counts the bytes read."""

    def __init__(self) -> None:
        self._inner, self.bytes = pafs.LocalFileSystem(), 0

    @contextmanager
    def open_input_file(self, path: str) -> Iterator[_Counting]:
        with self._inner.open_input_file(path) as self._file:
            yield self

    def size(self) -> int:
        return int(self._file.size())

    def read(self, size: int | None = None) -> bytes:
        return self._counted(self._file.read(size))

    def read_at(self, size: int, offset: int) -> bytes:
        return self._counted(self._file.read_at(size, offset))

    def _counted(self, raw: bytes) -> bytes:
        self.bytes += len(raw)
        return raw


def _load(ranks: Ranks, device: torch.device, labels: int, dim: int, run: str) -> dict[str, float]:
    shard, newest, counting = _shard(ranks, labels, dim), Checkpoints(run).newest(), _Counting()
    assert newest is not None
    Checkpoint(counting, newest.path).load_shard(shard)  # type: ignore[arg-type]
    ratios = gather_numbers(ranks, [counting.bytes / shard.weights.nbytes()])
    return {"ratio": max(each for (each,) in ratios)}
