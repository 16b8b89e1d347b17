"""Who is slow and who did not come, decided on made-up beats."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from renee_ray.rank.recorder import Pace
from renee_ray.service.observe.watch import SILENT_S, Beat, Stragglers, Watch, beat_seconds

GATHER = Beat(1, 0, "alpha (10.0.0.1)", 100, 120, "gather", 900, 0.0)


def told(watch: Watch, beats: list[Beat], now: float) -> None:
    for beat in beats:
        watch.saw(beat, now)


def waiting(rank: int, seconds: float) -> Beat:
    return replace(GATHER, rank=rank, seconds=seconds, pid=100 + rank)


def test_a_worker_that_hangs_elsewhere_is_named_with_its_phase() -> None:
    watch = Watch(60)
    late = Beat(1, 2, "beta (10.0.0.2)", 102, 120, "data", 897, 31.0)
    told(watch, [waiting(0, 31), waiting(1, 31), late], now=50)
    said = watch.complaint(50)
    assert said is not None
    assert "rank 2 on beta (10.0.0.2) (process 102) has been in phase `data` of step 120" in said
    assert "for 31 s" in said and "2 others wait for it in phase `gather`" in said
    assert "rank 0" not in said and "rank 1" not in said
    assert watch.complaint(51) is None, "said twice"


@pytest.mark.parametrize("phase", ["evaluation_data", "checkpoint"])
def test_a_worker_that_hangs_in_a_pause_is_named_and_not_those_that_died_of_it(phase: str) -> None:
    watch = Watch(12)
    for now in range(40):
        late = Beat(1, 2, "beta", 102, 120, phase, 897, now)
        told(watch, [waiting(0, now), waiting(1, now)] if now <= 12 else [], now)
        watch.saw(late, now)
        said = watch.complaint(now)
        assert (said is not None) == (now == 7), now
    assert re.search(rf"rank 2 on beta .* `{phase}` .*; 2 others wait for it", watch.blamed())
    assert "rank 0" not in watch.blamed()


def test_one_behind_that_waits_itself_is_not_accused() -> None:
    watch = Watch(60)
    late = Beat(1, 2, "beta", 102, 120, "data", 897, 31.0)
    ahead = replace(GATHER, phase="scatter", entered=901, seconds=31)
    told(watch, [ahead, waiting(1, 31), late], now=0)
    said = watch.complaint(0)
    assert said is not None and "rank 2" in said and "rank 1" not in said


def test_all_that_wait_are_counted_however_long_each_does() -> None:
    watch = Watch(60)
    late = replace(GATHER, rank=2, pid=102, entered=897, phase="data")
    told(watch, [waiting(0, 31), waiting(1, 29), late], now=0)
    assert "2 others wait for it in phase `gather`" in (watch.complaint(0) or "")


def test_several_that_do_not_come_are_all_named() -> None:
    watch = Watch(60)
    late = [replace(GATHER, rank=r, pid=100 + r, entered=890 + r, phase="data") for r in (1, 2)]
    told(watch, [waiting(0, 31), *late], now=0)
    said = watch.complaint(0)
    assert said is not None and "rank 1 on" in said and "rank 2 on" in said
    assert "another worker waits for them in phase `gather`" in said


def test_a_worker_that_is_not_heard_of_is_named() -> None:
    watch = Watch(10)
    stopped = Beat(1, 2, "beta", 102, 120, "classifier", 899, 0.1)
    told(watch, [waiting(0, 0), waiting(1, 0), stopped], now=0)
    for now in range(1, 20):
        told(watch, [waiting(0, now), waiting(1, now)], now)
        said = watch.complaint(now)
        assert (said is not None) == (now == 6), now
        if said:
            assert "rank 2 on beta (process 102) has sent nothing for 6 s" in said
            assert "phase `classifier` of step 120" in said


@pytest.mark.parametrize(
    "beats",
    [
        [waiting(0, 40), waiting(1, 40)],  # all are there: the network is slow
        [waiting(0, 2), replace(GATHER, rank=1, phase="classifier", entered=899, seconds=2)],
        # the one in front works itself
        [replace(GATHER, phase="classifier", entered=901, seconds=40), waiting(1, 40)],
    ],
)
def test_nobody_is_accused_without_reason(beats: list[Beat]) -> None:
    watch = Watch(60)
    told(watch, beats, 0)
    assert watch.complaint(0) is None


def died(timeout_s: float, wait: float, *, raises: bool = False) -> Watch:
    """Two workers have waited for rank 2 when they end: by SIGABRT, as NCCL's watchdog does, or
    by gloo's exception, which lets them send a last heartbeat."""
    watch, period = Watch(timeout_s), int(beat_seconds(timeout_s))
    for now in range(0, int(wait) + 1, period):
        late = Beat(1, 2, "beta", 102, 120, "data", 897, now)
        told(watch, [waiting(0, now), waiting(1, now), late], now)
        watch.complaint(now)
    if raises:
        told(watch, [replace(waiting(r, wait), ended=True) for r in (0, 1)], wait)
    for now in range(int(wait), int(wait) + 60):  # until Ray tells that they are gone
        if now % period == 0:
            watch.saw(replace(late, seconds=now), now)
        watch.complaint(now)
    return watch


@pytest.mark.parametrize("timeout_s", [12, 60, 600])
def test_who_did_not_come_is_blamed_whether_the_others_raise_or_die(timeout_s: float) -> None:
    for raises in (False, True):
        said = died(timeout_s, timeout_s, raises=raises).blamed()
        found = re.search(r"rank 2 on beta \(process 102\) .* `data` of step 120 for (\d+) s", said)
        assert found is not None and timeout_s - 5 <= int(found[1]) < timeout_s + 60, said
        assert "rank 0" not in said and "rank 1" not in said and "phase `gather`" in said


