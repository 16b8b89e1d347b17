"""Storage of a shard: bf16_split is fp32 in two halves, and the update is torch.optim.SGD's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from renee_ray.xfc.storage import SGD, STORAGES, Split, Weights

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
    buffer = Split(len(values), 4, CPU)
    buffer.write(0, len(values), values)
    assert torch.equal(bits_of(buffer.read(0, len(values))), bits_of(values))
    assert (values.abs() < 2**-126).sum() > 1000, "subnormals must be among them"
    # The test can fail: the high half alone is another number nearly everywhere.
    assert (buffer.high.float() != values).float().mean() > 0.5


def test_split_keeps_every_bit_in_any_range() -> None:
    values = random_bits(64)
    buffer = Split(64, 4, CPU)
    for start in range(0, 64, 7):
        stop = min(start + 7, 64)
        buffer.write(start, stop, values[start:stop])
    for start, stop in [(0, 64), (3, 5), (10, 10), (63, 64)]:
        assert torch.equal(bits_of(buffer.read(start, stop)), bits_of(values[start:stop]))


def test_the_high_half_is_the_nearest_bf16() -> None:
    values = random_bits(40_000)
    buffer = Split(len(values), 4, CPU)
    buffer.write(0, len(values), values)
    high = buffer.operand(0, len(values))
    assert high.dtype == torch.bfloat16
    error = (high.double() - values.double()).abs()
    nearest = (values.bfloat16().double() - values.double()).abs()
    assert torch.equal(error, nearest), "equal distances: ties may go either way"
    truncated = (bits_of(values) & ~0xFFFF).view(torch.float32)
    assert ((truncated.double() - values.double()).abs() > nearest).any()


@pytest.mark.parametrize("precision", STORAGES)
def test_operands_alias_the_storage(precision: str) -> None:
    weights = Weights(precision, 10, 4, False, CPU)
    (first, *_) = weights.tensors().values()
    assert weights.weight.operand(2, 5).data_ptr() == first[2:].data_ptr()


@pytest.mark.parametrize("precision", STORAGES)
@pytest.mark.parametrize("momentum", [False, True])
def test_bytes(precision: str, momentum: bool) -> None:
    weights = Weights(precision, 10, 6, momentum, CPU)
    assert weights.nbytes() == 10 * 6 * (8 if momentum else 4)
    assert {t.shape for t in weights.tensors().values()} == {torch.Size([10, 6])}


@pytest.mark.parametrize("precision", STORAGES)
def test_an_empty_shard(precision: str) -> None:
    weights = Weights(precision, 0, 6, True, CPU)
    assert weights.nbytes() == 0
    assert weights.weight.read(0, 0).shape == (0, 6)


RULES = [
    SGD(0.05, 0.0, 0.0),
    SGD(0.05, 0.9, 0.0),
    SGD(0.05, 0.9, 0.01),
    SGD(0.3, 0.0, 0.1),
    SGD(0.0, 0.9, 0.1),
]


def trajectory(precision: str, rule: SGD, steps: int = 8) -> list[torch.Tensor]:
    """Weights [9, 4] after each step, updated in chunks of 4."""
    generator = torch.Generator().manual_seed(0)
    weights = Weights(precision, 9, 4, rule.momentum > 0, CPU)
    weights.weight.write(0, 9, torch.randn(9, 4, generator=generator))
    out = []
    for _ in range(steps):
        gradient = torch.randn(9, 4, generator=generator)
        for start in range(0, 9, 4):
            stop = min(start + 4, 9)
            weights.update(start, stop, gradient[start:stop].clone(), rule)
        out.append(weights.weight.read(0, 9).clone())
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
