"""Masks of 16 random bits: their share, their scale, their independence, their gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from renee_ray.model.dropout import Dropout, draw_fast

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