@pytest.mark.parametrize("phase", ["data", "scatter"])
def test_one_that_is_past_the_collective_does_not_hide_who_is_awaited(phase: str) -> None:
    """gloo let rank 1 go on, to wait for data, which no timeout ends, or for both others."""
    watch, stopped = Watch(15), Beat(1, 2, "beta", 102, 120, "reduce", 850, 0.1)
    watch.saw(stopped, 0)
    for now in range(0, 15, 2):
        ahead = replace(GATHER, rank=1, pid=101, entered=901, phase=phase, seconds=now)
        told(watch, [waiting(0, now + 0.5), ahead], now)
        watch.complaint(now)
    found = re.search(r"rank 2 on beta .* has sent nothing .* phase `gather`", watch.blamed())
    assert found is not None and "rank 1" not in found[0]


def test_one_that_hangs_and_keeps_data_from_the_others_is_blamed() -> None:
    watch, stopped = Watch(15), Beat(1, 2, "beta", 102, 120, "reduce", 850, 0.1)
    watch.saw(stopped, 0)
    for now in range(0, 17, 2):
        starved = replace(waiting(0, now), phase="data", entered=851)
        told(watch, [starved, replace(waiting(1, now), phase="route", entered=852)], now)
        said = watch.complaint(now)
        assert (said is not None) == (now == 8), now
    watch.saw(replace(starved, seconds=20, ended=True), 20)
    assert re.search(r"rank 2 on beta .* has sent nothing .*; 2 others wait", watch.blamed())
    slow = Watch(15)
    told(slow, [replace(waiting(r, 16), phase="data") for r in range(3)], 0)
    assert slow.complaint(0) is None, "storage is slow"


def test_nobody_is_blamed_for_another_end() -> None:
    assert Watch(1).blamed() == ""
    killed = died(600, 120)  # long before the timeout
    assert "rank 2" in killed._found.sentence and killed.blamed() == ""

    came = died(60, 60)
    told(came, [replace(waiting(r, 1), entered=901) for r in range(3)], 130)
    assert came.blamed() == ""

    itself = died(60, 60)
    itself.saw(Beat(1, 2, "beta", 102, 120, "data", 897, 100, ended=True), 130)
    assert itself.blamed() == "", "its own error tells more"

    again = died(60, 60)
    told(again, [replace(waiting(r, 60), group=2) for r in range(3)], 130)
    assert again.blamed() == ""


def test_a_group_that_has_ended_or_was_replaced_is_not_judged() -> None:
    watch = Watch(60)
    late = replace(GATHER, rank=1, entered=899, phase="data", seconds=40)
    told(watch, [waiting(0, 40), late], 0)
    watch.saw(replace(waiting(0, 41), ended=True), 1)
    assert watch.complaint(2) is None
    told(watch, [replace(waiting(0, 0), group=2), replace(late, group=1)], 3)
    assert watch.complaint(100) is None
    told(watch, [replace(waiting(0, 40), group=2), replace(late, group=2)], 104)
    assert watch.complaint(104) is not None


def test_silence_of_all_is_said_once() -> None:
    """Also after a group has ended, where its next one finds no place."""
    watch = Watch(60)
    watch.saw(replace(waiting(0, 0), ended=True), 0)
    assert watch.complaint(SILENT_S) is None
    assert "no worker has been heard for 120 s" in str(watch.complaint(SILENT_S + 1))
    assert watch.complaint(SILENT_S + 2) is None
    watch.saw(replace(waiting(0, 0), group=2), 300)
    assert "no worker" in str(watch.complaint(300 + SILENT_S + 1))


def test_workers_that_find_no_place_are_said() -> None:
    watch = Watch(60)
    assert watch.complaint(1000) is None
    assert "wait for room in the cluster" in str(watch.complaint(1000 + SILENT_S + 1))
    assert watch.complaint(1000 + SILENT_S + 2) is None


def test_several_beats_fit_into_a_time_out() -> None:
    assert [beat_seconds(timeout) for timeout in (5, 12, 120)] == [1, 2, 5]


def paces(*own: float) -> list[Pace]:
    return [Pace(max(own), each, 0.0) for each in own]


def test_a_slow_rank_is_named_once_a_window() -> None:
    stragglers = Stragglers(factor=1.5, window_s=10)
    said = [stragglers.add(paces(1, 1.1, 2), now) for now in range(25)]
    assert [now for now, found in enumerate(said) if found] == [10, 21]
    ((rank, times),) = said[10]
    assert rank == 2 and times == pytest.approx(2 / 1.1)
    assert stragglers.slow == [2]
    for now in range(25, 40):
        stragglers.add(paces(1, 1.1, 1.2), now)
    assert stragglers.slow == []


def test_one_slow_sample_is_not_a_slow_window() -> None:
    stragglers = Stragglers(factor=1.5, window_s=10)
    samples = [paces(1, 1, 3 if now == 5 else 1) for now in range(11)]
    assert not any(stragglers.add(sample, now) for now, sample in enumerate(samples))


def test_of_two_ranks_the_slow_one_is_named() -> None:
    stragglers = Stragglers(factor=1.5, window_s=0.5)
    stragglers.add(paces(1, 1.6), 0)
    assert stragglers.add(paces(1, 1.6), 1) == [(1, pytest.approx(1.6))]


def test_workers_are_training_once_one_has_left_the_start() -> None:
    watch = Watch(60)
    assert not watch.training
    place = {"step": 0, "entered": 0, "seconds": 0.0}
    for rank, phase, training in ((0, "start", False), (1, "data", True), (1, "start", False)):
        watch.saw(Beat(1, rank, "n", 1, phase=phase, **place), 0.0)
        assert watch.training is training
