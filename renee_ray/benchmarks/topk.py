"""`renee-ray bench topk`: streaming top-k beside the bare matmul and full logits + torch.topk."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
from renee_ray.xfc.topk.select import NONE, shard_topk

CHECKED = 4096
"""Labels whose exact scores are computed at once."""


def bench_topk(
    labels: int, dim: int, batch: int, k: int, repeats: int, device: torch.device | None = None
) -> dict[str, Any]:
    """Times `repeats` interleaved rounds on fp32 weights: medians, in seconds.

    Returns:
        topk_s, of `shard_topk`; gemm_s, the logits' matmul over chunks of the fastest size;
        ratio_to_gemm; torch_topk_s, full logits [B, L] and torch.topk; speedup_vs_torch; the
        figures of `quality`; and what was timed.

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
    return {
        "topk_s": taken["topk"],
        "gemm_s": taken["gemm"],
        "ratio_to_gemm": taken["topk"] / taken["gemm"],
        "torch_topk_s": taken["torch"],
        "speedup_vs_torch": taken["torch"] / taken["topk"],
        **quality(shard_topk(shard, inputs, k), inputs, weight),
        "chunk": chunk,
        "labels": labels,
        "dim": dim,
        "batch": batch,
        "k": k,
        "threads": torch.get_num_threads(),
    }


def quality(found: tuple[Tensor, Tensor], inputs: Tensor, weight: Tensor) -> dict[str, Any]:
    """Compares a top-k (scores, labels) [B, k] with the exact scores of all labels.

    Returns:
        same_but_ties and greatest_difference, of `against_exact` in float64, and rounding, the
        greatest that it allows; identical, whether scores and labels are bit for bit those of a
        stable sort of the full logits, which depends on the device (see `xfc/topk/select.py`).
    """
    labels, allowed = len(weight), rounding(inputs, weight)
    k = min(found[0].shape[1], labels)
    by_sorting = best_by_sorting(inputs @ weight.T, k)
    exact = (
        (start, inputs.double() @ weight[start : start + CHECKED].double().T)
        for start in range(0, labels, CHECKED)
    )
    same, difference = against_exact(found, exact, allowed)
    return {
        "identical": all(
            torch.equal(ours[:, :k], theirs) for ours, theirs in zip(found, by_sorting, strict=True)
        ),
        "same_but_ties": same,
        "greatest_difference": difference,
        "rounding": float(allowed.max()),
    }


def rounding(inputs: Tensor, weight: Tensor) -> Tensor:
    """Returns the bound of `xfc/topk/select.py` on the rounding of a row's scores, float64 [B]."""
    longest = torch.linalg.vector_norm(weight, dim=1).max().double()
    lengths = torch.linalg.vector_norm(inputs.double(), dim=1)
    return inputs.shape[1] * 1.01 * 2.0**-24 * lengths * longest


def against_exact(
    found: tuple[Tensor, Tensor], exact: Iterable[tuple[int, Tensor]], allowed: Tensor
) -> tuple[bool, float]:
    """Compares a top-k with exact scores z.

    It is the same but for ties if no label comes twice; scores descend, of equal ones the smaller
    label first; each is within `allowed` of its label's z; and no other label has a z that is
    greater than the last score by more. A label then precedes all whose z is less by more than
    twice that.

    Args:
        found: (scores float32 [B, k], labels int64 [B, k]), `NONE` where there is none.
        exact: (first label, z float64 [B, c]) of all labels, chunk by chunk; is overwritten.
        allowed: float64 [B].

    Returns:
        whether it is the same but for ties, and the greatest |score - z|.
    """
    scores, labels = found[0].double(), found[1]
    own, others = torch.full_like(scores, -torch.inf), torch.full_like(allowed, -torch.inf)
    for first, z in exact:
        here = (labels >= first) & (labels < first + z.shape[1])
        rows, places = here.nonzero(as_tuple=True)
        columns = labels[rows, places] - first
        own[rows, places] = z[rows, columns]
        z[rows, columns] = -torch.inf
        others = torch.maximum(others, z.amax(dim=1))
    off = torch.where(own == scores, 0.0, (own - scores).abs())
    falls = scores[:, :-1] > scores[:, 1:]
    rises = (labels[:, :-1] < labels[:, 1:]) | (labels[:, 1:] == NONE)
    ordered = falls | ((scores[:, :-1] == scores[:, 1:]) & rises)
    in_order = labels.sort(dim=1).values
    twice = (in_order[:, :-1] == in_order[:, 1:]) & (in_order[:, 1:] != NONE)
    within = (off <= allowed[:, None]).all() & (others <= scores[:, -1] + allowed).all()
    return bool(within & ordered.all() & ~twice.any()), float(off.max())


def best_by_sorting(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns (scores, labels) [B, k] of logits [B, L], equal scores by ascending label."""
    parts = [rows.sort(dim=1, descending=True, stable=True) for rows in logits.split(16)]
    scores, labels = zip(*((p.values[:, :k], p.indices[:, :k]) for p in parts), strict=True)
    return torch.cat(scores), torch.cat(labels)


def bare_matmul(problem: Problem, weight: Tensor, chunk: int) -> Callable[[], None]:
    """Returns E W' over chunks of `weight` [L, D], into a buffer [B, chunk]."""
    inputs = problem.embeddings
    logits = inputs.new_empty(len(inputs) * chunk)

    def run() -> None:
        for rows in weight.split(chunk):
            out = logits[: len(inputs) * len(rows)].view(len(inputs), len(rows))
            torch.mm(inputs, rows.T, out=out)

    return run
