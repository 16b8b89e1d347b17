"""Stochastic rounding: to a neighbour, without bias, without correlation, whoever owns a label."""

from __future__ import annotations

import pytest
import torch

from renee_ray.xfc.labels import split_range
from renee_ray.xfc.weights.rounding import (
    BF16_DROPPED,
    E4M3_DROPPED,
    PERIOD,
    STRIDE,
    Noise,
    round_to_bf16,
    round_to_e4m3,
)
from renee_ray.xfc.weights.scratch import Scratch

CPU = torch.device("cpu")
BITS = {"bf16": BF16_DROPPED, "e4m3": E4M3_DROPPED}
DTYPE = {"bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn}
LABELS, DIM = 2048, 512  # 2**20 numbers


def noise_of(
    kind: str, step: int = 0, stream: int = 0, dim: int = DIM, first: int = 0, seed: int = 7
) -> Noise:
    return Noise(seed, step, stream, BITS[kind], dim, first, Scratch(CPU))


def rounded(kind: str, values: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    out = values.clone()
    if kind == "bf16":
        round_to_bf16(out, noise.clone(), Scratch(CPU))
    else:
        round_to_e4m3(out, noise.clone(), Scratch(CPU))
    return out


def grid(kind: str) -> torch.Tensor:
    """All finite numbers of the format, ascending, float64."""
    if kind == "e4m3":
        codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn)
        values = codes.double()
    else:
        values = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).double()
    return values[values.isfinite()].unique()


def neighbours(kind: str, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest number of the format that is not above, and the next one."""
    numbers = grid(kind)
    at = torch.searchsorted(numbers, values.double(), right=True) - 1
    return numbers[at], numbers[(at + 1).clamp(max=len(numbers) - 1)]


def weights_like(kind: str) -> torch.Tensor:
    """Of several sizes; for e4m3 a third are subnormal."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(LABELS, DIM, generator=generator) * 2.0 ** torch.randint(
        -9, 3, (LABELS, DIM), generator=generator
    )


@pytest.mark.parametrize("kind", BITS)
def test_a_number_goes_to_one_of_its_neighbours(kind: str) -> None:
    values = weights_like(kind)
    below, above = neighbours(kind, values)
    found = rounded(kind, values, noise_of(kind).rows(0, LABELS)).double()
    down, up = found == below, found == above
    assert (down | up).all()
    assert 0.4 < float(up.double().mean()) < 0.6
    assert torch.equal(found.to(DTYPE[kind]).double(), found), "storing it is exact"


@pytest.mark.parametrize("kind", BITS)
def test_the_mean_error_of_a_million_roundings_is_within_three_standard_errors(kind: str) -> None:
    values = weights_like(kind)
    below, above = neighbours(kind, values)
    found = rounded(kind, values, noise_of(kind).rows(0, LABELS)).double()
    error = (found - values.double()) / (above - below)
    standard = float(error.std()) / error.numel() ** 0.5
    assert abs(float(error.mean())) < 3 * standard
    # Rounding up rather than fairly in one case of two hundred would be noticed.
    assert 3 * standard < 0.005
    for sign in (values > 0, values < 0, values.abs() < 2**-6):
        part = error[sign]
        assert abs(float(part.mean())) < 4 * float(part.std()) / len(part) ** 0.5


@pytest.mark.parametrize("kind", BITS)
@pytest.mark.parametrize("value", [1.03, -0.7512, 0.0137, -0.0003, 2.0**-6 * 1.01, 300.7])
def test_one_number_has_the_right_expectation(kind: str, value: float) -> None:
    """Just above a power of two, below the smallest normal and below the smallest e4m3 too."""
    values = torch.full((LABELS, DIM), value)
    below, above = (float(bound[0, 0]) for bound in neighbours(kind, values))
    found = rounded(kind, values, noise_of(kind).rows(0, LABELS)).double()
    share = float((found == above).double().mean())
    exact = (float(values[0, 0]) - below) / (above - below)
    assert abs(share - exact) < 4 * (exact * (1 - exact) / found.numel()) ** 0.5
    assert set(found.unique().tolist()) == {below, above}


