"""Labels in passes give the answers of one pass, also after an interruption at any point."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from renee_ray.errors import ReneeError
from renee_ray.rank.batch import Batch, Position, Ragged
from renee_ray.rank.collectives import Ranks
from renee_ray.scoring.neighbours import Neighbours
from renee_ray.scoring.passes import Blocks, in_passes
from renee_ray.scoring.scorer import Scorer
from renee_ray.xfc.labels import NONE, LabelRange, split_range
from renee_ray.xfc.shard import Shard
from renee_ray.xfc.weights.storages import Weights
from tests.training.gloo import on_ranks
from tests.training.test_scoring import (
    CPU,
    DIM,
    LABELS,
    VOCABULARY,
    WithBag,
    batches_of,
    points,
    weight,
)

K, BLOCK = 15, 2
OFFSET = torch.arange(LABELS) * -0.01


class Stopped(Exception):
    pass


Answers = dict[int, list[torch.Tensor]]


def answers(
    ranks: Ranks, passes: int, directory: str, voting: bool, stop_after: int | None = None
) -> tuple[Answers, int]:
    """(labels, scores and parts of own rows of each batch that was answered, batches scored).

    stop_after: batches after which the command is cut off.
    """
    encoder, scored = WithBag().eval(), 0
    found: Answers = {}
    voters = None
    if voting:
        rng = np.random.default_rng(5)
        mine = range(*split_range(11, ranks.num_ranks, ranks.rank))
        rows = [rng.integers(0, VOCABULARY, 3).tolist() for _ in range(11)]
        columns = [[rows[i] for i in mine], [[i, i + 9] for i in mine], [[] for _ in mine]]
        batch = Batch(Position(), np.array(mine), *map(Ragged.of_lists, columns), pad_id=0)
        voters = Neighbours.embed(encoder, [batch], ranks, CPU, 4, 2.5)  # type: ignore[arg-type]

    def piece(number: int, of: int) -> Scorer:
        owned = LabelRange.of_rank(LABELS, ranks.num_ranks, ranks.rank)
        start, stop = (owned.start + each for each in split_range(len(owned), of, number))
        weights = Weights("fp32", stop - start, DIM, False, CPU)
        shard = Shard(LabelRange(start, stop, LABELS), weights)
        shard.write(start, weight()[start:stop])
        own: Any = encoder
        return Scorer(own, shard, ranks, CPU, OFFSET[start:stop], voters, of, explain=True)

    def batches(first: int) -> Iterator[Batch]:
        nonlocal scored
        for batch in batches_of(ranks)[first:]:
            if scored == stop_after:
                raise Stopped
            scored += 1
            yield batch

    blocks = Blocks(-(-len(points()) // BLOCK), BLOCK, ranks, directory)
    begun = blocks.resumed(passes)
    try:
        for block in in_passes(piece, begun, batches, K, blocks):
            for answer in block:
                parts = torch.stack(answer.parts, -1)
                found[answer.batch.position.batch] = [answer.labels, answer.scores, parts]
    except Stopped:
        pass
    return found, scored


def whole(ranks: Ranks, passes: int, directory: str, voting: bool) -> Answers:
    return answers(ranks, passes, directory, voting)[0]


def interrupted(ranks: Ranks, directory: str, stops: list[int], behind: bool) -> Answers:
    """Answers of several attempts at 4 passes, each cut off after so many batches.

    behind: rank 0 is killed before it notes its last block.
    """
    found, total, end = {}, 0, 4 * len(points())
    for stop in [*stops, end]:
        more, scored = answers(ranks, 4, directory, True, stop)
        found |= more
        total += scored
        progress = Path(directory, "00000.json")
        if behind and ranks.rank == 0 and stop < end and progress.exists():
            noted = json.loads(progress.read_text())
            progress.write_text(json.dumps(noted | {"done": max(0, noted["done"] - 1)}))
    assert total <= end + 2 * BLOCK * len(stops), "what is done is not done again"
    return found


def run(num_ranks: int, function: Callable[..., Answers], *args: object) -> list[torch.Tensor]:
    """Labels, scores and parts of each batch, the rows of all ranks in their order."""
    found = [function(Ranks(), *args)] if num_ranks == 1 else on_ranks(num_ranks, function, *args)
    assert all(sorted(each) == list(range(len(points()))) for each in found)
    return [
        torch.cat([each[batch][kind] for each in found])
        for batch in range(len(points()))
        for kind in range(3)
    ]


@pytest.mark.parametrize(
    ("num_ranks", "passes", "voting"), [(1, 4, False), (1, 4, True), (2, 4, True), (3, 9, False)]
)
def test_passes_give_the_answers_of_one(
    tmp_path: Path, num_ranks: int, passes: int, voting: bool
) -> None:
    """Labels, scores and their parts; with 9 passes of 3 ranks some pieces are empty."""
    one = run(1, whole, 1, "", voting)
    found = run(num_ranks, whole, passes, str(tmp_path), voting)
    for expected, got in zip(one, found, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert any((labels == NONE).any() for labels in one[::3])


@pytest.mark.parametrize(
    ("num_ranks", "stops", "behind"),
    [(1, [1], False), (1, [3, 4], True), (1, [5, 0, 2, 6], False), (2, [7, 3], True)],
)
def test_a_command_goes_on_where_it_was_cut_off(
    tmp_path: Path, num_ranks: int, stops: list[int], behind: bool
) -> None:
    for name in "whole", "cut":
        (tmp_path / name).mkdir()
    expected = run(num_ranks, whole, 4, str(tmp_path / "whole"), True)
    found = run(num_ranks, interrupted, str(tmp_path / "cut"), stops, behind)
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a, b), "bit for bit"


def test_another_number_of_passes_begins_anew(tmp_path: Path) -> None:
    blocks = Blocks(3, 1, Ranks(), str(tmp_path))
    assert blocks.resumed(2) == (2, 0)
    blocks.mark(4, 5)
    assert blocks.resumed(3) == blocks.resumed(4) == (4, 5)
    assert blocks.resumed(5) == (5, 0)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    answers(Ranks(), 4, str(tmp_path), False, 5)
    damaged = next(tmp_path.glob("*embeddings"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(ReneeError, match=rf"{damaged.name}.*damaged; remove"):
        answers(Ranks(), 4, str(tmp_path), False)
