"""Threads that each take a part of a shard's labels: what they find together is what one finds."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from renee_ray.xfc import lanes
from renee_ray.xfc.labels import LabelRange
from renee_ray.xfc.lanes import lane_count, run
from renee_ray.xfc.shard import Pairs, Shard
from renee_ray.xfc.topk.select import shard_topk
from renee_ray.xfc.weights.storages import SGD, STORAGES, Weights
from tests.pairwise import pairwise

CPU = torch.device("cpu")
N, DIM, BATCH, FIRST = 331, 24, 19, 1000
RULE = SGD(0.1, 0.9, 0.02, seed=3)
POSITIVES = [(0, 0), (0, N - 1), (3, 165), (4, 166), (18, 110), (7, 221), (7, 220)]


THREADS = [1, 2, 3, 7]


@pytest.fixture(params=THREADS)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """The number of threads that torch computes with."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def few_labels_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "LEAST_LABELS", 16)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_shard(precision: str, momentum: bool = True) -> Shard:
    owned = LabelRange(FIRST, FIRST + N, 2 * FIRST)
    compute = STORAGES[precision].compute
    shard = Shard(owned, Weights(precision, N, DIM, momentum, CPU, compute), chunk=40)
    shard.write(FIRST, normal(N, DIM, seed=1))
    return shard


def pairs() -> Pairs:
    rows, labels = torch.tensor(POSITIVES).T
    return Pairs(rows.contiguous(), labels + FIRST, LabelRange(FIRST, FIRST + N, 2 * FIRST))


