"""`renee-ray bench step`: a classifier step beside bare matmuls and ways to do without us.

What is timed, for embeddings E [B, D], all L labels in one shard:

    step        Shard.step: forward, backward and update
    gemm        only the matmuls: W E', G' W and G E over chunks, in the step's compute dtype,
                with the fastest of several chunk sizes
    parts       the operations of the step on one chunk, each alone

and of these references those that are asked for:

    published   the algorithm that the paper published (Renée, MLSys 2023, section 3) in plain
                torch: logits [B, L] in fp32, sigmoid in place, positives subtracted by index,
                the gradient [L, D] in full, SGD with momentum 0.9
    fp16        the same as it was released for GPUs (--fp16xfc): logits and products in fp16;
                weights, gradient and velocity stay fp32
    compiled    a plain step over chunks through torch.compile, in the step's compute dtype, which
                is also that of the weights; they are rounded to nearest, and have no momentum
    autograd    BCEWithLogitsLoss on dense targets [B, L], backward, torch.optim.SGD
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from renee_ray.benchmarks.problem import (
    Problem,
    check_memory,
    default_device,
    fastest,
    interleaved,
    make_problem,
    peak_extra_bytes,
)
from renee_ray.rank.recorder import gpu_memory
from renee_ray.xfc.kernels.plain import add_product, subtract_positives
from renee_ray.xfc.shard import GRADIENT_BYTES, Shard, buffer_bytes
from renee_ray.xfc.weights.rounding import scaled_e4m3
from renee_ray.xfc.weights.storages import SGD, Weights

LR = 1e-3
REFERENCE_MOMENTUM = 0.9
PART_CALLS = {"cpu": 1, "cuda": 20}
"""Calls of an operation on a chunk in one timing: on a GPU they hide the launch of the first."""


def bench_step(
    labels: int,
    dim: int,
    batch: int,
    precision: str,
    momentum: float,
    repeats: int,
    chunk: int,
    references: Sequence[str],
    check: bool,
) -> dict[str, Any]:
    """Times `repeats` interleaved rounds: medians in seconds, and the memory of the step.

    Returns:
        step_s, gemm_s, ratio_to_gemm; of each reference R, R_s and speedup_vs_R; parts, by name;
        bytes_per_weight of the shard, momentum included; peak_extra_bytes of the first step,
        beyond the shard, and planned_extra_bytes, for which chunks are chosen; `gpu_memory` after
        that step; with `check`, `errors_of_step`; and what was timed: precision, compute, chunk,
        labels, dim, batch, momentum, reference_momentum (published: 0.9 always), threads.

    Raises:
        ReneeError: it does not fit in memory.
    """
    device = default_device()
    one = Weights(precision, 1, dim, momentum > 0, device)
    check_memory(labels, labels * bytes_a_label(one, batch, references) // 4, device)
    problem = make_problem(labels, dim, batch, device)
    shard, positives = problem.shard(precision, momentum, chunk), problem.positives()
    weights, chunk = shard.weights, shard.chunks(batch)[0][1]
    step = partial(shard.step, problem.embeddings, positives, SGD(LR, momentum))
    # Freed memory that is still resident would hide some of the step's own buffers.
    extra = max(peak_extra_bytes(step, device), weights.scratch.nbytes())
    memory = gpu_memory(device)
    errors = errors_of_step(shard, problem, momentum) if check else {}
    bare = problem.embeddings.new_empty(labels, dim, dtype=weights.compute_dtype).normal_(std=0.02)
    functions: dict[str, Callable[[], object]] = {"step": step}
    functions["gemm"] = fastest(partial(bare_matmuls, problem, bare), labels, chunk, device)
    compared = {name: reference(name, problem, shard, momentum) for name in references}
    taken = interleaved(functions | compared, repeats, device)
    times = {f"{name}_s": seconds for name, seconds in taken.items()}
    ratios = {f"speedup_vs_{name}": taken[name] / taken["step"] for name in references}
    each = chunk * buffer_bytes(batch, weights, shard.operations) + GRADIENT_BYTES * batch * dim
    return {
        **times,
        "ratio_to_gemm": taken["step"] / taken["gemm"],
        **ratios,
        "parts": interleaved(chunk_parts(shard, problem), repeats, device, PART_CALLS[device.type]),
        "bytes_per_weight": weights.nbytes() / (labels * dim),
        "peak_extra_bytes": extra,
        "planned_extra_bytes": len(shard.lanes(batch)) * each,
        **memory,
        **errors,
        "precision": weights.precision,
        "compute": str(weights.compute_dtype).removeprefix("torch."),
        "chunk": chunk,
        "labels": labels, "dim": dim, "batch": batch, "momentum": momentum,
        "reference_momentum": REFERENCE_MOMENTUM,
        "threads": torch.get_num_threads(),
    }  # fmt: skip


def bytes_a_label(weights: Weights, batch: int, references: Sequence[str]) -> int:
    """Returns the bytes of a label in all that is timed at once, at most; weights: those of one."""
    dim = weights.dim
    each = {
        "published": 12 * dim + 4 * batch,  # weight, velocity, gradient; logits
        "fp16": 16 * dim + 2 * batch,  # the same, with copies of weight and gradient
        "compiled": 8 * dim,  # fp32 at first, and its copy
        "autograd": 16 * dim + 20 * batch,  # and torch's own copies of the logits
    }
    return weights.nbytes() + 4 * dim + sum(each[name] for name in references)


def reference(name: str, problem: Problem, shard: Shard, momentum: float) -> Callable[[], object]:
    """Returns a step of the reference of that name, see above."""
    if name == "autograd":
        return autograd(problem, momentum)
    if name == "compiled":
        chunk = shard.chunks(len(problem.embeddings))[0][1]
        return compiled(problem, chunk, shard.weights.compute_dtype)
    dtype = torch.float16 if name == "fp16" else torch.float32
    return published(problem, REFERENCE_MOMENTUM, dtype)


def chunk_parts(shard: Shard, problem: Problem) -> dict[str, Callable[[], object]]:
    """Returns the operations of a step on the shard's first chunk, as `xfc.shard` makes them."""
    weights, operations, inputs = shard.weights, shard.operations, problem.embeddings
    start, stop = chunk = shard.chunks(len(inputs))[0]
    expand, wide = partial(weights.operand, start, stop), inputs.to(weights.compute_dtype)
    operand, total = expand(), torch.zeros_like(inputs)
    out = wide.new_zeros(len(operand), operations.padded(len(inputs)))[:, : len(inputs)]
    ((rows, columns, _),) = problem.positives().by_chunk([chunk])
    factors, scales = (operand, wide), list[Tensor]()
    if operations.scaled:
        narrow, *scales = scaled_e4m3(inputs)
        factors = weights.operand(*chunk, torch.float8_e4m3fn), narrow
    sgd = SGD(LR, REFERENCE_MOMENTUM if weights.velocity else 0.0)
    residual = partial(operations.residual, *factors, columns, rows, out, None, *scales)
    residual()
    return {
        "expansion": expand,
        "residual": residual,
        "gradient": partial(add_product, total, out.T, operand, 1, 1, weights.scratch),
        "update": partial(operations.update(weights, sgd, 0), start, stop, operand, out, wide),
    }


