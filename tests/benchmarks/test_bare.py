"""The bare loop on a tiny dataset: which batches it trains, and that it trains like any run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from renee_ray.benchmarks import bare
from renee_ray.benchmarks.bare import (
    PROFILED,
    Clock,
    Job,
    held_batches,
    time_bare_steps,
    weight_norms,
)
from renee_ray.config.overrides import make_config
from renee_ray.config.schema import RunConfig
from renee_ray.data.dataset import Dataset
from renee_ray.data.order import training_order
from renee_ray.model.model import Model
from renee_ray.rank.collectives import Ranks
from renee_ray.training.loop import Trainer
from renee_ray.xfc.labels import LabelRange
from renee_ray.xfc.shard import Shard
from renee_ray.xfc.weights.storages import Weights
from tests.data.tiny import write_tiny
from tests.training.gloo import on_ranks
from tests.training.test_step import DIM, Bag

CPU = torch.device("cpu")
POINTS = (30, 11)
SETTINGS: dict[str, Any] = {
    "data": "unused", "output": "unused", "batch_size": 8, "loss_every": 1, "warmup": 0.5,
    "encoder": {"max_length": 7, "learning_rate": 0.01},
    "classifier": {"precision": "fp32", "learning_rate": 0.1},
    "feed": {"streams": 4, "window": 2, "token_dropout": 0.3},
}  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_tiny(tmp_path_factory.mktemp("tiny"), train=POINTS, vocabulary=20)


def job_of(dataset: Dataset, seed: int = 0, warmup: int = 2, steps: int = 6) -> Job:
    config = make_config(RunConfig, SETTINGS, {"seed": seed})
    orders = tuple(
        training_order(
            list(POINTS), [], augment=0, seed=seed, epoch=epoch, batch_size=8, streams=4, window=2
        )
        for epoch in range(3)
    )
    return Job(config, dataset, orders, warmup, steps, 1, False)


def tiny_model(config: RunConfig, num_labels: int, ranks: Ranks, *_: Any, **__: Any) -> Model:
    torch.manual_seed(0)
    owned = LabelRange.of_rank(num_labels, ranks.num_ranks, ranks.rank)
    encoder: Any = Bag()
    return Model(encoder, Shard(owned, Weights("fp32", len(owned), DIM, True, CPU)))


def measured(ranks: Ranks, job: Job) -> dict[str, Any]:
    bare.build_model = tiny_model  # type: ignore[assignment]  # in a process of its own
    return time_bare_steps(ranks, CPU, job)


def by_hand(job: Job) -> tuple[float, float]:
    """The norms after the same steps by `Trainer.run`, whose batches are held in a list."""
    model = tiny_model(job.config, job.dataset.manifest.num_labels, Ranks())
    model.shard.initialise_normal(job.config.classifier.init_std, job.config.seed)
    Trainer(
        job.config, model, Ranks(), CPU, job.schedule, None,
        lambda record: None, lambda metrics: None,
    ).run(iter(held_batches(job, Ranks())))  # fmt: skip
    return weight_norms(model, Ranks())


@pytest.mark.slow
def test_it_trains_as_a_run_does_on_any_number_of_ranks(dataset: Dataset) -> None:
    job = job_of(dataset)
    (one,), two = on_ranks(1, measured, job), on_ranks(2, measured, job)
    assert one["weights"] == pytest.approx(by_hand(job), rel=1e-6)
    assert one["weights"] != pytest.approx(by_hand(job_of(dataset, seed=1)), rel=1e-4)
    for found in two:
        assert found["weights"] == pytest.approx(one["weights"], rel=1e-5)
        assert found["rows"] == one["rows"]
        assert found["tokens"] == one["tokens"] < found["cells"]
    batches = held_batches(job, Ranks())
    assert len(batches) == job.total == 12
    assert one["rows"] == sum(len(batch) for batch in batches[2:8])
    assert one["rows"] < sum(len(batch) for batch in batches)
    phases = one["phases"]
    assert 0 < phases["classifier"] < one["seconds"] and phases["encoder_forward"] > 0
    assert sum(phases.values()) > phases["classifier"]
    assert one["matmul_s"] > 0, "the encoder has a linear layer"
    assert one["gpu_peak_gib"] is None
    assert (one["threads"], one["precision"]) == (1, "fp32")


def test_the_batches_are_the_global_ones_in_order(dataset: Dataset) -> None:
    job = job_of(dataset, steps=12)
    alone = held_batches(job, Ranks())
    halves = [held_batches(job, Ranks(rank, 2)) for rank in range(2)]
    epoch = job.orders[0].num_batches
    epochs = [0] * epoch + [1] * epoch + [2] * (job.total - 2 * epoch)
    assert [batch.position.epoch for batch in alone] == epochs
    for whole, first, second in zip(alone, *halves, strict=True):
        assert whole.position == first.position == second.position
        assert whole.points.tolist() == [*first.points, *second.points]
    seen = np.concatenate([batch.points for batch in alone[:epoch]])
    assert sorted(seen) == list(range(sum(POINTS)))


def test_the_schedule_has_the_jobs_steps_in_the_batches_of_the_epochs(dataset: Dataset) -> None:
    job = job_of(dataset, steps=9)
    epoch = job.orders[0].num_batches
    assert job.schedule.batches == (epoch, epoch, 3) and job.schedule.total == 15
    assert job_of(dataset, warmup=0, steps=1).schedule.batches == (1 + PROFILED,) < (epoch,)


def test_the_clock_counts_from_asking_to_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 3.0, 3.5, 7.0, 7.25])
    monkeypatch.setattr(bare.time, "perf_counter", lambda: next(times))
    batches: Iterator[Any] = iter("abc")
    clock = Clock(batches)
    assert [next(clock) for _ in range(3)] == list[Any]("abc")
    assert clock.seconds(0, 2) == 7.0 and clock.seconds(1, 2) == 4.0
    assert clock.waited(0, 2) == 1.5 and clock.waited(2, 3) == 0.25