def dense(momentum: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, dE, weights) of a step in float64, by autograd and torch.optim.SGD."""
    own = normal(N, DIM, seed=1).double().requires_grad_()
    inputs = normal(BATCH, DIM, seed=2).double().requires_grad_()
    target = torch.zeros(BATCH, N, dtype=torch.float64)
    target[tuple(torch.tensor(POSITIVES).T)] = 1
    loss = binary_cross_entropy_with_logits(inputs @ own.T, target, reduction="sum")
    loss.backward()
    kept = RULE.momentum if momentum else 0.0
    torch.optim.SGD([own], RULE.lr, momentum=kept, weight_decay=RULE.weight_decay).step()
    assert inputs.grad is not None
    return loss.detach(), inputs.grad, own.detach()


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    ("precision", "momentum", "threads"),
    pairwise(STORAGES, [False, True], THREADS),
    indirect=["threads"],
)
def test_a_step_equals_float64_autograd(precision: str, momentum: bool, threads: int) -> None:
    shard = make_shard(precision, momentum)
    assert len(shard.lanes(BATCH)) == threads
    loss, gradient, weight = dense(momentum)
    seen: list[torch.Tensor] = []
    sgd = SGD(RULE.lr, RULE.momentum if momentum else 0.0, RULE.weight_decay, RULE.seed)
    found = shard.step(
        normal(BATCH, DIM, seed=2), pairs(), sgd, with_loss=True, on_gradient=seen.append
    )
    tolerance = {"fp32": 1e-5, "fp8_sr": 0.1}.get(precision, 0.02)
    assert error(found, loss) < tolerance
    assert error(seen[0], gradient) < tolerance
    assert error(shard.weights.read(0, N), weight) < tolerance


def test_the_gradient_is_complete_before_the_last_chunk_of_each_lane(threads: int) -> None:
    shard = make_shard("bf16_split")
    before = shard.weights.read(0, N).clone()
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []

    def look(gradient: torch.Tensor) -> None:
        assert threading.current_thread() is threading.main_thread()
        changed = (shard.weights.read(0, N) != before).any(dim=1)
        calls.append((gradient.clone(), changed))

    shard.step(normal(BATCH, DIM, seed=2), pairs(), RULE, on_gradient=look)
    ((gradient, changed),) = calls
    assert error(gradient, dense(momentum=True)[1]) < 0.02
    for chunks in shard.lanes(BATCH):
        *_, (last, stop) = chunks
        assert changed[chunks[0][0] : last].all()
        assert not changed[last:stop].any()
    assert (shard.weights.read(0, N) != before).any(dim=1).all()


def test_every_label_is_in_one_chunk_of_one_lane(threads: int) -> None:
    shard = make_shard("fp32")
    found = shard.lanes(BATCH)
    assert len(found) == threads
    assert max(stop - start for lane in found for start, stop in lane) == 40
    assert [i for start, stop in shard.chunks(BATCH) for i in range(start, stop)] == list(range(N))
    sizes = [lane[-1][1] - lane[0][0] for lane in found]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("kind", "precision", "threads"),
    pairwise(["normal", "ties"], ["fp32", "bf16_sr"], THREADS),
    indirect=["threads"],
)
def test_topk_equals_a_stable_sort(precision: str, kind: str, threads: int) -> None:
    shard, inputs, k = make_shard(precision), normal(BATCH, DIM, seed=2), 30
    if kind == "ties":  # labels of other lanes with the very same scores, which are whole numbers
        shard.write(FIRST, normal(11, DIM, seed=1).round().repeat(-(-N // 11), 1)[:N])
        inputs = inputs.round()
    offset = normal(N, seed=5).div(10) * (kind == "normal")
    scores = inputs @ shard.weights.read(0, N).T + offset
    rows, labels = torch.tensor(POSITIVES).T
    scores[rows, labels] = -torch.inf
    wanted, order = scores.sort(dim=1, descending=True, stable=True)
    with torch.inference_mode():
        found = shard_topk(shard, inputs, k, pairs(), offset)
    assert torch.allclose(found[0], wanted[:, :k], atol=1e-5)
    assert torch.equal(found[1], order[:, :k] + FIRST)


def test_a_lane_computes_alone_and_beside_the_others(threads: int) -> None:
    together = threading.Barrier(threads)

    def task() -> tuple[str, int, bool]:
        together.wait(timeout=60)
        name, inference = threading.current_thread().name, torch.is_inference_mode_enabled()
        return name, torch.get_num_threads(), inference

    for mode in (False, True):
        with torch.inference_mode(mode):
            seen = run([task] * threads)
        assert len({name for name, *_ in seen}) == threads
        assert {counted for _, counted, _ in seen} == {1}
        assert {inside for *_, inside in seen} == {mode}
    assert torch.get_num_threads() == threads


def test_a_task_is_always_run_by_the_same_thread() -> None:
    """A lane's buffers are its thread's, also where one thread could do the work of all."""
    tasks = [threading.current_thread] * 3
    assert all(run(tasks) == run(tasks) for _ in range(50))


def test_an_error_waits_for_the_other_lanes() -> None:
    ended = []

    def fails() -> None:
        raise ValueError("of a lane")

    def ends() -> None:
        time.sleep(0.2)
        ended.append(True)

    with pytest.raises(ValueError, match="of a lane"):
        run([fails, ends])
    assert ended == [True]


def test_lanes_are_few_for_few_labels_and_for_large_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert [lane_count(labels, 100, CPU) for labels in (64, 63)] == [4, 1]
    assert lane_count(10**6, 100, torch.device("meta")) == 1
    large = [lane_count(10**6, mib << 20, CPU) for mib in (128, 200, 600)]
    assert large == [4, 2, 1]


def test_a_process_that_was_forked_starts_lanes_of_its_own() -> None:
    code = (
        "import os\nfrom renee_ray.xfc.lanes import run\ntasks = [lambda: 1] * 2\nrun(tasks)\n"
        "pid = os.fork()\nif not pid:\n    os._exit(sum(run(tasks)))\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 2


def test_scoring_has_lanes_however_large_a_gradient_would_be(
    monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.setattr(lanes, "MOST_BYTES", 100)
    shard = make_shard("fp32")
    assert len(shard.lanes(BATCH)) == 1
    assert len(shard.lanes(BATCH, gradient=False)) == threads
