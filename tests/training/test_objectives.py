"""Softmax and soft targets over label shards, against dense autograd in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from renee_ray.checkpoint.registry import Checkpoints
from renee_ray.checkpoint.resume import resume
from renee_ray.checkpoint.state import Checkpoint, State, set_moments
from renee_ray.config.schema import EncoderConfig
from renee_ray.model.encoder import adamw, data_parallel
from renee_ray.model.model import Model
from renee_ray.rank.batch import Batch, Position, Ragged, mix_targets
from renee_ray.rank.collectives import Ranks
from renee_ray.training.step import Step
from renee_ray.xfc.labels import LabelRange, split_range
from renee_ray.xfc.shard import Shard
from renee_ray.xfc.weights.storages import SGD, STORAGES, Weights
from tests.pairwise import pairwise
from tests.training.gloo import on_ranks
from tests.training.test_checkpoint_writer import writer_of
from tests.training.test_step import DIM, VOCABULARY, Bag, dense_optimizers, run_config
from tests.xfc.test_softmax import SPACING, UNIT, dense_loss, error

ENCODER = EncoderConfig(learning_rate=1e-2, weight_decay=0.1)
CPU, BATCH, SHARE = torch.device("cpu"), 7, 0.3
RULE = SGD(lr=0.05, momentum=0.9, weight_decay=0.01)
LARGE = replace(RULE, lr=1.0)
"""Its updates are about as large as the weights, and not lost in the rounding of fp8."""
CASES = pairwise(STORAGES, ["softmax", "bce"], [False, True], [11, 2])
"""Storage, objective, whether there is a teacher, labels: of two, a rank of three has none."""


def global_batch(number: int, labels: int) -> dict[str, Any]:
    """Rows as lists: given and filter labels, a teacher's labels and probabilities.

    Some rows have no label, and the second batch is ragged: with three ranks, one has no row.
    """
    rng = np.random.default_rng([number, labels])
    rows = BATCH if number != 1 else 2
    some = [int(n) for n in rng.integers(0, min(4, labels) + 1, rows)]
    listed = [int(n) for n in rng.integers(0, min(6, labels) + 1, rows)]
    return {
        "tokens": [rng.integers(0, VOCABULARY, rng.integers(1, 6)).tolist() for _ in range(rows)],
        "given": [[*rng.choice(labels, n, replace=False).tolist()] * 2 for n in some],
        "filtered": [[int(label)] for label in rng.integers(0, labels, rows)],
        "predicted": [rng.choice(labels, n, replace=False).tolist() for n in listed],
        "probabilities": [rng.random(n).round(2).tolist() for n in listed],
    }


def targets(of: dict[str, Any], labels: int, taught: bool) -> Tensor:
    """The dense targets, label by label."""
    found = torch.zeros(len(of["tokens"]), labels, dtype=torch.float64)
    for row in range(len(found)):
        for label in (*of["given"][row], *of["filtered"][row]):
            found[row, label] = 1
        for label, p in zip(of["predicted"][row], of["probabilities"][row], strict=True):
            if taught and label not in of["filtered"][row]:
                found[row, label] = (1 - SHARE) * found[row, label] + SHARE * p
    return found


def batch_of(ranks: Ranks, number: int, labels: int, taught: bool) -> Batch:
    """This rank's rows, as the trainer prepares them."""
    of = global_batch(number, labels)
    mine = slice(*split_range(len(of["tokens"]), ranks.num_ranks, ranks.rank))
    tokens, given, filtered, predicted = (
        Ragged.of_lists(of[name][mine]) for name in ("tokens", "given", "filtered", "predicted")
    )
    probabilities = np.array([p for row in of["probabilities"][mine] for p in row], np.float64)
    batch = Batch(
        Position(0, number), np.arange(len(tokens)), tokens, given, filtered, 0,
        predicted=(predicted, probabilities) if len(tokens) else None,
    )  # fmt: skip
    return batch.for_training(
        0, token_dropout=0, filter_labels_positive=True, targets_weight=SHARE if taught else None
    )


def first_weights(labels: int) -> Tensor:
    return torch.randn(labels, DIM, generator=torch.Generator().manual_seed(2))


