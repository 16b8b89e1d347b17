"""Phases of a step: where time goes, on one rank and on several."""

from __future__ import annotations

import time

import pytest
import torch

from renee_ray.model.encoder import adamw, data_parallel
from renee_ray.rank.collectives import Ranks
from renee_ray.rank.recorder import GPU_MEMORY, KINDS, Recorder, gpu_memory
from renee_ray.report import status
from renee_ray.training.step import Step
from renee_ray.xfc.labels import LabelRange
from renee_ray.xfc.shard import Shard
from renee_ray.xfc.weights.storages import Weights
from tests.training.gloo import on_ranks
from tests.training.test_step import DIM, ENCODER, LABELS, RULE, Bag, batch_of, run_config

SLEEP = 1.5


def test_phases_leave_no_gap() -> None:
    start = time.perf_counter()
    recorder = Recorder()
    made = time.perf_counter()
    for phase, seconds in ("data", 0.02), ("gather", 0.03), ("data", 0.02), ("optimizer", 0.01):
        recorder.enter(phase)
        time.sleep(seconds)
    entered = time.perf_counter()
    recorder.enter("end")
    totals = recorder.totals()
    assert entered - made <= sum(totals.seconds.values()) <= time.perf_counter() - start
    assert totals.seconds["data"] >= 0.04 and totals.of_kind("collective") >= 0.03
    assert totals.of_kind("own") == totals.seconds["optimizer"] >= 0.01


def test_a_cpu_has_no_memory_of_a_gpu() -> None:
    assert gpu_memory(torch.device("cpu")) == dict.fromkeys(GPU_MEMORY)
    assert GPU_MEMORY == status.GPU_MEMORY


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_peak_of_a_gpus_memory_is_that_of_freed_tensors_too() -> None:
    device = torch.device("cuda")
    before = gpu_memory(device)["gpu_peak_gib"] or 0.0
    torch.ones(1 << 28, device=device).sum()  # 1 GiB
    peak, reserved, total = gpu_memory(device).values()
    assert peak is not None and reserved is not None and total is not None
    assert max(1.0, before) <= peak <= reserved <= total


def test_the_place_is_where_it_is() -> None:
    recorder = Recorder()
    recorder.enter("data", 7)
    recorder.enter("route")
    time.sleep(0.01)
    place = recorder.place()
    assert (place.step, place.phase, place.entered) == (7, "route", 2)
    assert place.seconds >= 0.01


def test_each_enters_both_phases() -> None:
    recorder = Recorder()
    seen = [
        (item, recorder.place().phase)
        for item in recorder.each("ab", "evaluation_data", "evaluation")
    ]
    assert seen == [("a", "evaluation"), ("b", "evaluation")]
    assert recorder.place().entered == 6


def test_an_unknown_phase_or_count_is_an_error() -> None:
    with pytest.raises(AssertionError):
        Recorder().enter("coffee")
    with pytest.raises(KeyError):
        Recorder().count(cups=1)


def test_counts_add_up() -> None:
    recorder = Recorder()
    recorder.count(steps=1, rows=3)
    recorder.count(steps=1, rows=4)
    recorder.count(checkpoints=1, checkpoint_seconds=1.5, checkpoint_bytes=100)
    totals = recorder.totals()
    assert (totals.steps, totals.rows, totals.skipped) == (2, 7, 0)
    assert (totals.checkpoints, totals.checkpoint_seconds, totals.checkpoint_bytes) == (1, 1.5, 100)


def slow_steps(ranks: Ranks, where: str) -> dict[str, object]:
    """Two steps in which the last rank sleeps in its forward or its backward, and a skipped one."""
    owned = LabelRange.of_rank(LABELS, ranks.num_ranks, ranks.rank)
    encoder, recorder = Bag(), Recorder()
    shard = Shard(owned, Weights("fp32", len(owned), DIM, True, torch.device("cpu")), chunk=3)
    shard.initialise_normal(0.1, 0)
    step = Step(
        run_config(ENCODER),
        data_parallel(
            encoder, ranks, "sum", None, lambda: recorder.enter("reduce")
        ),
        shard, adamw(encoder, ENCODER), ranks, torch.device("cpu"), recorder=recorder,
    )  # fmt: skip
    last = ranks.rank == ranks.num_ranks - 1
    if last:
        if where == "forward":
            encoder.register_forward_pre_hook(lambda *_: time.sleep(SLEEP))
        else:
            encoder.norm.weight.register_hook(lambda _: time.sleep(SLEEP))
    for number in range(2):
        recorder.enter("data", number + 1)
        step(batch_of(ranks, number), number, RULE)
        recorder.count(steps=1)
    recorder.enter("loss")
    recorder.sample(ranks)
    seconds, entered = recorder.totals().seconds, recorder.place().entered
    if last:
        encoder.register_forward_hook(lambda *call: call[-1] * torch.nan)
    skipped = step(batch_of(ranks, 2), 2, RULE).skipped
    return {
        "entered": [entered, recorder.place().entered],
        "own": [pace.own for pace in recorder.paces],
        "step": [pace.step for pace in recorder.paces],
        "seconds": seconds,
        "skipped": skipped,
    }


@pytest.mark.parametrize(("where", "waits"), [("forward", "route"), ("backward", "reduce")])
def test_who_sleeps_is_slow_and_who_waits_is_not(where: str, waits: str) -> None:
    fast, slow = on_ranks(2, slow_steps, where)
    assert fast["own"] == slow["own"], "every rank knows the pace of all"
    own = fast["own"]
    assert own[1] > SLEEP > 2 * own[0]
    assert fast["seconds"][waits] > 1.5 * SLEEP > 3 * slow["seconds"][waits]
    assert slow["seconds"][f"encoder_{where}"] > 2 * SLEEP > 3 * fast["seconds"][f"encoder_{where}"]
    assert fast["step"][0] == pytest.approx(slow["step"][1], rel=0.2)
    assert fast["skipped"] and slow["skipped"]
    assert fast["entered"] == slow["entered"], "the order of phases tells who is behind"
    phases = {phase for phase, kind in KINDS.items() if kind in ("data", "own", "collective")}
    assert phases - {"loss"} == {p for p in phases if fast["seconds"][p] > 0}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_time_is_the_devices() -> None:
    recorder = Recorder(torch.device("cuda"))
    a = torch.randn(4096, 4096, device="cuda")
    recorder.enter("classifier")
    start = time.perf_counter()
    for _ in range(50):
        a @ a
    recorder.enter("optimizer")
    launched = time.perf_counter() - start
    torch.cuda.synchronize()
    elapsed = time.perf_counter() - start
    recorder.enter("end")
    torch.cuda.synchronize()
    recorder.enter("end")
    seconds = recorder.totals().seconds["classifier"]
    assert launched < seconds == pytest.approx(elapsed, rel=0.2)
