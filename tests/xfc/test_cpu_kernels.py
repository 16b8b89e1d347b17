"""The compiled loops against float64 and against plain torch with the same noise."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch

from renee_ray.xfc.kernels.choose import Operations
from renee_ray.xfc.kernels.cpu_update import FusedUpdate, update_loop
from renee_ray.xfc.kernels.plain import Update, residual
from renee_ray.xfc.labels import LabelRange
from renee_ray.xfc.shard import Pairs, Shard
from renee_ray.xfc.topk import cpu_loops
from renee_ray.xfc.weights.rounding import PERIOD
from renee_ray.xfc.weights.storages import SGD, Weights

CPU = torch.device("cpu")
LABELS, BATCH, DIM = 150, 7, 43
SINGLE = 2.0**-21
"""Error of a few operations in fp32, relative to the largest number that they meet."""
STORED = ("bf16_split", "bf16_sr", "fp8_sr")
CASES = list(product(STORED, (torch.float32, torch.bfloat16), (0.0, 0.9)))
"""(storage, dtype of the matmuls, momentum); a loop is compiled for each."""
SPACING = {
    ("bf16_sr", "weight"): 2.0**-7,
    ("bf16_sr", "velocity"): 2.0**-7,
    ("fp8_sr", "weight"): 2.0**-3,
    ("fp8_sr", "velocity"): 2.0**-7,
}
"""Of the stored numbers, relative to them."""


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_weights(precision: str, compute: torch.dtype, momentum: float) -> Weights:
    weights = Weights(precision, LABELS, DIM, momentum > 0, CPU, compute)
    weights.weight.write(0, LABELS, normal(LABELS, DIM, seed=1))
    if weights.velocity is not None:
        weights.velocity.write(0, LABELS, normal(LABELS, DIM, seed=2))
    return weights


def numbers(weights: Weights) -> dict[str, torch.Tensor]:
    found = {"weight": weights.read(0, LABELS).clone()}
    if weights.velocity is not None:
        found["velocity"] = weights.velocities(0, LABELS).clone()
    return found


def factors(compute: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Residuals and inputs whose product is exact in any order, and if rounded to bf16."""
    left = (normal(LABELS, BATCH, seed=3) * 2).round().clamp(-4, 4) / 4
    right = (normal(BATCH, DIM, seed=4) / 2).round().clamp(-1, 1)
    return left.to(compute), right.to(compute)


def updated(
    operation: type[Update],
    case: tuple[str, torch.dtype, float],
    first: int = 0,
    seed: int = 5,
) -> dict[str, torch.Tensor]:
    """After one update in chunks of 70 and 80 labels."""
    precision, compute, momentum = case
    weights = make_weights(precision, compute, momentum)
    update = operation(weights, SGD(0.3, momentum, 0.1, seed, step=3), first)
    left, right = factors(compute)
    for start, stop in ((0, 70), (70, LABELS)):
        update(start, stop, weights.operand(start, stop), left[start:stop], right)
    return numbers(weights)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_update_is_that_of_plain_torch(case: tuple[str, torch.dtype, float]) -> None:
    """Rounded with the same noise, so bit for bit, but where the last bit of fp32 decides."""
    for first in (0, PERIOD - 50, 2**40 + PERIOD - 100):
        compare_with_plain_torch(case, first)


def compare_with_plain_torch(case: tuple[str, torch.dtype, float], first: int) -> None:
    found, plain = (updated(each, case, first) for each in (FusedUpdate, Update))
    other = updated(FusedUpdate, case, first, seed=6)
    assert found.keys() == plain.keys()
    for name, ours in found.items():
        theirs, spacing = plain[name], SPACING.get((case[0], name), 0.0)
        apart = (ours - theirs).abs()
        assert (apart <= 1.01 * spacing * theirs.abs() + 8 * SINGLE + spacing * 2.0**-6).all()
        if spacing:
            assert (apart > 0).double().mean() < 1e-3, name
            assert (other[name] != ours).double().mean() > 0.1, "other noise is noticed"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_update_is_the_exact_one_rounded_to_a_neighbour(
    case: tuple[str, torch.dtype, float],
) -> None:
    before = {name: t.double() for name, t in numbers(make_weights(*case)).items()}
    left, right = (each.double() for each in factors(case[1]))
    step = left @ right + 0.1 * before["weight"]
    if case[2]:
        step += case[2] * before["velocity"]
    exact = {"weight": before["weight"] - 0.3 * step, "velocity": step}
    for name, ours in updated(FusedUpdate, case).items():
        spacing = SPACING.get((case[0], name), 0.0)
        error = ours.double() - exact[name]
        # The spacing of e4m3 is nowhere below 2**-9; step and weight are below 16.
        least = 16 * SINGLE + (2.0**-9 if spacing == 2.0**-3 else 0.0)
        assert (error.abs() <= spacing * exact[name].abs() + least).all(), name
        # Decay, momentum and the gradient are each far larger than the tolerance of the mean.
        assert abs(float(error.mean())) < 0.02, name


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_split_keeps_every_bit_of_an_update_in_fp32(momentum: float) -> None:
    case = ("bf16_split", torch.bfloat16, momentum)
    before = numbers(make_weights(*case))
    left, right = (each.float() for each in factors(torch.bfloat16))
    step = left @ right + before["weight"] * 0.1
    if momentum:
        step = step + before["velocity"] * momentum
    found = updated(FusedUpdate, case)
    assert torch.equal(found["weight"], before["weight"] - step * 0.3)
    assert momentum == 0 or torch.equal(found["velocity"], step)


