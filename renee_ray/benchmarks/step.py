"""`renee-ray bench step`: a classifier step beside bare matmuls and two ways to do without us.

What is timed, for embeddings E [B, D], all L labels in one shard:

    step        Shard.step: forward, backward and update
    gemm        only the matmuls: W E', G' W and G E over chunks, in the step's compute dtype,
                with the fastest of several chunk sizes
    reference   the algorithm that the paper published (Renée, MLSys 2023, section 3) in plain
                torch: logits [B, L] in fp32, sigmoid in place, positives subtracted by index,
                the gradient [L, D] in full, SGD with momentum 0.9
    autograd    BCEWithLogitsLoss on dense targets [B, L], backward, torch.optim.SGD
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from renee_ray.benchmarks.problem import (
    Problem,
    check_memory,
    chunk_sizes,
    default_device,
    make_problem,
)
from renee_ray.benchmarks.timing import fastest, interleaved, peak_extra_bytes
from renee_ray.xfc.weights.storages import SGD

LR = 1e-3
REFERENCE_MOMENTUM = 0.9


def bench_step(
    labels: int,
    dim: int,
    batch: int,
    precision: str,
    momentum: float,
    repeats: int,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Times `repeats` interleaved rounds: medians in seconds, and the memory of the step.

    Returns:
        step_s, gemm_s, ratio_to_gemm, reference_s, speedup_vs_reference, autograd_s;
        bytes_per_weight of the shard, momentum included; peak_extra_bytes of the first step,
        beyond the shard; and what was timed: precision, compute, chunk, labels, dim, batch,
        momentum, reference_momentum (the published algorithm has 0.9 always), threads.

    Raises:
        ReneeError: it does not fit in memory.
    """
    device = device or default_device()
    # Weights, their velocities and gradients, of all that is compared; logits, targets, residuals.
    check_memory(labels, labels * (12 * dim + 6 * batch), device)
    problem = make_problem(labels, dim, batch, device)
    shard, positives = problem.shard(precision, momentum), problem.positives()
    weights = shard.weights
    sgd = SGD(LR, momentum)

    def step() -> None:
        shard.step(problem.embeddings, positives, sgd)

    # Freed memory that is still resident would hide some of the step's own buffers.
    extra = max(peak_extra_bytes(step, device), weights.scratch.nbytes())
    chunk = shard.chunks(batch)[0][1]
    functions = {
        "step": step,
        "gemm": fastest_matmuls(problem, chunk, weights.compute_dtype),
        "reference": reference(problem, REFERENCE_MOMENTUM),
        "autograd": autograd(problem, momentum),
    }
    taken = interleaved(functions, repeats, device)
    return {
        "step_s": taken["step"],
        "gemm_s": taken["gemm"],
        "ratio_to_gemm": taken["step"] / taken["gemm"],
        "reference_s": taken["reference"],
        "speedup_vs_reference": taken["reference"] / taken["step"],
        "autograd_s": taken["autograd"],
        "bytes_per_weight": weights.nbytes() / (labels * dim),
        "peak_extra_bytes": extra,
        "precision": weights.precision,
        "compute": str(weights.compute_dtype).removeprefix("torch."),
        "chunk": chunk,
        "labels": labels,
        "dim": dim,
        "batch": batch,
        "momentum": momentum,
        "reference_momentum": REFERENCE_MOMENTUM,
        "threads": torch.get_num_threads(),
    }


def fastest_matmuls(problem: Problem, chunk: int, dtype: torch.dtype) -> Callable[[], None]:
    """Returns the bare matmuls of the chunk size that is fastest on this machine."""
    sizes = chunk_sizes(problem.num_labels, chunk)
    functions = {size: bare_matmuls(problem, size, dtype) for size in sizes}
    return functions[fastest(functions, problem.embeddings.device)]


def bare_matmuls(problem: Problem, chunk: int, dtype: torch.dtype) -> Callable[[], None]:
    """Returns the three products of every chunk of a matrix [L, D], into buffers of a chunk."""
    inputs = problem.embeddings.to(dtype)
    batch, dim = inputs.shape
    weight = inputs.new_zeros(problem.num_labels, dim).normal_(std=0.02)
    logits, gradient = inputs.new_empty(chunk, batch), inputs.new_empty(chunk, dim)
    back = torch.empty_like(inputs)

    def run() -> None:
        for start in range(0, problem.num_labels, chunk):
            rows = weight[start : start + chunk]
            residual = torch.mm(rows, inputs.T, out=logits[: len(rows)])
            torch.mm(residual.T, rows, out=back)
            torch.mm(residual, inputs, out=gradient[: len(rows)])

    return run


def reference(problem: Problem, momentum: float) -> Callable[[], Tensor]:
    """Returns a step of the published algorithm on one weight matrix; it returns dE [B, D]."""
    inputs = problem.embeddings
    rows, labels = problem.rows.to(inputs.device), problem.labels.to(inputs.device)
    weight = problem.shard("fp32", 0).weights.read(0, problem.num_labels)
    velocity = torch.zeros_like(weight)

    def run() -> Tensor:
        logits = inputs @ weight.T
        logits.sigmoid_()
        logits[rows, labels] -= 1
        back = logits @ weight
        gradient = logits.T @ inputs
        velocity.mul_(momentum).add_(gradient)
        weight.sub_(velocity, alpha=LR)
        return back

    return run


def autograd(problem: Problem, momentum: float) -> Callable[[], Tensor]:
    """Returns a step as torch users write it; it returns dE [B, D]."""
    inputs = problem.embeddings.clone().requires_grad_()
    start = problem.shard("fp32", 0).weights.read(0, problem.num_labels)
    weight = start.clone().requires_grad_()
    target = torch.zeros(len(inputs), problem.num_labels, device=inputs.device)
    target[problem.rows.to(inputs.device), problem.labels.to(inputs.device)] = 1
    loss = nn.BCEWithLogitsLoss(reduction="sum")
    optimizer = torch.optim.SGD([weight], LR, momentum=momentum)

    def run() -> Tensor:
        inputs.grad = None
        optimizer.zero_grad(set_to_none=True)
        loss(inputs @ weight.T, target).backward()
        optimizer.step()
        assert inputs.grad is not None
        return inputs.grad

    return run