def errors_of_step(shard: Shard, problem: Problem, momentum: float) -> dict[str, float]:
    """Makes a step; returns how far dE, loss and new weights are from autograd's in float64.

    Errors are relative, in norms. The first velocities are those that earlier steps have left.
    """
    labels, weights = problem.num_labels, shard.weights
    inputs = problem.embeddings.double().requires_grad_()
    weight = weights.read(0, labels).double().requires_grad_()
    target = torch.zeros(labels, len(inputs), dtype=torch.float64, device=inputs.device)
    target[problem.labels.to(inputs.device), problem.rows.to(inputs.device)] = 1
    loss = nn.BCEWithLogitsLoss(reduction="sum")(weight @ inputs.T, target)
    loss.backward()
    gradient, change = inputs.grad, weight.grad
    assert gradient is not None and change is not None
    if weights.velocity is not None:
        change += momentum * weights.velocities(0, labels).double()
    seen: list[Tensor] = []
    found = shard.step(
        problem.embeddings, problem.positives(), SGD(0.01, momentum, seed=1, step=1),
        with_loss=True, on_gradient=lambda gradient: seen.append(gradient.double()),
    )  # fmt: skip
    pairs = {
        "gradient_error": (seen[0], gradient),
        "loss_error": (found, loss.detach()),
        "weight_error": (weights.read(0, labels) - weight.detach(), -0.01 * change),
    }
    return {key: float((a - b).norm() / b.norm()) for key, (a, b) in pairs.items()}


