"""Masks of 16 random bits: their share, their scale, their independence, their gradient."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from renee_ray.data.split import splitmix64
from renee_ray.model.dropout import STEPS, WEYL, Dropout, draw_fast, dropout_mask
from tests.devices import DEVICES

ROWS, COLUMNS = 1001, 203  # no multiple of 4 together


def dropped(p: float, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    torch.manual_seed(seed)
    return Dropout(p)(torch.ones(ROWS, COLUMNS, dtype=dtype))


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_share_and_mean(p: float) -> None:
    found = dropped(p)
    assert found.unique().tolist() == pytest.approx([0.0, 1 / (1 - p)], rel=1e-3)
    n = found.numel()
    zeros = int((found == 0).sum())
    assert abs(zeros - n * p) < 5 * (n * p * (1 - p)) ** 0.5
    assert float(found.double().mean()) == pytest.approx(1, abs=5 * (p / (1 - p) / n) ** 0.5)


def test_neighbours_and_the_four_of_a_draw_are_independent() -> None:
    kept = (dropped(0.5).flatten() > 0).double() - 0.5
    for distance in (1, 2, 3, 4, COLUMNS):
        correlation = 4 * float((kept[distance:] * kept[:-distance]).mean())
        assert abs(correlation) < 5 * len(kept) ** -0.5, distance
    assert not torch.equal(dropped(0.5, 1), dropped(0.5, 2))
    assert torch.equal(dropped(0.5, 1), dropped(0.5, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_has_the_same_mask(dtype: torch.dtype) -> None:
    x = torch.randn(7, 5, dtype=dtype, requires_grad=True)
    out = Dropout(0.4)(x)
    assert out.dtype == dtype
    out.backward(torch.ones_like(out))
    assert x.grad is not None
    torch.testing.assert_close(x.grad * x, out)


def test_nothing_is_dropped_in_evaluation_or_with_p_0() -> None:
    x = torch.randn(4)
    assert Dropout(0.0)(x) is x
    assert Dropout(0.5).eval()(x) is x


def test_every_dropout_of_a_module_is_replaced() -> None:
    module = nn.Sequential(nn.Dropout(0.2), nn.ModuleList([nn.Linear(2, 2), nn.Dropout(0.3)]))
    draw_fast(module)
    found = [each for each in module.modules() if isinstance(each, nn.Dropout)]
    assert [(type(each), each.p) for each in found] == [(Dropout, 0.2), (Dropout, 0.3)]


def mask_of(
    p: float = 0.25, seed: int = 1, step: int = 4, first: int = 0, rows: int = ROWS,
    device: str = "cpu",
) -> torch.Tensor:  # fmt: skip
    return dropout_mask(torch.zeros(rows, COLUMNS, device=device), p, seed, step, first).cpu()


@pytest.mark.parametrize("device", DEVICES)
def test_the_mask_of_embeddings_is_the_hash_of_its_place(device: str) -> None:
    """SplitMix64 by numpy's unsigned integers, four numbers a word."""
    key = np.random.SeedSequence([1, 4]).generate_state(1, np.uint64)
    weyl = np.uint64(WEYL % 2**64)
    begins = splitmix64(key + np.arange(ROWS, dtype=np.uint64) * weyl - weyl)
    words = splitmix64(begins[:, None] + np.arange(51, dtype=np.uint64) * weyl - weyl)
    bits = words.view(np.int16)[:, :COLUMNS]
    wanted = np.where(bits >= STEPS // 4 - STEPS // 2, np.float32(4 / 3), np.float32(0))
    assert np.array_equal(mask_of(device=device).numpy(), wanted)


def test_it_depends_on_seed_step_and_place_only() -> None:
    whole = mask_of()
    for num_ranks in (1, 2, 3):  # also where a rank has no row
        bounds = [0, *[ROWS * r // num_ranks for r in range(1, num_ranks)], ROWS, ROWS]
        parts = [mask_of(first=a, rows=b - a) for a, b in itertools.pairwise(bounds)]
        assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(whole, mask_of(step=5))
    assert not torch.equal(whole, mask_of(seed=2)), "the seed is ignored"
    assert dropout_mask(torch.zeros(3, 2), 0.0, 1, 1, 3) == 1


@pytest.mark.parametrize("p", [0.001, 0.25, 0.9])
def test_its_share_and_its_independence(p: float) -> None:
    """Over the whole mask, each row and each column; between neighbours, far rows and steps."""
    mask = mask_of(p)
    assert mask.unique().tolist() == pytest.approx([0.0, 1 / (1 - p)], rel=1e-3)
    dropped = (mask == 0).double() - p
    spread = (p * (1 - p)) ** 0.5
    for mean in (dropped.mean(), dropped.mean(0), dropped.mean(1)):
        count = dropped.numel() / mean.numel()
        assert float(mean.abs().max()) < 5 * spread / count**0.5 + 6 / count
    step, seed = ((mask_of(p, s, n) == 0).double() - p for s, n in ((1, 5), (2, 4)))
    pairs = [(dropped[d:], dropped[:-d]) for d in (1, 2, 500)]
    pairs += [(dropped[:, d:], dropped[:, :-d]) for d in (1, 2, 3, 4, 8)]
    pairs += [(dropped[1:, 1:], dropped[:-1, :-1]), (dropped, step), (dropped, seed)]
    for one, other in pairs:
        assert abs(float((one * other).mean())) < 5 * spread**2 / one.numel() ** 0.5
