"""The schedule of a run, and what the trainer makes of a batch before it trains on it."""

from __future__ import annotations

from collections.abc import Container, Iterator

import numpy as np
import pytest
import torch

from renee_ray.checkpoint.state import State
from renee_ray.config.overrides import make_config
from renee_ray.config.schema import RunConfig
from renee_ray.errors import ReneeError
from renee_ray.model.loss_scale import LossScale
from renee_ray.model.model import Model
from renee_ray.rank.batch import Batch, Position, Ragged
from renee_ray.rank.collectives import Ranks
from renee_ray.training.loop import MOST_SKIPPED, Trainer
from renee_ray.training.schedule import Schedule
from renee_ray.xfc.labels import LabelRange
from renee_ray.xfc.shard import Shard
from renee_ray.xfc.weights.storages import Weights
from tests.training.test_step import DIM, LABELS, Bag, first_weights

CPU = torch.device("cpu")


def schedule(every: float, *batches: int) -> Schedule:
    return Schedule(batches, every, 0)


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
    assert schedule(every, *batches).evaluation_steps() == steps


def test_any_share_of_an_epoch_ends_with_the_end() -> None:
    """Shares that binary numbers cannot represent included."""
    for epochs in (1, 2, 3, 7, 30):
        for hundredths in range(1, 301):
            found = schedule(hundredths / 100, *[100] * epochs).evaluation_steps()
            marks = range(hundredths, 100 * epochs + 1, hundredths)
            assert found == {*marks, 100 * epochs}, (epochs, hundredths)


def test_epochs_done() -> None:
    made = schedule(1.0, 10, 20)
    assert made.total == 30
    assert [made.epochs_done(step) for step in (0, 5, 10, 15, 29, 30)] == [
        0.0, 0.5, 1.0, 1.25, 1.95, 2.0,
    ]  # fmt: skip


@pytest.mark.parametrize("share", [0.085, 0.68])
def test_a_share_that_rounds_to_above_the_last_epoch_ends_with_the_end(share: float) -> None:
    made = Schedule((37,) * 51, share, 0)
    assert max(made.evaluation_steps()) == made.total


def trainer_of(encoder: Bag, config: RunConfig, steps: int, state: State | None = None) -> Trainer:
    shard = Shard(LabelRange(0, LABELS, LABELS), Weights("fp32", LABELS, DIM, True, CPU))
    shard.write(0, first_weights())
    return Trainer(
        config, Model(encoder, shard), Ranks(), CPU, schedule(1.0, steps),  # type: ignore[arg-type]
        validation=None, on_progress=lambda record: None, on_checkpoint=lambda metrics: None,
        state=state or State(),
    )  # fmt: skip


def trained_by(**feed: object) -> tuple[torch.Tensor, list[int]]:
    """(scores of all labels for the one point that is trained on, tokens of each step)."""
    config = make_config(
        RunConfig, {"data": "unused", "output": "unused", "loss_every": 0, "feed": feed},
        {"warmup": 0.0, "encoder": {"learning_rate": 0.0}},
    )  # fmt: skip
    encoder = Bag()
    tokens: list[int] = []
    encoder.tokens.register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0].numel()))
    steps = 6
    trainer = trainer_of(encoder, config, steps)
    shard = trainer.model.shard
    row = Ragged.of_lists([[1, 4, 9, 16, 3, 2]])
    trainer.run(
        Batch(
            Position(0, step), np.arange(1), row, Ragged.of_lists([[0]]), Ragged.of_lists([[3]]), 0
        )
        for step in range(steps)
    )
    with torch.no_grad():
        embedded = encoder(torch.from_numpy(row.values)[None], torch.ones(1, 6))
    return (embedded @ shard.weights.read(0, LABELS).T)[0], tokens


def equal_batches(first: int, stop: int) -> Iterator[Batch]:
    row, none = Ragged.of_lists([[1, 4]]), Ragged.of_lists([[]])
    for step in range(first, stop):
        yield Batch(Position(0, step), np.arange(1), row, Ragged.of_lists([[0]]), none, 0)


def run_poisoned(steps: int, poisoned: Container[int], state: State | None = None) -> Trainer:
    """A run in whose `poisoned` steps, numbered from 0, no embedding is finite."""
    config = make_config(RunConfig, {"data": "unused", "output": "unused", "loss_every": 0})
    trainer = trainer_of(encoder := Bag(), config, steps, state)

    def poison(_: object, __: object, found: torch.Tensor) -> torch.Tensor:
        return found * (torch.nan if trainer.state.step in poisoned else 1.0)

    encoder.out.register_forward_hook(poison)
    trainer.run(equal_batches(trainer.state.step, steps))
    return trainer


