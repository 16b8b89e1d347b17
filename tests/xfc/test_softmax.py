"""Softmax and soft targets, on a shard, against dense autograd in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from renee_ray.xfc.labels import LabelRange
from renee_ray.xfc.shard import Pairs, Shard
from renee_ray.xfc.softmax import Reductions
from renee_ray.xfc.weights.storages import SGD, STORAGES, Weights
from tests.pairwise import pairwise
from tests.xfc.memory import Fresh, Largest

CPU = torch.device("cpu")
LABELS, DIM, BATCH = 47, 6, 9
RULE = SGD(2.0, 0.9, 0.02)
"""Its updates are about as large as the weights, and not lost in the rounding of fp8."""
UNIT = {torch.float32: 2.0**-22, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
SPACING = {"bf16_sr": 2.0**-7, "fp8_sr": 2.0**-3}
"""Of stored numbers, where rounding is stochastic."""
POSITIVES: dict[str, list[tuple[int, int, float]]] = {
    "given": [(0, 8, 1), (0, 24, 1), (3, 12, 1), (3, 13, 1), (8, 46, 1), (7, 8, 1)],
    "soft": [(0, 8, 1), (0, 24, 0.3), (3, 12, 0.9), (3, 13, 1e-3), (8, 46, 0.5), (7, 8, 1)],
    "none": [],
    "a row of all": [*((2, label, 1.0) for label in range(LABELS)), (4, 7, 1.0)],
}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def target(kind: str) -> Tensor:
    found = torch.zeros(BATCH, LABELS, dtype=torch.float64)
    for row, label, value in POSITIVES[kind]:
        found[row, label] = value
    return found


def dense_loss(logits: Tensor, y: Tensor, objective: str) -> Tensor:
    """As the definitions say, row by row and positive by positive."""
    if objective == "bce":
        return binary_cross_entropy_with_logits(logits, y, reduction="sum")
    total = logits.sum() * 0
    for row, values in zip(logits, y, strict=True):
        for positive in values.nonzero()[:, 0]:
            s, negatives = row[positive], ((1 - values) * row.exp()).sum()
            total = total - values[positive] * torch.log(s.exp() / (s.exp() + negatives))
    return total


def dense(weight: Tensor, inputs: Tensor, y: Tensor, objective: str) -> list[Tensor]:
    """[loss, dE, change of W in one step], float64, by autograd and torch.optim.SGD."""
    own, rows = (each.clone().double().requires_grad_() for each in (weight, inputs))
    optimizer = torch.optim.SGD(
        [own], RULE.lr, momentum=RULE.momentum, weight_decay=RULE.weight_decay
    )
    loss = dense_loss(rows @ own.T, y, objective)
    loss.backward()
    optimizer.step()
    assert rows.grad is not None
    return [loss.detach(), rows.grad, own.detach() - weight]


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm().clamp(min=1e-3))


def step(
    kind: str, objective: str, precision: str, compute: torch.dtype, chunk: int = 5
) -> tuple[list[Tensor], list[Tensor]]:
    """(loss, dE and change of W in a step of a shard; those of the oracle for its weights)."""
    owned = LabelRange(0, LABELS, LABELS)
    shard = Shard(owned, Weights(precision, LABELS, DIM, True, CPU, compute), chunk)
    shard.write(0, normal(LABELS, DIM, seed=1))
    stored, inputs = shard.weights.read(0, LABELS).clone(), normal(BATCH, DIM, seed=2)
    both = torch.tensor(POSITIVES[kind], dtype=torch.float64).reshape(-1, 3)
    rows, labels = both[:, 0].long(), both[:, 1].long()
    pairs = Pairs(rows, labels, owned, values=None if kind == "given" else both[:, 2])
    seen: list[Tensor] = []
    softmax = Reductions() if objective == "softmax" else None
    loss = shard.step(inputs, pairs, RULE, with_loss=True, on_gradient=seen.append, softmax=softmax)
    assert (loss.dtype, seen[0].dtype) == (torch.float64, torch.float32)
    found = [loss, seen[0], shard.weights.read(0, LABELS) - stored]
    return found, dense(stored, inputs, target(kind), objective)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("kind", "objective", "chunk"),
    pairwise(POSITIVES, ["softmax", "bce"], [1, 16, 47, 0]),
)
def test_fp32_equals_float64_autograd(
    kind: str, objective: str, chunk: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr("renee_ray.xfc.lanes.LEAST_LABELS", 8)
    found, wanted = step(kind, objective, "fp32", torch.float32, chunk)
    assert max(map(error, found, wanted)) < 1e-5
    if kind != "none":
        for other in {"given", "soft", "none"} - {kind}:
            assert error(found[1], step(other, objective, "fp32", torch.float32)[1][1]) > 1e-3


COMPUTE = sorted(
    {(name, dtype) for name, s in STORAGES.items() for dtype in (torch.float32, s.compute)}, key=str
)


@pytest.mark.parametrize(
    ("stored", "objective", "kind"), pairwise(COMPUTE, ["softmax", "bce"], ["given", "soft"])
)
def test_every_storage_gives_the_gradient_of_its_own_weights(
    stored: tuple[str, torch.dtype], objective: str, kind: str
) -> None:
    """Only the matmuls' dtype and the rounding of what is stored are inexact."""
    found, wanted = step(kind, objective, *stored)
    unit = UNIT[stored[1]]
    print(stored, objective, kind, *map(error, found, wanted))
    assert error(found[0], wanted[0]) < 3 * unit
    assert error(found[1], wanted[1]) < 3 * unit
    assert error(found[2], wanted[2]) < 3 * unit + 2 * SPACING.get(stored[0], 0.0)


