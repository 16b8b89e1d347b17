"""Hidden labels, of offset -inf: exactly k others come in their place."""

from __future__ import annotations

import pytest
import torch

from renee_ray.benchmarks.topk import against_exact, rounding
from renee_ray.xfc.labels import NONE, LabelRange
from renee_ray.xfc.shard import Pairs, Shard
from renee_ray.xfc.topk import best as best_module
from renee_ray.xfc.topk import select
from renee_ray.xfc.weights.storages import STORAGES, Weights
from tests.devices import DEVICES
from tests.pairwise import pairwise

LABELS, DIM, ROWS = 2400, 32, 16


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("precision", "num_ranks", "k", "way", "adjusted"),
    pairwise(STORAGES, [1, 2, 3], [1, 20], ["compiled", "plain"], [False, True]),
)
def test_as_many_others_come(
    precision: str, num_ranks: int, k: int, way: str, adjusted: bool, device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The oracle has the columns of the other labels alone, in float64; a shard is all hidden."""
    if way == "plain":
        monkeypatch.setattr(best_module, "Best", best_module.PlainBest)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(LABELS + ROWS, DIM, generator=generator).to(device)
    inputs = drawn[LABELS:]
    offset = torch.randn(LABELS, generator=generator).to(device) * adjusted
    hidden = torch.zeros(LABELS, dtype=torch.bool, device=device)
    hidden[(inputs @ drawn[:LABELS].T).topk(15, dim=1).indices.flatten()] = True
    hidden[: LABELS // 3] |= num_ranks == 3
    shift = offset.masked_fill(hidden, -torch.inf)
    rows, banned = torch.arange(ROWS), torch.arange(ROWS) * 97 + 900
    found, stored = [], []
    for rank in range(num_ranks):
        owned = LabelRange.of_rank(LABELS, num_ranks, rank)
        weights = Weights(precision, len(owned), DIM, False, torch.device(device))
        weights.weight.write(0, len(owned), drawn[owned.start : owned.stop])
        stored.append(weights.weight.read(0, len(owned)).clone())
        here = (banned >= owned.start) & (banned < owned.stop)
        pairs = Pairs(rows[here], banned[here], owned, torch.device(device))
        own = shift[owned.start : owned.stop]
        found.append(select.shard_topk(Shard(owned, weights, 300), inputs, k, pairs, own))
    scores, labels = select.merge_topk(*map(list, zip(*found, strict=True)), k)
    whole = torch.cat(stored)
    exact = inputs.double() @ whole.double().T + offset.double()
    allowed = rounding(inputs, whole) + 2.0**-24 * exact.abs().amax(dim=1)
    exact[rows, banned] = -torch.inf
    shown = exact.masked_fill(hidden, -torch.inf)
    assert (labels != NONE).all()
    assert not hidden[labels].any()
    assert against_exact((scores, labels), [(0, shown)], allowed)[0]
    assert hidden[exact.topk(k, dim=1).indices].any(), "otherwise nothing is hidden here"


def test_fewer_than_k_are_left() -> None:
    owned = LabelRange(0, 5, 5)
    shard = Shard(owned, Weights("fp32", 5, 2, False, torch.device("cpu")))
    shift = torch.tensor([0.0, -torch.inf, 0.0, -torch.inf, -torch.inf])
    labels = select.shard_topk(shard, torch.ones(3, 2), 4, None, shift)[1]
    assert labels.tolist() == 3 * [[0, 2, NONE, NONE]]
