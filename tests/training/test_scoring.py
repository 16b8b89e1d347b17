"""Distributed evaluation against metrics computed densely, by brute force."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from renee_ray.config.overrides import make_config
from renee_ray.config.schema import RunConfig
from renee_ray.model.model import Model
from renee_ray.rank.batch import Batch, Position, Ragged
from renee_ray.rank.collectives import Ranks
from renee_ray.scoring.metrics import best_tail, inverse_propensity
from renee_ray.scoring.scorer import (
    Propensities,
    Scorer,
    evaluate,
    prior_offset,
    without_labels,
)
from renee_ray.training.loop import Trainer, Validation
from renee_ray.training.schedule import Schedule
from renee_ray.xfc.labels import LabelRange, split_range
from renee_ray.xfc.shard import Shard
from renee_ray.xfc.weights.storages import Weights
from tests.devices import DEVICES
from tests.test_metrics import brute_force
from tests.training.gloo import on_ranks

CPU = torch.device("cpu")
WORLD_SIZES = (1, 2, 3)
LABELS, DIM, BAG, VOCABULARY = 23, 5, 2, 15
SIZES = (7, 1, 2, 6)  # of the global batches; some leave a rank without rows


class Sum(nn.Module):
    dim, autocast = DIM, None

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, DIM)
        with torch.no_grad():
            self.tokens.weight.copy_(
                torch.randn(VOCABULARY, DIM, generator=torch.Generator().manual_seed(0))
            )
        self.noise = nn.Dropout(0.5)  # scoring must switch it off

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.noise((self.tokens(ids) * mask.unsqueeze(-1)).sum(1))


class WithBag(Sum):
    """The last `BAG` columns stand for those of a bag, and a constant is added to all."""

    bag = SimpleNamespace(dim=BAG)
    constant = torch.arange(1.0, DIM + 1)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return super().forward(ids, mask) + self.constant


Point = tuple[list[int], list[int], list[int]]


def points() -> list[list[Point]]:
    """(tokens, labels, filter labels) of each global batch."""
    rng = np.random.default_rng(3)
    out = []
    for size in SIZES:
        batch = []
        for _ in range(size):
            ids = rng.permutation(LABELS)
            true, filtered = ids[: rng.integers(0, 6)], ids[8 : 8 + rng.integers(0, 14)]
            tokens = rng.integers(0, VOCABULARY, rng.integers(1, 5))
            batch.append((tokens.tolist(), sorted(true.tolist()), sorted(filtered.tolist())))
        out.append(batch)
    return out


def weight() -> torch.Tensor:
    return torch.randn(LABELS, DIM, generator=torch.Generator().manual_seed(1))


def inverse() -> np.ndarray:
    return inverse_propensity(np.arange(LABELS) ** 2, 500, 0.55, 1.5)


def scorer_of(encoder: Sum, ranks: Ranks, device: torch.device = CPU) -> Scorer:
    owned = LabelRange.of_rank(LABELS, ranks.num_ranks, ranks.rank)
    shard = Shard(owned, Weights("bf16_split", len(owned), DIM, False, device), chunk=4)
    shard.write(owned.start, weight()[owned.start : owned.stop].to(device))
    return Scorer(encoder.to(device), shard, ranks, device)  # type: ignore[arg-type]


def batches_of(ranks: Ranks) -> list[Batch]:
    batches = []
    for number, listed in enumerate(points()):
        mine = listed[slice(*split_range(len(listed), ranks.num_ranks, ranks.rank))]
        columns = [Ragged.of_lists([point[i] for point in mine]) for i in range(3)]
        batches.append(Batch(Position(0, number), np.arange(len(mine)), *columns, pad_id=0))
    return batches


def score(ranks: Ranks, device: torch.device = CPU) -> dict[str, torch.Tensor]:
    encoder, batches = Sum(), batches_of(ranks)
    scorer = scorer_of(encoder, ranks, device)
    owned = scorer.shard.owned
    own = torch.from_numpy(inverse()[owned.start : owned.stop])
    metrics = evaluate(scorer, batches, Propensities(own, owned, ranks)).metrics()
    assert encoder.training, "the mode is put back"
    found = {
        f"labels {i}": labels for i, (_, _, labels, _) in enumerate(scorer.predict(batches, 30))
    }
    return {
        **found,
        **{name: torch.tensor(value, dtype=torch.float64) for name, value in metrics.items()},
    }


@pytest.fixture(scope="module")
def runs() -> dict[int, list[dict[str, torch.Tensor]]]:
    return {n: [score(Ranks())] if n == 1 else on_ranks(n, score) for n in WORLD_SIZES}


def dense(*, filtered: bool = True) -> list[list[int]]:
    """All labels of each point, best first, filter labels gone, filled with -1."""
    encoder = Sum().eval()
    rows = []
    for tokens, _, gone in [point for batch in points() for point in batch]:
        ids = torch.tensor([tokens])
        logits = (encoder(ids, torch.ones_like(ids)) @ weight().T)[0]
        best = [
            i for i in logits.argsort(descending=True).tolist() if not filtered or i not in gone
        ]
        rows.append(best + [-1] * (LABELS - len(best)))
    return rows


def expected(rows: list[list[int]]) -> dict[str, float]:
    true = [set(labels) for batch in points() for _, labels, _ in batch]
    return brute_force(rows, true, dict(enumerate(inverse().tolist())))


@pytest.mark.parametrize("num_ranks", WORLD_SIZES)
def test_metrics_equal_brute_force_on_every_rank(
    runs: dict[int, list[dict[str, torch.Tensor]]], num_ranks: int
) -> None:
    wanted = expected(dense())
    for result in runs[num_ranks]:
        found = {name: float(v) for name, v in result.items() if "labels" not in name}
        assert found == pytest.approx(wanted, abs=1e-9)
    unfiltered = expected(dense(filtered=False))
    assert abs(unfiltered["P@1"] - wanted["P@1"]) > 1, "the filter makes a difference"


HIDDEN = np.isin(np.arange(LABELS), [0, 5, 6, 7, 19])


def score_without(ranks: Ranks) -> dict[str, torch.Tensor]:
    scorer = scorer_of(Sum(), ranks)
    owned = scorer.shard.owned
    hidden, count = HIDDEN[owned.start : owned.stop], np.zeros(len(owned))
    scorer = replace(scorer, offset=prior_offset(count, 0.0, CPU, hidden))
    own = torch.from_numpy(inverse()[owned.start : owned.stop])
    batches = without_labels(batches_of(ranks), HIDDEN)
    metrics = evaluate(scorer, batches, Propensities(own, owned, ranks)).metrics()
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in metrics.items()}


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_hidden_labels_count_as_if_there_were_none(num_ranks: int) -> None:
    gone = set(np.flatnonzero(HIDDEN).tolist())
    shown = [[label for label in row if label not in gone] for row in dense()]
    rows = [row + [-1] * (LABELS - len(row)) for row in shown]
    true = [set(labels) - gone for batch in points() for _, labels, _ in batch]
    wanted = brute_force(rows, true, dict(enumerate(inverse().tolist())))
    alone = num_ranks == 1
    for result in [score_without(Ranks())] if alone else on_ranks(num_ranks, score_without):
        found = {name: float(v) for name, v in result.items()}
        assert found == pytest.approx(wanted, abs=1e-9)
        assert found != pytest.approx(expected(dense()), abs=1e-3)


TAILS = (0.0, 0.2, 0.5, 1.5)
COUNTS = np.random.default_rng(8).integers(0, 400, LABELS)


def score_by_tail(ranks: Ranks) -> dict[str, torch.Tensor]:
    encoder = Sum()
    shard = scorer_of(encoder, ranks).shard
    own, owned = slice(shard.owned.start, shard.owned.stop), shard.owned
    given = Validation(
        lambda: iter(batches_of(ranks)),
        Propensities(torch.from_numpy(inverse()[own]), owned, ranks),
        partial(prior_offset, COUNTS[own], device=CPU),
    )
    trainer = Trainer(
        make_config(RunConfig, {"data": "d", "output": "o"}), Model(encoder, shard), ranks, CPU,
        Schedule((1,), 1.0, 0), given, lambda record: None, lambda metrics: None,
    )  # fmt: skip
    return {
        f"{tail} {name}": torch.tensor(value, dtype=torch.float64)
        for tail in TAILS
        for name, value in trainer.scored(tail).metrics().items()
    }


def ranked(tail: float) -> list[list[int]]:
    """All labels of each point by adjusted scores in float64, as `dense` has them without."""
    vectors, rows = Sum().tokens.weight.detach().double(), []
    for tokens, _, gone in [point for batch in points() for point in batch]:
        logits = (weight().double() @ vectors[tokens].sum(0)).tolist()
        adjusted = [z - tail * math.log(max(n, 1)) for z, n in zip(logits, COUNTS, strict=True)]
        best = [i for i in sorted(range(LABELS), key=lambda i: -adjusted[i]) if i not in gone]
        rows.append(best + [-1] * (LABELS - len(best)))
    return rows


@pytest.mark.parametrize("num_ranks", WORLD_SIZES)
def test_metrics_of_each_adjustment_equal_brute_force(num_ranks: int) -> None:
    results = [score_by_tail(Ranks())] if num_ranks == 1 else on_ranks(num_ranks, score_by_tail)
    wanted = {f"{t} {n}": v for t in TAILS for n, v in expected(ranked(t)).items()}
    for result in results:
        found = {name: float(value) for name, value in result.items()}
        assert found.keys() == wanted.keys()
        assert found == pytest.approx(wanted, abs=1e-9)
    assert len({wanted[f"{tail} PSP@5"] for tail in TAILS}) == len(TAILS)


def test_the_chosen_tail_has_the_largest_sum_of_those_that_cost_no_figure() -> None:
    names = ("P@1", "PSP@5", "recall@100", "P@5", "PSP@1")
    values = {0.0: (40, 30, 80), 0.3: (42, 33, 81), 0.1: (41, 34, 81), 0.6: (43, 39, 73)}
    rows = {t: dict(zip(names, (*row, 20, 30), strict=True)) for t, row in values.items()}
    table = [{"tail": t, **row} for t, row in rows.items()]
    assert best_tail(table, 0.0) == 0.1
    assert best_tail([*table, {"tail": 0.7, **rows[0.6] | {"PSP@5": 60}}], 0.1) == 0.1
    assert best_tail([*table, {"tail": 0.7, **rows[0.3] | {"recall@100": 80.6}}], 0.6) == 0.6
    within = {"tail": 0.7, **rows[0.1] | {"recall@100": 80.5, "PSP@5": 40}}
    assert best_tail([*table, within], 0.1) == 0.7
    for name in names:
        assert best_tail([*table, within | {name: rows[0.1][name] - 0.6}], 0.1) == 0.1


@pytest.mark.parametrize("device", DEVICES)
def test_metrics_equal_brute_force_on_every_device(device: str) -> None:
    found = score(Ranks(), torch.device(device))
    metrics = {name: float(v) for name, v in found.items() if "labels" not in name}
    assert metrics == pytest.approx(expected(dense()), abs=1e-9)


@pytest.mark.parametrize("num_ranks", WORLD_SIZES)
def test_every_rank_predicts_its_own_rows(
    runs: dict[int, list[dict[str, torch.Tensor]]], num_ranks: int
) -> None:
    found = [
        row
        for batch in range(len(SIZES))
        for result in runs[num_ranks]
        for row in result[f"labels {batch}"].tolist()
    ]
    assert found == dense()


def explain(ranks: Ranks) -> dict[str, torch.Tensor]:
    scorer = replace(scorer_of(WithBag(), ranks), explain=True)
    found = {}
    for i, (_, scores, labels, of_scores) in enumerate(scorer.predict(batches_of(ranks), 30)):
        parts = torch.stack([scores, *of_scores], -1)
        found |= {f"labels {i}": labels, f"parts {i}": parts}
    return found


@pytest.mark.parametrize("num_ranks", WORLD_SIZES)
def test_parts_of_scores_equal_dense_products(num_ranks: int) -> None:
    """Also on ranks without rows, and 0 in places without a label."""
    runs = [explain(Ranks())] if num_ranks == 1 else on_ranks(num_ranks, explain)
    listed = [point for batch in points() for point in batch]
    names = [(i, run) for i in range(len(SIZES)) for run in runs]
    labels = torch.cat([run[f"labels {i}"] for i, run in names])
    parts = torch.cat([run[f"parts {i}"] for i, run in names]).double()
    encoder, w = Sum().eval(), weight().double()
    assert len(labels) == len(listed) and (labels < 0).any()
    for (tokens, _, _), row, found in zip(listed, labels, parts, strict=True):
        ids, kept = torch.tensor([tokens]), row >= 0
        e, of_row = encoder(ids, torch.ones_like(ids))[0].double(), w[row[kept]]
        cut = DIM - BAG
        transformer, bag = of_row[:, :cut] @ e[:cut], of_row[:, cut:] @ e[cut:]
        rest = of_row @ WithBag.constant.double()
        expected = torch.stack([transformer + bag + rest, transformer, bag], -1)
        torch.testing.assert_close(found[kept], expected, atol=1e-5, rtol=1e-5)
        assert (found[~kept][:, 1:] == 0).all()