@pytest.mark.parametrize("kind", BITS)
def test_a_number_of_the_format_stays(kind: str) -> None:
    numbers = grid(kind).float()
    numbers = numbers[: len(numbers) // 2 * 2].view(-1, 2)
    noise = torch.full(numbers.shape, 2 ** BITS[kind] - 1, dtype=torch.int32)
    assert torch.equal(rounded(kind, numbers, noise), numbers)
    assert torch.equal(rounded(kind, numbers, torch.zeros_like(noise)), numbers)


def test_e4m3_saturates() -> None:
    values = torch.tensor([[449.0, 1e6, float("inf"), 447.9, 448.0, -449.0, -1e6, -float("inf")]])
    noise = torch.full(values.shape, 2**E4M3_DROPPED - 1, dtype=torch.int32)
    expected = torch.tensor([[448.0] * 5 + [-448.0] * 3])
    assert torch.equal(rounded("e4m3", values, noise), expected)
    # Rounding 447.9 down gives the number before the largest.
    assert float(rounded("e4m3", values, torch.zeros_like(noise))[0, 3]) == 416


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1])


@pytest.mark.parametrize("kind", BITS)
def test_errors_of_neighbours_and_of_successive_steps_are_not_correlated(kind: str) -> None:
    values = torch.full((LABELS, DIM), 1.03)  # the same everywhere: only the noise differs
    errors = [
        rounded(kind, values, noise_of(kind, step, stream).rows(0, LABELS))
        for step, stream in [(0, 0), (1, 0), (0, 1)]
    ]
    first, next_step, next_stream = errors
    bound = 4 / first.numel() ** 0.5
    for lag in (1, 2, 3, 64):
        assert abs(correlation(first[lag:], first[:-lag])) < bound, "labels"
        # Pairs of columns repeat with the base: only so many of them are different.
        of_columns = 4 / (STRIDE * LABELS) ** 0.5
        assert abs(correlation(first[:, lag:], first[:, :-lag])) < of_columns, "columns"
    assert abs(correlation(first, next_step)) < bound
    assert abs(correlation(first, next_stream)) < bound
    # What would be noticed: the base alone is the same for every label.
    shared = noise_of(kind).rows(0, 1).expand(LABELS, DIM).contiguous()
    assert (
        correlation(*(rounded(kind, values, shared)[s] for s in (slice(1, None), slice(-1)))) > 0.9
    )


@pytest.mark.parametrize("kind", BITS)
def test_row_and_column_sums_vary_as_those_of_independent_noise(kind: str) -> None:
    """Correlations too small to see in pairs would add up here."""
    noise = noise_of(kind).rows(0, LABELS).double() / 2 ** BITS[kind] - 0.5
    for axis, count in ((0, LABELS), (1, DIM)):
        variance = float((noise.sum(axis) ** 2).mean()) / count
        assert variance == pytest.approx(1 / 12, rel=6 * (2 / (LABELS * DIM / count)) ** 0.5)


@pytest.mark.parametrize("kind", BITS)
def test_noise_is_uniform(kind: str) -> None:
    noise = noise_of(kind).rows(0, LABELS)
    assert int(noise.min()) >= 0 and int(noise.max()) < 2 ** BITS[kind]
    counts = torch.bincount((noise >> (BITS[kind] - 6)).flatten(), minlength=64).double()
    expected = noise.numel() / 64
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    assert chi_squared < 63 + 5 * (2 * 63) ** 0.5
    for bit in range(BITS[kind]):
        share = float((noise >> bit & 1).double().mean())
        assert abs(share - 0.5) < 0.05, bit


@pytest.mark.parametrize("first", [0, PERIOD - 50, 2**40])
@pytest.mark.parametrize("num_ranks", [1, 2, 7])
def test_noise_depends_on_the_label_and_not_on_its_owner(num_ranks: int, first: int) -> None:
    n = 100
    whole = noise_of("bf16", dim=8, first=first).rows(0, n).clone()
    parts = []
    for rank in range(num_ranks):
        start, stop = split_range(n, num_ranks, rank)
        noise = noise_of("bf16", dim=8, first=first + start)
        middle = (stop - start) // 3
        parts += [noise.rows(0, middle).clone(), noise.rows(middle, stop - start).clone()]
    assert torch.equal(torch.cat(parts), whole)
    assert len(whole.unique(dim=0)) == n
    assert not torch.equal(noise_of("bf16", dim=8, first=first, seed=8).rows(0, n), whole)
