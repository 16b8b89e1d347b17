"""Processes of torch.distributed on this machine, without Ray: the reference for runs on it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from renee_ray.parallel.collectives import Ranks


def run_processes(
    function: Callable[..., dict[str, Any]],
    arguments: dict[str, Any],
    num_ranks: int,
    *,
    use_gpu: bool,
    timeout_s: float,
    environment: dict[str, str],
    niceness: int,
) -> dict[str, Any]:
    """Calls function(ranks, device, **arguments) in `num_ranks` processes; returns rank 0's result.

    Args:
        function: a module's own; it returns what JSON can hold.
        use_gpu: rank r takes GPU r.
        timeout_s: timeout of a collective.
        environment: variables that the processes start with, such as their threads.
        niceness: added to this process's.
    """
    with tempfile.TemporaryDirectory(prefix="renee-ray-bare-") as directory:
        how = (num_ranks, use_gpu, timeout_s, niceness)
        with _environment(environment):
            mp.spawn(_process, (directory, how, function, arguments), nprocs=num_ranks)
        found: dict[str, Any] = json.loads(Path(directory, "found.json").read_text())
        return found


def _process(
    rank: int,
    directory: str,
    how: tuple[int, bool, float, int],
    function: Callable[..., dict[str, Any]],
    arguments: dict[str, Any],
) -> None:
    num_ranks, use_gpu, timeout_s, niceness = how
    os.nice(niceness)
    device = torch.device("cuda", rank) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(device)
    if num_ranks > 1:
        dist.init_process_group(
            "nccl" if use_gpu else "gloo", init_method=f"file://{directory}/rendezvous",
            rank=rank, world_size=num_ranks, timeout=timedelta(seconds=timeout_s),
        )  # fmt: skip
    try:
        found = function(Ranks.of_process_group(timeout_s), device, **arguments)
        if rank == 0:
            Path(directory, "found.json").write_text(json.dumps(found))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