@pytest.mark.parametrize("large", [200.0, -200.0])
def test_logits_beyond_exp_are_no_nan(large: float) -> None:
    """A positive, and a negative, whose exponential fp32 cannot hold."""
    shard = Shard(LabelRange(0, 3, 3), Weights("fp32", 3, 1, False, CPU))
    weight, inputs = torch.tensor([[large], [1.0], [0.5]]), torch.ones(2, 1)
    shard.write(0, weight)
    pairs = Pairs(torch.tensor([0, 1]), torch.tensor([0, 1]), shard.owned)
    y = torch.tensor([[1.0, 0, 0], [0, 1, 0]], dtype=torch.float64)
    seen: list[Tensor] = []
    loss = shard.step(
        inputs, pairs, SGD(0.1), with_loss=True, on_gradient=seen.append, softmax=Reductions()
    )
    wanted = dense(weight, inputs, y, "softmax")
    assert error(loss, wanted[0]) < 1e-5
    assert error(seen[0], wanted[1]) < 1e-5


@pytest.mark.parametrize("precision", ["fp32", "bf16_split"])
def test_nothing_of_batch_by_labels_is_made_and_buffers_are_kept(precision: str) -> None:
    batch, n, chunk, dim = 32, 2000, 64, 8
    shard = Shard(LabelRange(0, n, n), Weights(precision, n, dim, True, CPU), chunk)
    rows = torch.arange(batch).repeat_interleave(3)
    pairs, inputs = Pairs(rows, (rows * 37) % n, shard.owned), normal(batch, dim, seed=3)
    with Largest() as largest:
        shard.step(inputs, pairs, RULE, with_loss=True, softmax=Reductions())
    assert largest.numel <= batch * chunk
    with Fresh() as fresh:
        shard.step(inputs, pairs, RULE, softmax=Reductions())
    assert fresh.numel <= batch * dim


def test_a_repeated_pair_has_its_largest_value() -> None:
    owned = LabelRange(0, 9, 9)
    rows, labels = torch.tensor([1, 0, 1, 1]), torch.tensor([4, 4, 4, 7])
    pairs = Pairs(rows, labels, owned, values=torch.tensor([0.25, 0.5, 0.75, 1.0]))
    ((rows, labels, values),) = pairs.by_chunk([(0, 9)])
    assert [*zip(rows.tolist(), labels.tolist(), values.tolist(), strict=True)] == [
        (0, 4, 0.5), (1, 4, 0.75), (1, 7, 1.0),
    ]  # fmt: skip
    ((*_, kept),) = pairs.of_rows(torch.tensor([1])).by_chunk([(0, 9)])
    assert kept.tolist() == [0.75, 1.0]
