"""Collectives on 1, 2 and 3 ranks: each with its adjoint, uneven and empty pieces."""

from __future__ import annotations

import contextlib
import inspect
import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from renee_ray.data.storage import PATIENCE
from renee_ray.model.encoder import data_parallel
from renee_ray.rank import collectives
from renee_ray.rank.collectives import (
    Ranks,
    announce,
    gather_rows,
    look_up,
    return_rows,
    route,
    row_counts,
    scatter_rows,
)
from renee_ray.xfc.labels import split_range
from tests.devices import DEVICES
from tests.training.gloo import on_ranks

WORLD_SIZES = (1, 2, 3)
DIM = 4
COUNTS = ([5, 2, 3], [0, 4, 1], [3, 0, 0], [2, 2, 2], [1, 7, 0])
LABELS = (11, 2, 2**40)  # the second: fewer labels than ranks


def rows_of(rank: int, case: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + 10 * case + rank)
    return torch.randn(COUNTS[case][rank], DIM, generator=generator)


def gradient_of(rank: int, case: int, num_ranks: int) -> torch.Tensor:
    total = sum(COUNTS[case][:num_ranks])
    return torch.randn(total, DIM, generator=torch.Generator().manual_seed(77 + 10 * case + rank))


def pairs_of(rank: int, num_labels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rank 1 has none."""
    generator = torch.Generator().manual_seed(rank)
    m = 0 if rank == 1 else 9
    rows = torch.randint(0, 50, (m,), generator=generator)
    return rows, torch.randint(0, num_labels, (m,), generator=generator)


def value_of(labels: torch.Tensor) -> torch.Tensor:
    return labels.double() * 3 + 1


def everything(ranks: Ranks, device: str) -> dict[str, Any]:
    """What every collective gives; embeddings and gradients are on `device`, all else is host's."""
    out: dict[str, Any] = {}
    for case, all_counts in enumerate(COUNTS):
        own = rows_of(ranks.rank, case).to(device)
        counts = row_counts(ranks, len(own))
        assert counts == all_counts[: ranks.num_ranks]
        if sum(counts) == 0:
            continue
        out[f"gather {case}"] = gather_rows(ranks, own, counts).cpu()
        ours = gradient_of(ranks.rank, case, ranks.num_ranks).to(device)
        pending = scatter_rows(ranks, ours.clone(), counts)
        out[f"scatter {case}"] = pending().cpu().clone()
        out[f"return {case}"] = [rows.cpu().clone() for rows in return_rows(ranks, ours, counts)]
        ids = torch.arange(len(ours), device=device)[:, None] + 2**40
        found = return_rows(ranks, ids, counts)
        out[f"return ids {case}"] = [rows.cpu().clone() for rows in found]
    for num_labels in LABELS:
        rows, labels = pairs_of(ranks.rank, num_labels)
        out[f"route {num_labels}"] = torch.stack(route(ranks, rows, labels, num_labels), 1)
        if num_labels < 100:
            start, stop = split_range(num_labels, ranks.num_ranks, ranks.rank)
            values = value_of(torch.arange(start, stop))
            out[f"look up {num_labels}"] = look_up(ranks, labels, values, start, num_labels)
    out["announce"] = announce(ranks, ranks.rank, 1 << ranks.rank)
    for where in dict.fromkeys(["cpu", device]):  # in one order on all ranks
        values = torch.tensor([1.0 + ranks.rank, 2.0]).double().to(where)
        out[f"sum on {where}"] = collectives.all_sum(ranks, values).cpu()
    out["gradient"] = gradients(ranks, device)
    return out


def gradients(ranks: Ranks, device: str) -> dict[str, torch.Tensor]:
    """The gradient of an encoder in DDP with our hook, which calls before the sum over ranks."""
    encoder: Any = linear().to(device)
    before: list[bool] = []
    wrapped = data_parallel(encoder, ranks, "sum", on_last=lambda: before.append(True))
    (wrapped(rows_of(ranks.rank, 3).to(device)) ** 2).sum().backward()
    assert before == [True] * (ranks.num_ranks > 1)
    return {name: p.grad.cpu() for name, p in encoder.named_parameters() if p.grad is not None}


def linear() -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(DIM, 3)


@pytest.fixture(scope="module", params=DEVICES)
def runs(request: pytest.FixtureRequest) -> dict[int, list[dict[str, Any]]]:
    """All ranks share one GPU, where there is one: NCCL would refuse, gloo copies to the host."""
    device = request.param
    return {
        n: [everything(Ranks(), device)] if n == 1 else on_ranks(n, everything, device)
        for n in WORLD_SIZES
    }


Runs = dict[int, list[dict[str, Any]]]
each_world = pytest.mark.parametrize("num_ranks", WORLD_SIZES)
each_case: Callable[..., Any] = pytest.mark.parametrize("case", range(len(COUNTS)))


def skip_empty(case: int, num_ranks: int) -> None:
    if not sum(COUNTS[case][:num_ranks]):
        pytest.skip("a global batch always has rows")


@each_world
@each_case
def test_gather_is_all_rows_in_rank_order(runs: Runs, num_ranks: int, case: int) -> None:
    skip_empty(case, num_ranks)
    wanted = torch.cat([rows_of(rank, case) for rank in range(num_ranks)])
    for result in runs[num_ranks]:
        assert torch.equal(result[f"gather {case}"], wanted)


@each_world
@each_case
def test_scatter_is_the_adjoint_of_gather(runs: Runs, num_ranks: int, case: int) -> None:
    """sum over ranks of <gather(x), y_r> == sum over ranks of <x_r, scatter(y)_r>."""
    skip_empty(case, num_ranks)
    left = right = shifted = 0.0
    for rank, result in enumerate(runs[num_ranks]):
        gathered, scattered = result[f"gather {case}"].double(), result[f"scatter {case}"].double()
        assert scattered.shape == (COUNTS[case][rank], DIM)
        left += float((gathered * gradient_of(rank, case, num_ranks)).sum())
        right += float((rows_of(rank, case).double() * scattered).sum())
        shifted += float((rows_of(rank, case).double() * scattered.roll(1, 1)).sum())
    assert right == pytest.approx(left, rel=1e-5, abs=1e-5)
    assert abs(shifted - left) > 1e-2, "misplaced numbers are noticed"


@each_world
@each_case
def test_scatter_sums_own_rows(runs: Runs, num_ranks: int, case: int) -> None:
    skip_empty(case, num_ranks)
    total = sum(gradient_of(rank, case, num_ranks).double() for rank in range(num_ranks))
    assert isinstance(total, torch.Tensor)
    pieces = total.split(COUNTS[case][:num_ranks])
    for piece, result in zip(pieces, runs[num_ranks], strict=True):
        torch.testing.assert_close(result[f"scatter {case}"].double(), piece, rtol=0, atol=1e-5)


@each_world
@each_case
def test_rows_return_to_their_rank_from_every_rank(runs: Runs, num_ranks: int, case: int) -> None:
    skip_empty(case, num_ranks)
    counts = COUNTS[case][:num_ranks]
    for rank, result in enumerate(runs[num_ranks]):
        mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        wanted = [gradient_of(source, case, num_ranks)[mine] for source in range(num_ranks)]
        assert len(result[f"return {case}"]) == num_ranks
        for found, expected in zip(result[f"return {case}"], wanted, strict=True):
            assert torch.equal(found, expected)
        for ids in result[f"return ids {case}"]:
            assert ids.flatten().tolist() == [2**40 + i for i in range(mine.start, mine.stop)]


@each_world
@pytest.mark.parametrize("num_labels", LABELS)
def test_each_pair_goes_to_exactly_its_owner(runs: Runs, num_ranks: int, num_labels: int) -> None:
    sent = sorted(
        tuple(pair)
        for rank in range(num_ranks)
        for pair in torch.stack(pairs_of(rank, num_labels), 1).tolist()
    )
    received = []
    for rank, result in enumerate(runs[num_ranks]):
        start, stop = split_range(num_labels, num_ranks, rank)
        pairs = result[f"route {num_labels}"]
        assert pairs.dtype == torch.int64
        assert ((pairs[:, 1] >= start) & (pairs[:, 1] < stop)).all()
        received += [tuple(pair) for pair in pairs.tolist()]
    assert sorted(received) == sent


@each_world
@pytest.mark.parametrize("num_labels", LABELS[:2])
def test_look_up_answers_in_the_order_of_the_questions(
    runs: Runs, num_ranks: int, num_labels: int
) -> None:
    for rank, result in enumerate(runs[num_ranks]):
        found = result[f"look up {num_labels}"]
        assert found.dtype == torch.float64
        assert torch.equal(found, value_of(pairs_of(rank, num_labels)[1]))


@each_world
def test_all_sum(runs: Runs, num_ranks: int) -> None:
    for result in runs[num_ranks]:
        sums = [value for name, value in result.items() if name.startswith("sum on")]
        for found in sums:
            assert found.tolist() == [num_ranks * (num_ranks + 1) / 2, 2.0 * num_ranks]
        assert sums and result["announce"] == ([*range(num_ranks)], 2**num_ranks - 1)


@each_world
def test_ddp_sums_the_gradient(runs: Runs, num_ranks: int) -> None:
    dense = linear().double()
    rows = torch.cat([rows_of(rank, 3) for rank in range(num_ranks)]).double()
    (dense(rows) ** 2).sum().backward()
    for result in runs[num_ranks]:
        for name, parameter in dense.named_parameters():
            found = result["gradient"][name].double()
            torch.testing.assert_close(found, parameter.grad, rtol=1e-5, atol=1e-5)


def with_former_names(ranks: Ranks, device: str) -> dict[str, Any]:
    """Runs in a process of its own, as if torch were older than 2.13."""
    for name in ("all_gather_single", "reduce_scatter_single"):
        if hasattr(dist, name):
            delattr(dist, name)
    return everything(ranks, device)


@pytest.mark.parametrize("device", DEVICES)
def test_torch_before_2_13_has_other_names(device: str) -> None:
    former, present = on_ranks(2, with_former_names, device), on_ranks(2, everything, device)
    for found, wanted in zip(former, present, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


class FormerWrapper:
    def __init__(self, module: object, broadcast_buffers: bool = True) -> None: ...


def test_so_has_its_ddp() -> None:
    assert collectives.own_buffers(FormerWrapper) == {"broadcast_buffers": False}  # type: ignore[arg-type]
    assert len(collectives.own_buffers(DistributedDataParallel)) == 1
    assert inspect.signature(DistributedDataParallel).bind(
        None, **collectives.own_buffers(DistributedDataParallel)
    )


def waited_for(_: Ranks, inside: bool) -> torch.Tensor:
    """Seconds that each rank waits for one that comes 4 s late, with a time-out of 1 s."""
    os.environ[PATIENCE] = "60"
    ranks = Ranks.of_process_group(1)
    if ranks.rank == 1:
        time.sleep(4)
    start = time.monotonic()
    with contextlib.suppress(RuntimeError):  # the late one finds nobody
        if inside:
            gather_rows(ranks, torch.zeros(1, DIM), [1, 1])
        else:
            row_counts(ranks, 1)
    waited = torch.tensor(time.monotonic() - start)
    time.sleep(0 if ranks.rank == 1 else 5 - min(5, float(waited)))
    return waited


@pytest.mark.slow
def test_a_rank_is_waited_for_as_long_as_storage_may_keep_it() -> None:
    inside, _ = on_ranks(2, waited_for, True)
    assert 0.5 < float(inside) < 3
    before, _ = on_ranks(2, waited_for, False)
    assert 3 < float(before) < 10
