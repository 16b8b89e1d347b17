"""The plan of a run: which steps are evaluated, how far along a step is."""

from __future__ import annotations

import pytest

from renee_ray.training.loop import Plan


def plan(every: float, *batches: int) -> Plan:
    return Plan(batches, every, 0)


@pytest.mark.parametrize(
    ("every", "batches", "steps"),
    [
        (1.0, (10, 12, 14), {10, 22, 36}),
        (0.5, (10, 12), {5, 10, 16, 22}),
        (2.0, (10, 10, 10, 10, 10), {20, 40, 50}),
        (1.5, (10, 20, 10), {20, 40}),
        (7.0, (10, 10), {20}),
        (0.0, (10, 10), {20}),
        (0.25, (8,), {2, 4, 6, 8}),
    ],
)
def test_evaluation_steps(every: float, batches: tuple[int, ...], steps: set[int]) -> None:
    assert plan(every, *batches).evaluation_steps() == steps


def test_any_share_of_an_epoch_ends_with_the_end() -> None:
    """Shares that binary numbers cannot represent included."""
    for epochs in range(1, 31):
        for hundredths in range(1, 301):
            found = plan(hundredths / 100, *[100] * epochs).evaluation_steps()
            marks = range(hundredths, 100 * epochs + 1, hundredths)
            assert found == {*marks, 100 * epochs}, (epochs, hundredths)


def test_epochs_done() -> None:
    made = plan(1.0, 10, 20)
    assert made.total == 30
    assert [made.epochs_done(step) for step in (0, 5, 10, 15, 29, 30)] == [
        0.0, 0.5, 1.0, 1.25, 1.95, 2.0,
    ]  # fmt: skip


@pytest.mark.parametrize("share", [0.085, 0.68])
def test_a_share_that_rounds_to_above_the_last_epoch_ends_with_the_end(share: float) -> None:
    plan = Plan((37,) * 51, share, 0)
    assert max(plan.evaluation_steps()) == plan.total
