"""The dynamic loss scale."""

from __future__ import annotations

from renee_ray.model.loss_scale import FIRST, GROWTH_STEPS, LARGEST, LossScale


def after(scale: LossScale, *finite: bool) -> LossScale:
    for each in finite:
        scale.update(each)
    return scale


def test_it_halves_at_an_overflow_and_doubles_after_many_steps_without_one() -> None:
    assert after(LossScale.start(), False, True, False).value == FIRST / 4
    assert after(LossScale.start(), *[True] * (GROWTH_STEPS - 1)).value == FIRST
    grown = after(LossScale.start(), *[True] * GROWTH_STEPS)
    assert (grown.value, grown.steps) == (2 * FIRST, 0)
    interrupted = after(LossScale.start(), True, False, *[True] * (GROWTH_STEPS - 1))
    assert (interrupted.value, interrupted.steps) == (FIRST / 2, GROWTH_STEPS - 1)


def test_it_has_bounds() -> None:
    assert after(LossScale(1.0, 0, True), False).value == 1
    assert after(LossScale(LARGEST, GROWTH_STEPS - 1, True), True).value == LARGEST


def test_without_fp16_it_stays() -> None:
    assert after(LossScale(), *[False] * 3, *[True] * GROWTH_STEPS) == LossScale()
