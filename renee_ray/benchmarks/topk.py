"""`renee-ray bench topk`: streaming top-k beside the bare matmul and full logits + torch.topk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from renee_ray.benchmarks.problem import (
    Problem,
    check_memory,
    chunk_sizes,
    default_device,
    make_problem,
)
from renee_ray.benchmarks.timing import fastest, interleaved
from renee_ray.xfc.topk import shard_topk


def bench_topk(
    labels: int, dim: int, batch: int, k: int, repeats: int, device: torch.device | None = None
) -> dict[str, Any]:
    """Medians of `repeats` interleaved rounds, in seconds, on fp32 weights.

    Returns:
        topk_s, of `shard_topk`; gemm_s, the logits' matmul over chunks of the fastest size;
        ratio_to_gemm; torch_topk_s, full logits [B, L] and torch.topk; speedup_vs_torch;
        identical, whether scores and labels are bit for bit those of a stable sort of the full
        logits (torch.topk puts equal scores in any order); and what was timed.

    Raises:
        ReneeError: it does not fit in memory.
    """
    device = device or default_device()
    check_memory(labels, labels * (dim + 5 * batch), device)  # weights; logits, and 8-byte places
    problem = make_problem(labels, dim, batch, device)
    shard = problem.shard("fp32", 0)
    weight, inputs = shard.weights.read(0, labels), problem.embeddings

    def plain() -> tuple[Tensor, ...]:
        return tuple((inputs @ weight.T).topk(min(k, labels), dim=1))

    chunk = shard.chunks(batch)[0][1]
    matmuls = {size: bare_matmul(problem, weight, size) for size in chunk_sizes(labels, chunk)}
    taken = interleaved(
        {
            "topk": lambda: shard_topk(shard, inputs, k),
            "gemm": matmuls[fastest(matmuls, device)],
            "torch": plain,
        },
        repeats,
        device,
    )
    wanted = best_by_sorting(inputs @ weight.T, min(k, labels))
    found = shard_topk(shard, inputs, k)
    return {
        "topk_s": taken["topk"],
        "gemm_s": taken["gemm"],
        "ratio_to_gemm": taken["topk"] / taken["gemm"],
        "torch_topk_s": taken["torch"],
        "speedup_vs_torch": taken["torch"] / taken["topk"],
        "identical": all(
            torch.equal(ours[:, : min(k, labels)], theirs)
            for ours, theirs in zip(found, wanted, strict=True)
        ),
        "chunk": chunk,
        "labels": labels,
        "dim": dim,
        "batch": batch,
        "k": k,
        "threads": torch.get_num_threads(),
    }


def best_by_sorting(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(scores, labels) [B, k] of logits [B, L], equal scores by ascending label."""
    parts = [rows.sort(dim=1, descending=True, stable=True) for rows in logits.split(16)]
    scores, labels = zip(*((p.values[:, :k], p.indices[:, :k]) for p in parts), strict=True)
    return torch.cat(scores), torch.cat(labels)


def bare_matmul(problem: Problem, weight: Tensor, chunk: int) -> Callable[[], None]:
    """E W' over chunks of `weight` [L, D], into a buffer [B, chunk]."""
    inputs = problem.embeddings
    logits = inputs.new_empty(len(inputs) * chunk)

    def run() -> None:
        for rows in weight.split(chunk):
            out = logits[: len(inputs) * len(rows)].view(len(inputs), len(rows))
            torch.mm(inputs, rows.T, out=out)

    return run
