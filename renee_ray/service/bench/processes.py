"""Processes of torch.distributed on this machine, without Ray: the reference for runs on it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from renee_ray.config.schema import RunConfig
from renee_ray.machine import environment
from renee_ray.rank.collectives import Ranks
from renee_ray.service.cluster.launch import NICENESS, threads_of, worker_environment


def run_processes(
    function: Callable[[Ranks, torch.device], dict[str, Any]], config: RunConfig, use_gpu: bool
) -> dict[str, Any]:
    """Calls function(ranks, device) in as many processes as a run has workers, with their threads.

    Args:
        function: can be pickled; it returns what JSON can hold.
        use_gpu: rank r takes GPU r.

    Returns:
        what rank 0 returned.
    """
    num_ranks = config.max_workers
    variables = worker_environment(threads_of(config, use_gpu, num_ranks))
    with tempfile.TemporaryDirectory(prefix="renee-ray-bare-") as directory:
        with environment(variables):
            mp.spawn(
                _process, (directory, function, num_ranks, use_gpu, config.timeout_s),
                nprocs=num_ranks,
            )  # fmt: skip
        found: dict[str, Any] = json.loads(Path(directory, "found.json").read_text())
        return found


def _process(
    rank: int,
    directory: str,
    function: Callable[[Ranks, torch.device], dict[str, Any]],
    num_ranks: int,
    use_gpu: bool,
    timeout_s: float,
) -> None:
    os.nice(NICENESS)
    device = torch.device("cuda", rank) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(device)
    if num_ranks > 1:
        dist.init_process_group(
            "nccl" if use_gpu else "gloo", init_method=f"file://{directory}/rendezvous",
            rank=rank, world_size=num_ranks, timeout=timedelta(seconds=timeout_s),
        )  # fmt: skip
    try:
        found = function(Ranks.of_process_group(timeout_s), device)
        if rank == 0:
            Path(directory, "found.json").write_text(json.dumps(found))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
