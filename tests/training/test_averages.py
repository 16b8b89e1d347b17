"""Averaged weights, against means in float64 of weights that are recorded on the way."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from renee_ray.checkpoint.registry import Checkpoints
from renee_ray.checkpoint.resume import resume
from renee_ray.checkpoint.state import State, set_moments
from renee_ray.checkpoint.writer import CheckpointWriter
from renee_ray.model.encoder import build_encoder
from renee_ray.model.model import Model
from renee_ray.rank.batch import Batch
from renee_ray.rank.collectives import Ranks
from renee_ray.training import averages
from renee_ray.training.averages import number_of
from renee_ray.training.loop import Trainer
from renee_ray.training.schedule import Schedule
from renee_ray.xfc import shard as shard_module
from renee_ray.xfc.labels import LabelRange
from renee_ray.xfc.shard import Shard
from renee_ray.xfc.weights.storages import STORAGES, Weights
from tests.training.gloo import on_ranks
from tests.training.test_bag import CPU, LABELS, SEED, batch_of, config_of, first_weights, weighed

STEPS, SHARE = 6, 0.7
AVERAGED = range(3, STEPS + 1)
MINILM = "sentence-transformers/all-MiniLM-L6-v2"


@pytest.mark.parametrize("total", [1, 2, 7, 100, 969, 12345])
@pytest.mark.parametrize("share", [0.01, 0.33, 0.5, 0.99])
def test_which_weights_count(total: int, share: float) -> None:
    found = {step: number_of(step, total, share) for step in range(1, total + 1)}
    counted = [step for step, number in found.items() if number]
    assert [found[step] for step in counted] == list(range(1, len(counted) + 1))
    assert len(counted) <= 2 * averages.SAMPLES
    if span := round(share * total):
        assert counted[-1] == total and counted[0] > total - span
        assert len(counted) >= min(span, averages.SAMPLES)
        assert len({b - a for a, b in pairwise(counted)}) <= 1
    else:
        assert not counted


@pytest.mark.parametrize("precision", STORAGES)
def test_the_mean_in_every_storage(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one shard, in parts of 70 labels, and of two; its rows are the same bits."""
    monkeypatch.setattr(shard_module, "NUMBERS", 70 * 8)
    labels, dim, count, spacing = 300, 8, 32, {"bf16_sr": 2.0**-5, "fp8_sr": 2.0**-4}
    whole, *shards = (
        Shard(LabelRange(*own, labels), Weights(precision, own[1] - own[0], dim, False, CPU,
              averaged=True))
        for own in ((0, labels), (0, 130), (130, labels))
    )  # fmt: skip
    total, around = torch.zeros(labels, dim, dtype=torch.float64), torch.randn(labels, dim)
    for number in range(1, count + 1):
        rows = around + 0.3 * torch.randn(labels, dim)
        for shard in whole, *shards:
            shard.write(shard.owned.start, rows[shard.owned.start : shard.owned.stop])
            shard.add_to_average(number, SEED, 100 + number)
        total += whole.weights.read(0, labels)
    for shard in whole, *shards:
        shard.take_average()
    found = whole.weights.read(0, labels).clone()
    assert torch.equal(torch.cat([each.weights.read(0, len(each.owned)) for each in shards]), found)
    errors = found - total / count
    # Rounding a bf16 mean 32 times leaves an error of 1.4 units in the last place, and some have 5.
    tolerance = 2 * spacing.get(precision, 2.0**-20)
    assert (errors.abs() / (total / count).abs().clamp(min=0.1)).max() < tolerance
    assert errors.mean().abs() < max(5e-4, tolerance / 100), "rounding has no direction"


