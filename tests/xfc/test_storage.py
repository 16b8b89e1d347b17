"""Storage of a shard: bf16_split is fp32 in two halves, and the update is torch.optim.SGD's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from renee_ray.xfc.kernels.plain import Update
from renee_ray.xfc.weights.buffers import E4M3, BFloat16, Float32, Half, Split
from renee_ray.xfc.weights.scratch import Scratch
from renee_ray.xfc.weights.storages import SGD, STORAGES, Weights
from tests.pairwise import pairwise

CPU = torch.device("cpu")
LARGEST_BF16 = 3.3895313892515355e38


def random_bits(n: int) -> torch.Tensor:
    """fp32 [n, 4] of uniformly random bits, subnormals, signed zeros and large numbers among
    them; without inf, NaN and what would round to an infinite bf16."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, (n, 4), dtype=np.uint32)
    bits[: n // 8] &= 0x807FFFFF  # subnormals
    bits[n // 8 : n // 4] &= 0xFFFF0000  # nothing in the low half
    bits[n // 4 : n // 4 + n // 8] = (bits[n // 4 : n // 4 + n // 8] & 0xFFFF0000) | 0x8000  # ties
    bits[0] = [0, 0x80000000, 1, 0x80000001]
    values = torch.from_numpy(bits.view(np.float32))
    fits = values.isfinite() & (values.abs().double() <= LARGEST_BF16)
    return torch.where(fits, values, torch.tensor(-1.2345678))


def bits_of(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(torch.int32)


def test_split_keeps_every_bit() -> None:
    values = random_bits(40_000)
    buffer = Split(len(values), 4, CPU, Scratch(CPU))
    buffer.write(0, len(values), values)
    assert torch.equal(bits_of(buffer.read(0, len(values))), bits_of(values))
    assert (values.abs() < 2**-126).sum() > 1000, "subnormals must be among them"
    # The test can fail: the high half alone is another number nearly everywhere.
    assert (buffer.data.float() != values).float().mean() > 0.5


def test_split_keeps_every_bit_in_any_range() -> None:
    values = random_bits(64)
    buffer = Split(64, 4, CPU, Scratch(CPU))
    for start in range(0, 64, 7):
        stop = min(start + 7, 64)
        buffer.write(start, stop, values[start:stop])
    for start, stop in [(0, 64), (3, 5), (10, 10), (63, 64)]:
        assert torch.equal(bits_of(buffer.read(start, stop)), bits_of(values[start:stop]))


def test_the_high_half_is_the_nearest_bf16() -> None:
    values = random_bits(40_000)
    buffer = Split(len(values), 4, CPU, Scratch(CPU))
    buffer.write(0, len(values), values)
    high = buffer.operand(0, len(values), torch.bfloat16)
    assert high is not None and high.dtype == torch.bfloat16
    error = (high.double() - values.double()).abs()
    nearest = (values.bfloat16().double() - values.double()).abs()
    assert torch.equal(error, nearest), "equal distances: ties may go either way"
    truncated = (bits_of(values) & ~0xFFFF).view(torch.float32)
    assert ((truncated.double() - values.double()).abs() > nearest).any()


COMPUTE = [(name, storage.compute) for name, storage in STORAGES.items()]
ALIASED = [pair for pair in COMPUTE if pair[0] != "fp8_sr"]


@pytest.mark.parametrize(("precision", "compute"), ALIASED)
def test_operands_in_the_own_dtype_alias_the_storage(precision: str, compute: torch.dtype) -> None:
    weights = Weights(precision, 10, 4, False, CPU, compute)
    operand = weights.operand(2, 5)
    assert operand.dtype == compute
    assert operand.data_ptr() in {t[2:].data_ptr() for t in weights.tensors().values()}


@pytest.mark.parametrize(
    ("precision", "compute"), [*COMPUTE, *((name, torch.float32) for name in STORAGES)]
)
def test_an_operand_is_the_weight_in_the_dtype_of_the_matmuls(
    precision: str, compute: torch.dtype
) -> None:
    weights = Weights(precision, 40, 4, False, CPU, compute)
    weights.weight.write(0, 40, torch.randn(40, 4, generator=torch.Generator().manual_seed(3)))
    operand = weights.operand(7, 30)
    assert operand.dtype == compute
    assert torch.equal(operand, weights.read(7, 30).to(compute))


BYTES = {"fp32": (4, 8), "bf16_split": (4, 8), "bf16_sr": (2, 4), "fp16": (6, 10), "fp8_sr": (1, 3)}


@pytest.mark.parametrize("precision", STORAGES)
@pytest.mark.parametrize("momentum", [False, True])
def test_bytes(precision: str, momentum: bool) -> None:
    weights = Weights(precision, 10, 6, momentum, CPU)
    assert weights.nbytes() == 10 * 6 * BYTES[precision][momentum]
    assert {t.shape for t in weights.tensors().values()} == {torch.Size([10, 6])}


@pytest.mark.parametrize("precision", STORAGES)
def test_an_empty_shard(precision: str) -> None:
    weights = Weights(precision, 0, 6, True, CPU)
    assert weights.nbytes() == 0
    assert weights.read(0, 0).shape == (0, 6)


@pytest.mark.parametrize(
    ("buffer", "dtype", "largest"),
    [
        (Float32, torch.float32, None),
        (BFloat16, torch.bfloat16, None),
        (Half, torch.float32, None),
        (E4M3, torch.float8_e4m3fn, 448.0),
    ],
)
def test_writing_rounds_to_the_nearest(
    buffer: type[Float32], dtype: torch.dtype, largest: float | None
) -> None:
    values = torch.randn(500, 4, generator=torch.Generator().manual_seed(4)) * 10
    values[0] = torch.tensor([1e4, -1e4, 448.0, -449.0])
    values[1] = torch.tensor([0.0, -0.0, 2**-9, -(2**-10) * 1.5])
    held = buffer(500, 4, CPU, Scratch(CPU))
    held.write(0, 250, values[:250])
    held.write(250, 500, values[250:])
    nearest = values if largest is None else values.clamp(-largest, largest)
    assert torch.equal(held.read(0, 500), nearest.to(dtype).float())
    assert torch.equal(held.read(3, 5), nearest[3:5].to(dtype).float())


def test_every_code_of_e4m3_is_read_as_torch_reads_it() -> None:
    held = E4M3(64, 4, CPU, Scratch(CPU))
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(64, 4)
    held.data.view(torch.uint8).copy_(codes)
    wanted = codes.view(torch.float8_e4m3fn).float()
    assert torch.equal(bits_of(held.read(0, 64)), bits_of(wanted))


RULES = [
    SGD(0.05, 0.0, 0.0),
    SGD(0.05, 0.9, 0.0),
    SGD(0.05, 0.9, 0.01),
    SGD(0.3, 0.0, 0.1),
    SGD(0.0, 0.9, 0.1),
]


def trajectory(
    precision: str, rule: SGD, steps: int = 8, compute: torch.dtype | None = torch.float32
) -> list[torch.Tensor]:
    """Weights [9, 4] after each step, updated in chunks of 4."""
    generator = torch.Generator().manual_seed(0)
    weights = Weights(precision, 9, 4, rule.momentum > 0, CPU, compute)
    weights.weight.write(0, 9, torch.randn(9, 4, generator=generator))
    out = []
    for step in range(steps):
        gradient = torch.randn(9, 4, generator=generator).to(weights.compute_dtype)
        update = Update(weights, replace(rule, step=step), first=0)
        for start in range(0, 9, 4):
            stop = min(start + 4, 9)
            # The identity times rows of a gradient is that gradient, exactly.
            residual = torch.eye(stop - start, dtype=weights.compute_dtype)
            update(start, stop, weights.operand(start, stop), residual, gradient[start:stop])
        out.append(weights.read(0, 9).clone())
    return out


def torch_trajectory(rule: SGD, dtype: torch.dtype, steps: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(9, 4, generator=generator).to(dtype).requires_grad_()
    optimizer = torch.optim.SGD(
        [weight], rule.lr, momentum=rule.momentum, weight_decay=rule.weight_decay, foreach=False
    )
    out = []
    for _ in range(steps):
        weight.grad = torch.randn(9, 4, generator=generator).to(dtype)
        optimizer.step()
        out.append(weight.detach().clone())
    return out


@pytest.mark.parametrize("rule", RULES)
def test_update_is_that_of_torch(rule: SGD) -> None:
    found = trajectory("fp32", rule)
    wanted = torch_trajectory(rule, torch.float32)
    exact = torch_trajectory(rule, torch.float64)
    for ours, theirs, truth in zip(found, wanted, exact, strict=True):
        # One rounding of the largest term a step: sums in another order, fused or not.
        rounding = 2**-23 * 8 * max(1.0, float(truth.abs().max()))
        assert (ours.double() - theirs.double()).abs().max() <= rounding
        assert (ours.double() - truth).abs().max() <= rounding


def test_the_first_update_is_that_of_torch_bit_for_bit_without_decay() -> None:
    rule = SGD(0.05, 0.9, 0.0)
    assert torch.equal(trajectory("fp32", rule, 1)[0], torch_trajectory(rule, torch.float32, 1)[0])


def test_decoupled_decay_would_be_noticed() -> None:
    coupled = trajectory("fp32", SGD(0.05, 0.9, 0.1))[-1]
    without = trajectory("fp32", SGD(0.05, 0.9, 0.0))[-1]
    decoupled = without * (1 - 0.05 * 0.1) ** 8
    assert (coupled - decoupled).abs().max() > 1e-3


@pytest.mark.parametrize("rule", RULES)
def test_bf16_split_updates_exactly_as_fp32(rule: SGD) -> None:
    for split, plain in zip(trajectory("bf16_split", rule), trajectory("fp32", rule), strict=True):
        assert torch.equal(bits_of(split), bits_of(plain))


@pytest.mark.parametrize("rule", RULES)
def test_fp16_updates_its_master_exactly_as_fp32(rule: SGD) -> None:
    for half, plain in zip(trajectory("fp16", rule), trajectory("fp32", rule), strict=True):
        assert torch.equal(half, plain)


SPACING = {"bf16_split": 0.0, "bf16_sr": 2.0**-7, "fp16": 0.0, "fp8_sr": 2.0**-3}
"""Of the stored numbers, relative to their size."""


@pytest.mark.parametrize(("precision", "rule", "own"), pairwise(SPACING, RULES, [True, False]))
def test_every_storage_follows_the_exact_update(precision: str, rule: SGD, own: bool) -> None:
    """With weight decay and momentum, whatever the matmuls are in; gradients rounded likewise."""
    compute = STORAGES[precision].compute if own else torch.float32
    found = trajectory(precision, rule, compute=compute)
    exact = torch_trajectory(rule, torch.float64)
    largest = float(torch.stack(exact).abs().max())
    momenta = 3.0 * rule.lr  # velocities reach a few units, and bf16 keeps 8 bits of them
    per_step = SPACING[precision] * largest + 2**-7 * momenta
    for step, (ours, truth) in enumerate(zip(found, exact, strict=True), start=1):
        # Errors of a step are independent and lie within one spacing.
        assert (ours.double() - truth).abs().max() <= per_step * (1 + 2 * step**0.5)


@pytest.mark.parametrize("precision", ["bf16_sr", "fp8_sr"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_updates_below_the_spacing_survive_in_the_mean(precision: str, momentum: float) -> None:
    """Rounding to nearest would lose every one of them."""
    n, dim, steps, lr, gradient = 64, 32, 40, 1.0, 2.0**-11
    weights = Weights(precision, n, dim, momentum > 0, CPU, torch.float32)
    weights.weight.write(0, n, torch.ones(n, dim))
    for step in range(steps):
        update = Update(weights, SGD(lr, momentum, seed=5, step=step), first=0)
        inputs = torch.full((1, dim), gradient)
        update(0, n, weights.operand(0, n), torch.ones(n, 1), inputs)
    velocity, moved = 0.0, 0.0
    for _ in range(steps):
        velocity = momentum * velocity + gradient
        moved += lr * velocity
    error = 1 - weights.read(0, n).double() - moved
    spacing = SPACING[precision]
    assert abs(float(error.mean())) < 4 * float(error.std()) / (n * dim) ** 0.5
    assert moved > 4 * abs(float(error.mean()))
    assert float(error.std()) < spacing * steps**0.5


@pytest.mark.parametrize("precision", ["fp8_sr", "bf16_sr"])
def test_a_run_does_not_depend_on_who_owns_a_label(precision: str) -> None:
    def run(first: int, stop: int, chunk: int, seed: int = 5) -> torch.Tensor:
        weights = Weights(precision, stop - first, 8, True, CPU, torch.float32)
        weights.weight.write(0, stop - first, torch.ones(stop - first, 8))
        for step in range(3):
            update = Update(weights, SGD(0.01, 0.9, 0.1, seed, step), first)
            for low in range(0, stop - first, chunk):
                high = min(low + chunk, stop - first)
                residual = torch.arange(first + low, first + high).float()[:, None] / 100
                update(low, high, weights.operand(low, high), residual, torch.ones(1, 8))
        return weights.read(0, stop - first).clone()

    whole = run(0, 100, 100)
    assert torch.equal(torch.cat([run(0, 37, 10), run(37, 100, 64)]), whole)
    assert not torch.equal(run(0, 100, 100, seed=6), whole)


def test_scratch_made_while_scoring_serves_a_later_training_step() -> None:
    weights = Weights("bf16_sr", 10, 4, False, CPU, torch.float32)
    with torch.inference_mode():
        weights.read(0, 10)
    update = Update(weights, SGD(0.1, 0.0, 0.0), 0)
    update(0, 10, weights.operand(0, 10), torch.ones(10, 1), torch.ones(1, 4))
    assert (weights.read(0, 10) < 0).all()
