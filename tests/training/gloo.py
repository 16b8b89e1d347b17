"""Runs a function on R gloo processes, as Ray Train would, and collects the results.

They are forked from one process that has done no more than import and compile: to do so anew in
each of them took most of the quick tests' time.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from renee_ray.rank.collectives import Ranks

multiprocessing.set_forkserver_preload(
    [
        "renee_ray.service.train.train",
        "transformers.models.bert.modeling_bert",
        "tests.training.compiled",
    ]
)


def on_ranks(num_ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """[function(ranks, *args) of each rank]; what it returns must be tensors in containers."""
    with tempfile.TemporaryDirectory() as directory:
        mp.start_processes(
            _worker,
            (num_ranks, directory, function, args),
            nprocs=num_ranks,
            start_method="forkserver",
        )
        return [
            torch.load(Path(directory, f"{rank}.pt"), weights_only=True)
            for rank in range(num_ranks)
        ]


def _worker(
    rank: int, num_ranks: int, directory: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if num_ranks > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=num_ranks
        )
    try:
        result = function(Ranks.of_process_group(), *args)
        torch.save(result, Path(directory, f"{rank}.pt"))
    finally:
        if num_ranks > 1:
            dist.destroy_process_group()