@pytest.mark.parametrize(
    ("steps", "poisoned", "step"),
    [(300, range(150, 300), 150 + MOST_SKIPPED), (7, range(7), 7)],
    ids=["many", "all of a short run"],
)
def test_a_run_that_only_skips_ends_with_an_error(
    steps: int, poisoned: range, step: int, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ReneeError, match=rf"up to step {step}, .*learning_rate"):
        run_poisoned(steps, poisoned)
    assert caplog.text.count("skipped by all workers") == 1


def test_so_does_one_that_was_resumed() -> None:
    with pytest.raises(ReneeError, match="all of the last 7 steps"):
        run_poisoned(7, range(7), State(Position(0, 5), 5, skipped=5))


def test_a_classifier_that_is_lost_ends_the_run_and_spares_the_encoder() -> None:
    """Its gradient for the encoder is not finite in any step, though the embeddings are."""
    config = make_config(RunConfig, {"data": "unused", "output": "unused", "loss_every": 0})
    trainer = trainer_of(encoder := Bag(), config, 7)
    trainer.model.shard.write(3, torch.full((1, DIM), torch.nan))
    before = [parameter.detach().clone() for parameter in encoder.parameters()]
    with pytest.raises(ReneeError, match="all of the last 7 steps"):
        trainer.run(equal_batches(0, 7))
    assert all(map(torch.equal, encoder.parameters(), before))


def test_a_run_is_in_training_however_its_encoder_was_loaded() -> None:
    config = make_config(RunConfig, {"data": "unused", "output": "unused", "loss_every": 0})
    trainer = trainer_of(encoder := Bag(), config, 2, State(step=1))
    encoder.eval()
    trainer.run(equal_batches(1, 2))
    assert all(module.training for module in encoder.modules())


def test_what_is_saved_knows_of_the_step_before_it() -> None:
    """Though the host reads one step late whether a gradient was finite."""
    config = make_config(RunConfig, {"data": "unused", "output": "unused", "loss_every": 0})
    trainer = trainer_of(encoder := Bag(), config, 6, State(loss_scale=LossScale(8.0, 0, True)))
    trainer.schedule = Schedule((6,), 1.0, 3)
    encoder.out.weight.register_hook(lambda g: g * (torch.nan if trainer.state.step == 2 else 1.0))
    saved: list[tuple[int, int, float]] = []
    trainer.on_checkpoint = lambda metrics: saved.append(
        (trainer.state.step, trainer.state.skipped, trainer.state.loss_scale.value)
    )
    trainer.run(equal_batches(0, 6))
    assert saved == [(0, 0, 8.0), (3, 1, 4.0), (6, 1, 4.0)]
    assert trainer.recorder.totals().skipped == 1


def test_a_row_of_skipped_steps_is_said_once_with_its_length(
    caplog: pytest.LogCaptureFixture,
) -> None:
    most = MOST_SKIPPED - 1
    trainer = run_poisoned(300, {3, *range(10, 10 + most), *range(150, 150 + most)})
    assert trainer.state.skipped == 1 + 2 * most
    said = [record.getMessage() for record in caplog.records]
    assert [text.split(":")[0] for text in said] == [
        "step 4", "step 11", f"steps 11 to {10 + most} were skipped",
        "step 151", f"steps 151 to {150 + most} were skipped",
    ]  # fmt: skip


def test_filter_labels_are_trained_as_the_configuration_says() -> None:
    with torch.no_grad():
        embedded = Bag()(torch.tensor([[1, 4, 9, 16, 3, 2]]), torch.ones(1, 6))
    before = (embedded @ first_weights().T)[0]
    positive, _ = trained_by(filter_labels="positive")
    negative, _ = trained_by(filter_labels="negative")
    assert positive[3] > before[3] > negative[3]
    for after in (positive, negative):
        assert after[0] > before[0]
        assert (after[4:] < before[4:]).all()


def test_token_dropout_reaches_the_encoder() -> None:
    assert trained_by(token_dropout=0.5)[1][:-1] == [4] * 6
    assert trained_by()[1][:-1] == [6] * 6


@pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16, None])
def test_an_fp16_encoder_gets_a_loss_scale(autocast: torch.dtype | None) -> None:
    encoder = Bag()
    encoder.autocast = autocast
    config = make_config(RunConfig, {"data": "unused", "output": "unused"})
    assert trainer_of(encoder, config, 1).state.loss_scale.dynamic == (autocast == torch.float16)
