"""`renee-ray bench topk`: streaming top-k beside the bare matmul and full logits + torch.topk."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from renee_ray.benchmarks.problem import (
    check_memory,
    default_device,
    fastest,
    interleaved,
    make_problem,
    peak_extra_bytes,
)
from renee_ray.xfc.topk.select import NONE, shard_topk
from renee_ray.xfc.weights.storages import Weights

MATMULS = ("product", "gemm")
CHECKED = 4096
"""Labels whose exact scores are computed at once."""


def bench_topk(
    labels: int,
    dim: int,
    batch: int,
    k: int,
    repeats: int,
    precision: str,
    references: str,
) -> dict[str, Any]:
    """Times `repeats` interleaved rounds: medians, in seconds.

    Returns:
        topk_s, of `shard_topk`; product_s, the logits' matmul in the dtype of the storage, over
        chunks of the fastest size; ratio_to_product; with references gemm_s and ratio_to_gemm, of
        fp32 weights, and torch_topk_s, full logits [B, L] and torch.topk, and speedup_vs_torch;
        the figures of `quality`; peak_extra_bytes of a top-k; and what was timed.

    Raises:
        ReneeError: it does not fit in memory.
    """
    device, compared = default_device(), references == "all"
    stored = Weights(precision, 4, dim, False, device).nbytes() // 16  # of a label, as fp32
    # References take the weights again, and logits with 8-byte places.
    check_memory(labels, labels * (stored + (dim + 5 * batch) * compared), device)
    problem = make_problem(labels, dim, batch, device)
    shard, inputs = problem.shard(precision, 0), problem.embeddings
    chunk, weights = shard.chunks(batch)[0][1], shard.weights

    def product(dtype: torch.dtype, read: Callable[[int, int], Tensor]) -> Callable[[], object]:
        matmuls = partial(bare_matmul, inputs.to(dtype), read, labels)
        return fastest(matmuls, labels, chunk, device)

    timed: dict[str, Callable[[], object]] = {
        "topk": lambda: shard_topk(shard, inputs, k),
        "product": product(weights.compute_dtype, weights.operand),
    }
    weight = weights.weight.read(0, labels) if compared else None
    if weight is not None:
        timed["gemm"] = product(torch.float32, lambda start, stop: weight[start:stop])
        timed["torch_topk"] = lambda: (inputs @ weight.T).topk(min(k, labels), dim=1)
    taken = interleaved(timed, repeats, device)
    topk = taken["topk"]
    ratios = {f"ratio_to_{name}": topk / taken[name] for name in taken if name in MATMULS}
    if compared:
        ratios["speedup_vs_torch"] = taken["torch_topk"] / topk
    return {
        **{f"{name}_s": seconds for name, seconds in taken.items()},
        **ratios,
        **quality(shard_topk(shard, inputs, k), inputs, weights),
        "peak_extra_bytes": peak_extra_bytes(timed["topk"], device),
        "weight_bytes": weights.nbytes(),
        "precision": weights.precision,
        "chunk": chunk,
        "labels": labels, "dim": dim, "batch": batch, "k": k,
        "threads": torch.get_num_threads(),
    }  # fmt: skip


def quality(found: tuple[Tensor, Tensor], inputs: Tensor, weights: Weights) -> dict[str, Any]:
    """Compares a top-k (scores, labels) [B, k] with the exact scores of all labels.

    Returns:
        same_but_ties and greatest_difference, of `against_exact` in float64, and rounding, the
        greatest that it allows.
    """
    starts = range(0, weights.rows, CHECKED)
    parts = [(start, min(start + CHECKED, weights.rows)) for start in starts]
    allowed = torch.stack([rounding(inputs, weights.read(*part)) for part in parts]).amax(dim=0)
    exact = ((part[0], inputs.double() @ weights.read(*part).double().T) for part in parts)
    same, difference = against_exact(found, exact, allowed)
    return {
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


def bare_matmul(
    inputs: Tensor, read: Callable[[int, int], Tensor], labels: int, chunk: int
) -> Callable[[], None]:
    """Returns E W' over chunks that `read` gives, into a buffer [B, chunk]; fp32 on a GPU."""
    wide = {"out_dtype": torch.float32} if inputs.is_cuda else {}
    kind = torch.float32 if inputs.is_cuda else inputs.dtype
    logits = torch.empty(len(inputs) * chunk, dtype=kind, device=inputs.device)

    def run() -> None:
        for start in range(0, labels, chunk):
            rows = read(start, min(start + chunk, labels))
            out = logits[: len(inputs) * len(rows)].view(len(inputs), len(rows))
            torch.mm(inputs, rows.T, out=out, **wide)

    return run