def trainer_of(ranks: Ranks, run: Path, at: int = 0, name: str = "none") -> Trainer:
    """A trainer of STEPS, resumed where `run` has a checkpoint; it writes one after `at` steps."""
    own: dict[str, Any] = {"autocast": "off", "learning_rate": 1e-3} if name != "none" else {}
    config = config_of(name=name, **own).model_copy(update={"average": SHARE})

    def build(checkpoint: object) -> Model:
        owned = LabelRange.of_rank(LABELS, ranks.num_ranks, ranks.rank)
        encoder = build_encoder(config.encoder, CPU, SEED)
        weights = Weights("fp32", len(owned), encoder.dim, True, CPU, averaged=True)
        shard = Shard(owned, weights, chunk=3)
        shard.write(owned.start, first_weights(encoder.dim)[owned.start : owned.stop])
        return Model(encoder, shard)

    checkpoints = Checkpoints(str(run))
    model, checkpoint, moments = resume(checkpoints, ranks, build)
    state = checkpoint.state if checkpoint else State()
    writer = CheckpointWriter(checkpoints, ranks, 2, "P@1").start()

    def on_checkpoint(metrics: dict[str, float]) -> None:
        writer.save(state, model.encoder, trainer.optimizer, model.shard, {})
        writer.wait()

    trainer = Trainer(
        config, model, ranks, CPU, Schedule((STEPS,), 0, at), None, lambda record: None,
        on_checkpoint, state,
    )  # fmt: skip
    writer.averages = trainer.averages.tensors
    if checkpoint:
        set_moments(model.encoder, trainer.optimizer, moments)
        trainer.averages.take(moments)
    else:
        weighed(model.encoder, ranks)
    return trainer


def batches(trainer: Trainer) -> Iterator[Batch]:
    return (batch_of(trainer.ranks, i) for i in range(trainer.state.position.batch, 99))


def weights_of(model: Model) -> dict[str, torch.Tensor]:
    """A copy of all that is trained."""
    named = {n: p.detach().clone() for n, p in model.encoder.named_parameters() if p.requires_grad}
    return named | {"shard": model.shard.weights.read(0, len(model.shard.owned)).clone()}


def recorded(ranks: Ranks, run: str, name: str) -> dict[str, Any]:
    """The weights after each step, before their mean replaces the last; the result."""
    trainer, steps = trainer_of(ranks, Path(run), name=name), []
    add = trainer.averages.add

    def recording(step: int, total: int) -> None:
        steps.append(weights_of(trainer.model))
        add(step, total)

    trainer.averages.add = recording  # type: ignore[method-assign]
    trainer.run(batches(trainer))
    return {"steps": steps, "result": weights_of(trainer.model)}


@pytest.mark.parametrize(
    ("num_ranks", "name"), [(1, MINILM), (1, "none"), (2, "none"), (3, "none")]
)
def test_the_result_is_the_mean_of_the_last_weights(
    tmp_path: Path, num_ranks: int, name: str
) -> None:
    arguments = str(tmp_path / "run"), name
    if num_ranks == 1:
        found = [recorded(Ranks(), *arguments)]
    else:
        found = on_ranks(num_ranks, recorded, *arguments)
    for each in found:
        for key, result in each["result"].items():
            own = [weights[key].double() for weights in each["steps"]]
            assert torch.allclose(
                result.double(), sum(own[step - 1] for step in AVERAGED) / len(AVERAGED), atol=1e-6
            )
            if len(result) and not key.endswith("key.bias"):  # whose gradient is 0
                assert not torch.allclose(own[-2], own[-1], atol=1e-7), key


def resumed(ranks: Ranks, run: str) -> dict[str, torch.Tensor]:
    trainer = trainer_of(ranks, Path(run))
    assert trainer.state.step == 4
    trainer.run(batches(trainer))
    return weights_of(trainer.model)


def test_a_run_that_is_cut_among_them_goes_on(tmp_path: Path) -> None:
    whole = trainer_of(Ranks(), tmp_path / "whole")
    whole.run(batches(whole))
    wanted = weights_of(whole.model)
    first = trainer_of(Ranks(), tmp_path / "cut", at=4)
    first.wish = lambda: 3 if first.state.step == 3 else 0
    first.run(batches(first))
    assert first.state.step == 4
    shutil.copytree(tmp_path / "cut", tmp_path / "shared")
    for key, tensor in resumed(Ranks(), str(tmp_path / "cut")).items():
        assert torch.equal(tensor, wanted[key]), key
    found = on_ranks(3, resumed, str(tmp_path / "shared"))
    shards = torch.cat([each.pop("shard") for each in found])
    assert torch.allclose(shards, wanted.pop("shard"), atol=1e-5)
    for each in found:
        for key, tensor in each.items():
            assert torch.allclose(tensor, wanted[key], atol=1e-5), key