class Worker:
    """A rank's part of the model and its step."""

    def __init__(self, ranks: Ranks, precision: str, objective: Any, labels: int) -> None:
        owned = LabelRange.of_rank(labels, ranks.num_ranks, ranks.rank)
        compute = STORAGES[precision].compute
        self.ranks, self.labels = ranks, labels
        self.shard = Shard(owned, Weights(precision, len(owned), DIM, True, CPU, compute), chunk=3)
        self.shard.write(owned.start, first_weights(labels)[owned.start : owned.stop])
        self.encoder = Bag()
        self.optimizer = adamw(self.encoder, ENCODER)  # type: ignore[arg-type]
        encoder: Any = data_parallel(self.encoder, ranks, "sum")  # type: ignore[arg-type]
        config = run_config(ENCODER, classifier={"objective": objective})
        self.step = Step(config, encoder, self.shard, self.optimizer, ranks, CPU)

    def train(self, first: int, stop: int, taught: bool, rule: SGD = RULE) -> dict[str, Tensor]:
        """Makes these steps; of the last, `gradient` is this rank's part of a matrix's gradient."""
        own: list[Tensor] = []
        self.encoder.out.weight.register_hook(lambda gradient: own.append(gradient.clone()))
        losses = []
        for number in range(first, stop):
            batch = batch_of(self.ranks, number, self.labels, taught)
            losses.append(self.step(batch, number, rule, with_loss=True).loss)
        self.step.settle()
        encoder = {f"encoder {n}": p.detach().clone() for n, p in self.encoder.named_parameters()}
        weight = self.shard.weights.read(0, len(self.shard.owned)).clone()
        return {"loss": torch.stack(losses), "gradient": own[-1], "weight": weight, **encoder}


def everything(ranks: Ranks) -> dict[str, Any]:
    """What is asked of one world size, in one start of its processes."""
    found: dict[str, Any] = {"one": [], "six": []}
    for precision, objective, taught, labels in CASES:
        worker = Worker(ranks, precision, objective, labels)
        stored = worker.shard.weights.read(0, len(worker.shard.owned)).clone()
        found["one"].append({**worker.train(0, 1, taught, LARGE), "stored": stored})
    for taught in (False, True):
        found["six"].append(Worker(ranks, "fp32", "softmax", 11).train(0, 6, taught))
    return found


@pytest.fixture(scope="module")
def runs() -> dict[int, list[dict[str, Any]]]:
    return {num_ranks: on_ranks(num_ranks, everything) for num_ranks in (1, 2, 3)}


