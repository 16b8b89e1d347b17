"""Votes of the nearest training points, against brute force, at world sizes 1, 2 and 3."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from renee_ray.rank.batch import Batch, Position, Ragged
from renee_ray.rank.collectives import Ranks
from renee_ray.scoring.neighbours import POWER, Neighbours
from renee_ray.scoring.scorer import Scorer
from renee_ray.xfc.labels import LabelRange, split_range
from renee_ray.xfc.shard import Shard
from renee_ray.xfc.weights.storages import Weights
from tests.training.gloo import on_ranks

CPU = torch.device("cpu")
WORLD_SIZES = (1, 2, 3)
LABELS, DIM, VOCABULARY, TRAINING, SCORED, K = 31, 6, 20, 40, 9, 12
WEIGHT = 2.5
Point = tuple[list[int], list[int], list[int]]


class Sum(nn.Module):
    dim = DIM

    def __init__(self) -> None:
        super().__init__()
        made = torch.Generator().manual_seed(0)
        self.tokens = nn.Embedding(VOCABULARY, DIM)
        with torch.no_grad():
            self.tokens.weight.copy_(torch.randn(VOCABULARY, DIM, generator=made))
        self.register_buffer("constant", 3 * torch.ones(DIM))

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return (self.tokens(ids) * mask.unsqueeze(-1)).sum(1) + self.constant


def points(seed: int, count: int) -> list[Point]:
    """(tokens, labels, filter labels) of different texts."""
    rng = np.random.default_rng(seed)
    made: dict[tuple[int, ...], Point] = {}
    while len(made) < count:
        ids = rng.permutation(LABELS).tolist()
        tokens = sorted(rng.choice(VOCABULARY, rng.integers(1, 5), replace=False).tolist())
        made[tuple(tokens)] = (tokens, ids[: rng.integers(0, 5)], ids[8 : 8 + len(made) % 3])
    return list(made.values())


def training() -> list[Point]:
    """Every fifth text is another's too, which has other labels and lies on another rank."""
    once = points(2, TRAINING - TRAINING // 5)
    labels = reversed([labels for _, labels, _ in once])
    return [*once, *((tokens, next(labels), []) for tokens, _, _ in once[: TRAINING // 5])]


def tied() -> list[Point]:
    """A text that 25 points have, each with another label, and others."""
    return [*(([3, 7], [label], []) for label in range(25)), *training()[: TRAINING - 25]]


def voters_of(count: int) -> list[Point]:
    return tied() if count in TIED else training()


def weight() -> torch.Tensor:
    return torch.randn(LABELS, DIM, generator=torch.Generator().manual_seed(1))


def batch_of(listed: list[Point]) -> Batch:
    columns = [Ragged.of_lists([point[i] for point in listed]) for i in range(3)]
    return Batch(Position(), np.arange(len(listed)), *columns, pad_id=0)


def own(ranks: Ranks, listed: list[Point], shift: int = 0) -> list[Point]:
    """A rank's share; the first one's is `shift` shorter, and the second one's longer."""
    bounds = [split_range(len(listed), ranks.num_ranks, r)[0] for r in range(ranks.num_ranks)]
    bounds = [bound - shift * (r == 1) for r, bound in enumerate(bounds)] + [len(listed)]
    return listed[bounds[ranks.rank] : bounds[ranks.rank + 1]]


def predict(ranks: Ranks, count: int) -> dict[str, torch.Tensor]:
    owned = LabelRange.of_rank(LABELS, ranks.num_ranks, ranks.rank)
    shard = Shard(owned, Weights("fp32", len(owned), DIM, False, CPU), chunk=7)
    shard.write(owned.start, weight()[owned.start : owned.stop])
    encoder = Sum()
    mine = own(ranks, voters_of(count), shift=3)
    cut = 4 if ranks.rank == 0 else len(mine)  # the ranks embed unequally many batches
    voters = [batch_of(part) for part in (mine[:cut], mine[cut:]) if part]
    found = Neighbours.embed(encoder, voters, ranks, CPU, count, WEIGHT)  # type: ignore[arg-type]
    scorer = Scorer(encoder, shard, ranks, CPU, None, found)  # type: ignore[arg-type]
    # A global batch in which a rank of three has no row, and one that all share.
    scored = points(3, SCORED)
    batches = [
        batch_of(scored[:1] if ranks.rank == 0 else []),
        batch_of(own(ranks, scored[1:])),
    ]
    scores, labels = zip(*((s, b) for _, s, b, _ in scorer.predict(batches, K)), strict=True)
    return {"scores": torch.cat(scores), "labels": torch.cat(labels)}


def dense(count: int, weight_of_votes: float = WEIGHT) -> list[list[tuple[float, int]]]:
    """(score, label) of each scored point in float64, best first, filter labels gone."""
    vectors = Sum().tokens.weight.detach().double()

    def embed(tokens: list[int]) -> torch.Tensor:
        return vectors[tokens].sum(0)

    rows = []
    for tokens, _, gone in points(3, SCORED):
        e = embed(tokens)
        logits = weight().double() @ (e + 3)
        voters = voters_of(count)
        cosines = [float(torch.cosine_similarity(e, embed(t), dim=0)) for t, _, _ in voters]
        cut = sorted(cosines, reverse=True)[min(count, TRAINING) - 1] - 1e-6
        near = [
            (max(c, 0.0) ** POWER, labels)
            for c, (_, labels, _) in zip(cosines, voters, strict=True)
            if c >= cut
        ]
        total = sum(c for c, _ in near)
        votes = torch.zeros(LABELS, dtype=torch.float64)
        for c, labels in near:
            votes[labels] += c / total
        score = logits + weight_of_votes * votes
        rows.append(sorted((-float(score[i]), i) for i in range(LABELS) if i not in gone)[:K])
    return [[(-s, i) for s, i in row] for row in rows]


TIED = (10, 4)
"""Of `tied`: one rank of one finds 20 of its 25 points at once, each of three 8 of its 12 or so."""
COUNTS = (1, 5, TRAINING + 7, *TIED)
Runs = dict[int, list[dict[int, dict[str, torch.Tensor]]]]


def predict_all(ranks: Ranks) -> dict[int, dict[str, torch.Tensor]]:
    return {count: predict(ranks, count) for count in COUNTS}


@pytest.fixture(scope="module")
def runs() -> Runs:
    """By number of ranks: all counts in one group of processes, whose start takes the time."""
    return {n: [predict_all(Ranks())] if n == 1 else on_ranks(n, predict_all) for n in WORLD_SIZES}


@pytest.mark.parametrize("num_ranks", WORLD_SIZES)
@pytest.mark.parametrize("count", COUNTS)
def test_votes_equal_brute_force(runs: Runs, num_ranks: int, count: int) -> None:
    results = [each[count] for each in runs[num_ranks]]
    # The second global batch is dealt to the ranks, the first lies on rank 0.
    scores = torch.cat([r["scores"] for r in results])
    labels = torch.cat([r["labels"] for r in results])
    wanted = dense(count)
    assert len(scores) == SCORED
    for got, ids, row in zip(scores.tolist(), labels.tolist(), wanted, strict=True):
        assert ids[: len(row)] == [i for _, i in row]
        assert got[: len(row)] == pytest.approx([s for s, _ in row], rel=1e-4, abs=1e-4)


def test_points_that_tie_are_among_the_nearest() -> None:
    """Else lists would never be too short for them."""
    vectors = Sum().tokens.weight.detach().double()
    common = vectors[[3, 7]].sum(0)
    others = torch.stack([vectors[tokens].sum(0) for tokens, _, _ in tied()[25:]])
    scored = torch.stack([vectors[tokens].sum(0) for tokens, _, _ in points(3, SCORED)])
    nearer = torch.cosine_similarity(scored[:, None], others[None], dim=2)
    nearer = (nearer > torch.cosine_similarity(scored, common[None])[:, None]).sum(1)
    for count in TIED:
        assert 0 < (nearer < count).sum() < SCORED


def test_the_votes_of_this_problem_change_the_order() -> None:
    """Else the comparison above would hold for votes that change nothing."""
    labels = [[[label for _, label in row] for row in dense(5, w)] for w in (WEIGHT, 0.0)]
    assert sum(a != b for a, b in zip(*labels, strict=True)) > SCORED // 2