def test_every_code_of_e4m3_is_written_as_it_was_read() -> None:
    weights = Weights("fp8_sr", 32, 8, False, CPU, torch.float32)
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(32, 8)
    stored = weights.weight.tensors()[""].view(torch.uint8)
    stored.copy_(codes)
    update = FusedUpdate(weights, SGD(0.0, 0.0), 0)
    update(0, 32, weights.operand(0, 32), torch.zeros(32, 1), torch.zeros(1, 8))
    assert torch.equal(stored, codes)


def test_e4m3_saturates() -> None:
    weights = Weights("fp8_sr", 3, 8, False, CPU, torch.float32)
    values = torch.tensor([[1e6, -1e6, math.inf, -math.inf, 460.0, -460.0, 448.0, 0.0]])
    update = FusedUpdate(weights, SGD(-1.0, 0.0), 0)
    update(0, 3, weights.operand(0, 3), torch.ones(3, 1), values)
    assert torch.equal(weights.read(0, 3), values.clamp(-448, 448).expand(3, 8))


@pytest.mark.parametrize("precision", STORED)
def test_what_is_not_a_number_is_seen_in_the_weights(precision: str) -> None:
    weights = make_weights(precision, torch.float32, 0.9)
    inputs = torch.ones(1, DIM)
    inputs[0, 5] = math.nan
    update = FusedUpdate(weights, SGD(0.1, 0.9), 0)
    update(0, LABELS, weights.operand(0, LABELS), torch.ones(LABELS, 1), inputs)
    for found in numbers(weights).values():
        assert found[:, 5].isnan().all()
        assert found.isnan().sum() == LABELS


@pytest.mark.parametrize("precision", STORED)
def test_a_shard_takes_them_on_a_cpu_and_trains_as_plain_torch(precision: str) -> None:
    trained = []
    for operations in (None, Operations(residual, Update)):
        weights = make_weights(precision, torch.float32, 0.0)
        shard = Shard(LabelRange(0, LABELS, LABELS), weights, 64, operations)
        pairs = Pairs(torch.arange(BATCH), torch.arange(BATCH) * 9, shard.owned)
        for step in range(3):
            rule = SGD(0.01, 0.0, 0.01, seed=2, step=step)
            shard.step(normal(BATCH, DIM, seed=10 + step), pairs, rule)
        assert shard.operations.update is (FusedUpdate if operations is None else Update)
        trained.append(numbers(weights)["weight"])
    ours, theirs = trained
    # A number on the edge of its two neighbours may go the other way, and one is far apart in fp8.
    tolerance = {"bf16_sr": 1e-3, "fp8_sr": 2e-2}.get(precision, 1e-6)
    assert (ours - theirs).norm() < tolerance * theirs.norm()
    start = numbers(make_weights(precision, torch.float32, 0.0))["weight"]
    assert (theirs - start).norm() > 2 * tolerance * start.norm(), "the steps are larger"


def test_nothing_is_compiled_in_the_first_step() -> None:
    weights = Weights("bf16_sr", LABELS, DIM, True, CPU, torch.float32)
    Shard(LabelRange(0, LABELS, LABELS), weights)
    loop = update_loop("fp32", "bf16", "bf16")
    before = len(loop.signatures)  # type: ignore[attr-defined]
    assert before
    left, right = factors(torch.float32)
    FusedUpdate(weights, SGD(0.1), 0)(0, LABELS, weights.operand(0, LABELS), left, right)
    assert len(loop.signatures) == before  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "kind",
    ["random", "few values", "equal", "rising", "falling", "infinite", "zeros", "subnormal"],
)
def test_selection_is_that_of_a_sort(kind: str) -> None:
    rng = np.random.default_rng(7)
    for count in (1, 2, 3, 10, 257):
        values = {
            "random": rng.standard_normal(count),
            "few values": rng.integers(0, 3, count),
            "equal": np.ones(count),
            "rising": np.arange(count),
            "falling": -np.arange(count),
            "infinite": rng.choice([-np.inf, 0, np.inf], count),
            "zeros": rng.choice([-1.0, -0.0, 0.0, 1.0], count),
            "subnormal": rng.standard_normal(count) * 1e-41,
        }[kind].astype(np.float32)
        for k in {1, 2, count // 2, count - 1, count} & set(range(1, count + 1)):
            assert cpu_loops._kth_largest(values, k) == np.sort(values)[count - k]
