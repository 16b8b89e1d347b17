from __future__ import annotations

import math

import pytest

from renee_ray.config.overrides import make_config
from renee_ray.config.schema import RunConfig
from renee_ray.errors import ReneeError
from renee_ray.training.schedule import warmup_cosine


@pytest.mark.parametrize("total", [1, 2, 7, 100, 1001])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.33, 0.99])
def test_rises_linearly_then_falls_along_half_a_cosine(total: int, warmup: float) -> None:
    factors = [warmup_cosine(step, total, warmup) for step in range(total)]
    rising = math.ceil(warmup * total)
    assert factors[:rising] == pytest.approx([(i + 1) / rising for i in range(rising)])
    falling = factors[rising:]
    assert falling == pytest.approx(
        [(1 + math.cos(math.pi * i / len(falling))) / 2 for i in range(len(falling))]
    )
    assert all(0 < factor <= 1 for factor in factors)
    assert max(factors) == 1
    assert sorted(falling, reverse=True) == falling


def test_the_end_is_zero() -> None:
    assert warmup_cosine(100, 100, 0.1) == pytest.approx(0, abs=1e-12)
    assert warmup_cosine(0, 0, 0.0) == 1


@pytest.mark.parametrize(
    ("total", "warmup", "held"), [(100, 0.05, 0.33), (7, 0.5, 0.5), (1, 0, 0.5)]
)
def test_rates_are_held_over_the_last_share(total: int, warmup: float, held: float) -> None:
    plain = [warmup_cosine(step, total, warmup) for step in range(total + 1)]
    begin = max(math.ceil(warmup * total), total - round(held * total))
    wanted = plain[:begin] + [plain[begin]] * (total - begin)
    assert [warmup_cosine(step, total, warmup, held) for step in range(total)] == wanted


def test_steps_of_the_warmup_are_not_averaged() -> None:
    own = {"data": "d", "output": "o", "warmup": 0.5}
    make_config(RunConfig, {**own, "average": 0.5}, where="test")
    with pytest.raises(ReneeError, match=r"average 0\.6 includes steps of the warmup 0\.5"):
        make_config(RunConfig, {**own, "average": 0.6}, where="test")