def bare_matmuls(problem: Problem, weight: Tensor, chunk: int) -> Callable[[], None]:
    """Returns the three products of every chunk of a matrix [L, D], into buffers of a chunk."""
    inputs = problem.embeddings.to(weight.dtype)
    batch, dim = inputs.shape
    logits, gradient = inputs.new_empty(chunk, batch), inputs.new_empty(chunk, dim)
    back = torch.empty_like(inputs)

    def run() -> None:
        for start in range(0, problem.num_labels, chunk):
            rows = weight[start : start + chunk]
            residual = torch.mm(rows, inputs.T, out=logits[: len(rows)])
            torch.mm(residual.T, rows, out=back)
            torch.mm(residual, inputs, out=gradient[: len(rows)])

    return run


def published(
    problem: Problem, momentum: float, dtype: torch.dtype = torch.float32
) -> Callable[[], Tensor]:
    """Returns a step of the published algorithm, with logits and products in `dtype`."""
    inputs = problem.embeddings.to(dtype)
    rows, labels = problem.rows.to(inputs.device), problem.labels.to(inputs.device)
    weight = problem.shard("fp32", 0).weights.read(0, problem.num_labels)
    velocity = torch.zeros_like(weight)

    def run() -> Tensor:
        narrow = weight.to(dtype)
        logits = inputs @ narrow.T
        logits.sigmoid_()
        logits[rows, labels] -= 1
        back = (logits @ narrow).float()
        gradient = (logits.T @ inputs).float()
        velocity.mul_(momentum).add_(gradient)
        weight.sub_(velocity, alpha=LR)
        return back

    return run


def compiled(problem: Problem, chunk: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    """Returns a plain step in `dtype` over chunks, through torch.compile."""
    inputs, labels = problem.embeddings.to(dtype), problem.num_labels
    weight = problem.shard("fp32", 0).weights.read(0, labels).to(dtype)
    chunks = [(start, min(start + chunk, labels)) for start in range(0, labels, chunk)]
    pairs = problem.positives().by_chunk(chunks)
    back = torch.zeros_like(problem.embeddings)

    torch.compiler.reset()  # another size than before would count as one more graph of the same

    @torch.compile
    def part(weight: Tensor, columns: Tensor, rows: Tensor) -> None:
        residual = subtract_positives(weight @ inputs.T, columns, rows)
        back.add_(residual.T @ weight)
        weight.sub_(residual @ inputs, alpha=LR)

    def run() -> Tensor:
        back.zero_()
        for (start, stop), (rows, columns, _) in zip(chunks, pairs, strict=True):
            part(weight[start:stop], columns, rows)
        return back

    return run


def autograd(problem: Problem, momentum: float) -> Callable[[], Tensor]:
    """Returns a step as torch users write it."""
    inputs = problem.embeddings.clone().requires_grad_()
    weight = problem.shard("fp32", 0).weights.read(0, problem.num_labels).requires_grad_()
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