def whole(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Shards put together, losses and gradients summed; encoders must be the same everywhere."""
    for name in parts[0]:
        assert not name.startswith("encoder") or all(
            torch.equal(part[name], parts[0][name]) for part in parts
        )
    summed = {n: torch.stack([p[n] for p in parts]).sum(0) for n in ("loss", "gradient")}
    joined = {n: torch.cat([p[n] for p in parts]) for n in ("weight", "stored") if n in parts[0]}
    return {**parts[0], **summed, **joined}


def oracle(
    weight: Tensor, objective: str, labels: int, steps: int, taught: bool, rule: SGD = RULE
) -> dict[str, Any]:
    encoder, own = Bag().double(), weight.double().requires_grad_()
    classifier, optimizer = dense_optimizers(encoder, own, ENCODER, rule)
    losses = []
    for number in range(steps):
        of = global_batch(number, labels)
        width = max(map(len, of["tokens"]))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in of["tokens"]])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in of["tokens"]])
        loss = dense_loss(encoder(ids, mask) @ own.T, targets(of, labels, taught), objective)
        classifier.zero_grad()
        optimizer.zero_grad()
        loss.backward()
        gradient = encoder.out.weight.grad
        classifier.step()
        optimizer.step()
        losses.append(loss.detach())
    state = {f"encoder {name}": p.detach() for name, p in encoder.named_parameters()}
    return {"loss": torch.stack(losses), "gradient": gradient, "weight": own.detach(), **state}


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_a_step_in_every_storage(runs: dict[int, list[dict[str, Any]]], num_ranks: int) -> None:
    """Loss, gradient of E (seen in the encoder's) and update of W, from the weights as stored."""
    for number, (precision, objective, taught, labels) in enumerate(CASES):
        found = whole([rank["one"][number] for rank in runs[num_ranks]])
        wanted = oracle(found["stored"], objective, labels, 1, taught, LARGE)
        for each in (found, wanted):
            each["weight"] = each["weight"] - found["stored"]
        unit = UNIT[STORAGES[precision].compute]
        errors = {name: error(found[name], wanted[name]) for name in ("loss", "gradient", "weight")}
        print(num_ranks, precision, objective, taught, labels, errors)
        assert max(errors["loss"], errors["gradient"]) < 4 * unit
        assert errors["weight"] < 4 * unit + 2 * SPACING.get(precision, 0.0)
        # The other objective, and targets without the teacher, are far from what is found.
        other = oracle(
            found["stored"], *(("bce", labels, 1, taught) if objective == "softmax" else
            ("softmax", labels, 1, taught)),
        )  # fmt: skip
        untaught = oracle(found["stored"], objective, labels, 1, not taught)
        for wrong in (other, untaught):
            assert error(found["gradient"], wrong["gradient"]) > max(0.02, 4 * errors["gradient"])


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("taught", [False, True])
def test_six_steps_of_softmax(
    runs: dict[int, list[dict[str, Any]]], num_ranks: int, taught: bool
) -> None:
    found = whole([rank["six"][taught] for rank in runs[num_ranks]])
    wanted = oracle(first_weights(11), "softmax", 11, 6, taught)
    errors = {name: error(found[name], wanted[name]) for name in wanted}
    print(num_ranks, taught, max(errors.values()))
    assert max(errors.values()) < 1e-5


def continued(ranks: Ranks, run: str) -> dict[str, Tensor]:
    """Trains three steps, writes a checkpoint, and makes three more from what is read of it."""
    worker, writer = Worker(ranks, "bf16_sr", "softmax", 11), writer_of(Path(run), ranks)
    worker.train(0, 3, True)
    state = State(Position(0, 3), 3, facts={"num_labels": 11})
    writer.save(state, worker.encoder, worker.optimizer, worker.shard, {})  # type: ignore[arg-type]
    assert writer.wait()
    again = Worker(ranks, "bf16_sr", "softmax", 11)

    def build(checkpoint: Checkpoint | None) -> Model:
        return Model(again.encoder, again.shard)  # type: ignore[arg-type]

    model, checkpoint, moments = resume(Checkpoints(run), ranks, build)
    assert checkpoint is not None and checkpoint.state.step == 3
    set_moments(model.encoder, again.optimizer, moments)
    return again.train(3, 6, True)


def straight(ranks: Ranks, run: str) -> dict[str, dict[str, Tensor]]:
    one = Worker(ranks, "bf16_sr", "softmax", 11)
    one.train(0, 3, True)
    return {"through": one.train(3, 6, True), "resumed": continued(ranks, run)}


def test_a_resumed_run_is_the_same_to_the_last_bit(tmp_path: Path) -> None:
    for rank in on_ranks(2, straight, str(tmp_path)):
        for name, wanted in rank["through"].items():
            assert torch.equal(rank["resumed"][name], wanted), name


def test_mixed_targets() -> None:
    given = Ragged.of_lists([[5, 3, 5], [], [2]])
    filtered = Ragged.of_lists([[3], [9], []])
    predicted = Ragged.of_lists([[5, 3, 7], [9, 1], []])
    p = np.array([0.5, 0.9, 0.25, 0.8, 1.0])
    labels, values = mix_targets(given, filtered, predicted, p, 0.4)
    assert labels.offsets.tolist() == [0, 3, 4, 5]
    assert labels.values.tolist() == [3, 5, 7, 1, 2]
    assert values == pytest.approx([1.0, 0.6 + 0.4 * 0.5, 0.1, 0.4, 1.0])
    labels, values = mix_targets(given, filtered, predicted, p * 0, 1.0)
    assert labels.values.tolist() == [3, 2] and values.tolist() == [1, 1]
    labels, values = mix_targets(given, filtered, predicted, p, 0.0)
    assert labels.values.tolist() == [3, 5, 2], "a teacher without weight says nothing"
    none = Ragged.of_lists([])
    labels, values = mix_targets(none, none, none, np.zeros(0), 0.5)
    assert (len(labels), len(values)) == (0, 0)
