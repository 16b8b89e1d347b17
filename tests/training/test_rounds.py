"""Unequal work of ranks: the collective after it waits for a round, not for all of it."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from renee_ray.rank.collectives import Ranks, row_counts
from renee_ray.rank.recorder import Recorder
from renee_ray.rank.rounds import Rounds

from .gloo import on_ranks

TIMEOUT, ROUND, ROUNDS = 4.0, 0.5, 10


def unequal(ranks: Ranks) -> torch.Tensor:
    """[rows of all ranks, phases entered] once rank 1 has taken longer than a collective may."""
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=TIMEOUT))
    ranks = Ranks(ranks.rank, ranks.num_ranks, group, group)
    recorder, said = Recorder(), list[str]()
    rounds = Rounds(ranks, "texts", 3 + ROUNDS, recorder, said.append)
    rounds._said = float("-inf")
    for _ in range(ROUNDS if ranks.rank == 1 else ranks.rank):
        if ranks.rank == 1:
            time.sleep(ROUND)
        rounds.add(1)
        assert "texts embedded: " in recorder.doing and "a second" in recorder.doing
    rounds.finish()
    assert not recorder.doing
    assert len(said) == (ranks.rank == 0), "one rank says it, now and then"
    row_counts(ranks, 0)
    return torch.tensor([rounds.done, recorder.place().entered])


@pytest.mark.slow
def test_no_rank_waits_for_more_than_a_round() -> None:
    assert ROUND * ROUNDS > TIMEOUT
    found = on_ranks(3, unequal)
    assert [each.tolist() for each in found] == [[2 + ROUNDS, ROUNDS + 1]] * 3


def test_progress_of_a_known_and_an_unknown_number() -> None:
    rounds = Rounds(Ranks(), "texts", 400)
    rounds.add(100)
    assert rounds._progress(50.0) == "texts embedded: 100 of 400, 2 a second, 0:02:30 left"
    rounds.total = 0
    assert rounds._progress(50.0) == "texts embedded: 100, 2 a second"
