"""A shard's step against dense autograd in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from renee_ray.xfc.kernels.choose import choose_operations
from renee_ray.xfc.kernels.plain import subtract_positives
from renee_ray.xfc.labels import LabelRange, split_range
from renee_ray.xfc.shard import Pairs, Shard, buffer_bytes, default_chunk
from renee_ray.xfc.weights.storages import SGD, STORAGES, Weights
from tests.pairwise import pairwise
from tests.xfc.memory import Fresh, Largest

CPU = torch.device("cpu")
NUM_LABELS, START, STOP, DIM, BATCH = 30, 8, 25, 6, 9
RULE = SGD(0.1, 0.9, 0.02)
N = STOP - START


def make_shard(
    precision: str = "fp32", chunk: int = 5, owned: LabelRange | None = None, dim: int = DIM
) -> Shard:
    """Multiplies in the dtype of the storage, on whatever machine."""
    owned = LabelRange(START, STOP, NUM_LABELS) if owned is None else owned
    compute = STORAGES[precision].compute
    shard = Shard(owned, Weights(precision, len(owned), dim, True, CPU, compute), chunk)
    generator = torch.Generator().manual_seed(1)
    shard.write(owned.start, torch.randn(len(owned), dim, generator=generator))
    return shard


def embeddings(step: int = 0, batch: int = BATCH, dim: int = DIM) -> torch.Tensor:
    return torch.randn(batch, dim, generator=torch.Generator().manual_seed(100 + step))


POSITIVES = {
    "some": [(0, 8), (0, 24), (3, 12), (3, 13), (8, 17), (7, 8)],
    "repeated": [(0, 8), (0, 8), (0, 8), (3, 12), (3, 13), (3, 12)],
    "none": [],
    "one chunk only": [(row, 24) for row in range(BATCH)],
    "all": [(row, label) for row in range(BATCH) for label in range(START, STOP)],
}


def pairs_of(listed: list[tuple[int, int]], owned: LabelRange) -> Pairs:
    both = torch.tensor(listed, dtype=torch.int64).reshape(-1, 2)
    return Pairs(both[:, 0], both[:, 1], owned)


def dense(
    listed: list[tuple[int, int]], steps: int = 1, weight: torch.Tensor | None = None
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """(losses, dE of each step, weights after all), float64, by autograd and torch.optim.SGD."""
    start = make_shard().weights.weight.read(0, N) if weight is None else weight
    own = start.clone().double().requires_grad_()
    optimizer = torch.optim.SGD(
        [own], RULE.lr, momentum=RULE.momentum, weight_decay=RULE.weight_decay
    )
    target = torch.zeros(BATCH, N, dtype=torch.float64)
    for row, label in listed:
        target[row, label - START] = 1
    losses, gradients = [], []
    for step in range(steps):
        inputs = embeddings(step).double().requires_grad_()
        loss = binary_cross_entropy_with_logits(inputs @ own.T, target, reduction="sum")
        optimizer.zero_grad()
        loss.backward()
        assert inputs.grad is not None
        optimizer.step()
        losses.append(loss.detach())
        gradients.append(inputs.grad)
    return losses, gradients, own.detach()


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    ("kind", "chunk"),
    [*(("some", chunk) for chunk in (1, 4, 16, 17, 100, 0)), *((kind, 5) for kind in POSITIVES)],
)
def test_fp32_equals_float64_autograd(kind: str, chunk: int) -> None:
    shard = make_shard(chunk=chunk)
    losses, gradients, weight = dense(POSITIVES[kind], steps=3)
    for step in range(3):
        seen: list[torch.Tensor] = []
        pairs = pairs_of(POSITIVES[kind], shard.owned)
        loss = shard.step(embeddings(step), pairs, RULE, with_loss=True, on_gradient=seen.append)
        assert len(seen) == 1, "on_gradient is called exactly once"
        assert seen[0].dtype == torch.float32
        assert loss.dtype == torch.float64
        assert error(loss, losses[step]) < 1e-5
        assert error(seen[0], gradients[step]) < 1e-5
    assert error(shard.weights.weight.read(0, N), weight) < 1e-5


def test_a_positive_that_is_left_out_is_far_outside_the_tolerance() -> None:
    *_, weight = dense(POSITIVES["some"], steps=3)
    *_, other = dense(POSITIVES["some"][1:], steps=3)
    assert error(other, weight) > 1e-3


def test_a_repeated_positive_counts_once() -> None:
    once = list(dict.fromkeys(POSITIVES["repeated"]))
    shards = [make_shard(), make_shard()]
    for shard, listed in zip(shards, (POSITIVES["repeated"], once), strict=True):
        shard.step(embeddings(), pairs_of(listed, shard.owned), RULE)
    assert torch.equal(*(shard.weights.weight.read(0, N) for shard in shards))


@pytest.mark.parametrize("chunk", [4, 17])
def test_bf16_split_equals_it_to_the_rounding_of_the_operands(chunk: int) -> None:
    shard = make_shard("bf16_split", chunk)
    losses, gradients, weight = dense(POSITIVES["some"])
    seen: list[torch.Tensor] = []
    pairs = pairs_of(POSITIVES["some"], shard.owned)
    loss = shard.step(embeddings(), pairs, RULE, with_loss=True, on_gradient=seen.append)
    # The naive error: the same formula with operands rounded to bf16, whatever the order of sums.
    inputs = embeddings().bfloat16().double()
    rounded = make_shard().weights.weight.read(0, N).bfloat16().double()
    target = torch.zeros(BATCH, N, dtype=torch.float64)
    for row, label in POSITIVES["some"]:
        target[row, label - START] = 1
    residual = ((inputs @ rounded.T).sigmoid() - target).bfloat16().double()
    naive = error(residual @ rounded, gradients[0])
    assert 0 < error(seen[0], gradients[0]) < 2 * naive + 2**-8
    assert 0 < error(loss, losses[0]) < 2**-7
    assert 0 < error(shard.weights.weight.read(0, N), weight) < 2**-8


def test_without_with_loss_the_loss_is_zero_and_the_rest_the_same() -> None:
    shards = [make_shard(), make_shard()]
    losses = [
        shard.step(
            embeddings(), pairs_of(POSITIVES["some"], shard.owned), RULE, with_loss=with_loss
        )
        for shard, with_loss in zip(shards, (True, False), strict=True)
    ]
    assert losses[0] > 0
    assert losses[1] == 0
    assert torch.equal(*(shard.weights.weight.read(0, N) for shard in shards))


@pytest.mark.parametrize("precision", ["fp32", "bf16_split"])
@pytest.mark.parametrize("chunk", [5, 17, 100])
def test_the_gradient_is_complete_before_the_last_chunk_changes(precision: str, chunk: int) -> None:
    shard = make_shard(precision, chunk)
    before = shard.weights.weight.read(0, N).clone()
    calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def look(gradient: torch.Tensor) -> None:
        calls.append((gradient, gradient.clone(), shard.weights.weight.read(0, N).clone()))

    shard.step(embeddings(), pairs_of(POSITIVES["some"], shard.owned), RULE, on_gradient=look)
    ((gradient, then, weight),) = calls
    assert torch.equal(gradient, then), "dE was written to after it had been handed over"
    last = shard.chunks(BATCH)[-1][0]
    changed = (weight != before).any(dim=1)
    assert changed[:last].all()
    assert not changed[last:].any()
    assert (shard.weights.weight.read(0, N) != before).any(dim=1).all()
    tolerance = 1e-5 if precision == "fp32" else 2**-6
    assert error(then, dense(POSITIVES["some"])[1][0]) < tolerance


@pytest.mark.parametrize("precision", ["fp32", "bf16_split"])
def test_a_shard_without_labels_gives_a_zero_gradient(precision: str) -> None:
    shard = make_shard(precision, owned=LabelRange(3, 3, NUM_LABELS))
    seen: list[torch.Tensor] = []
    pairs = pairs_of([], shard.owned)
    loss = shard.step(embeddings(), pairs, RULE, with_loss=True, on_gradient=seen.append)
    assert loss == 0
    assert len(seen) == 1
    assert torch.equal(seen[0], torch.zeros(BATCH, DIM))


def test_a_batch_without_rows() -> None:
    shard = make_shard()
    before = shard.weights.weight.read(0, N).clone()
    seen: list[torch.Tensor] = []
    shard.step(
        torch.zeros(0, DIM), pairs_of([], shard.owned), SGD(0.1, 0.9), on_gradient=seen.append
    )
    assert seen[0].shape == (0, DIM)
    assert torch.equal(shard.weights.weight.read(0, N), before)


@pytest.mark.parametrize("chunks", [[(0, 4), (4, 8), (8, 17)], [(0, 17)], [(0, 8), (8, 17)]])
def test_pairs_by_chunk(chunks: list[tuple[int, int]]) -> None:
    owned = LabelRange(START, STOP, NUM_LABELS)
    found = pairs_of(POSITIVES["repeated"] + POSITIVES["some"], owned).by_chunk(chunks)
    listed = {
        (int(row), int(column) + start + START)
        for (start, _), (rows, columns, _) in zip(chunks, found, strict=True)
        for row, column in zip(rows, columns, strict=True)
    }
    assert sum(len(rows) for rows, *_ in found) == len(listed)
    assert listed == set(POSITIVES["repeated"] + POSITIVES["some"])
    for (start, stop), (_, columns, _) in zip(chunks, found, strict=True):
        assert ((columns >= 0) & (columns < stop - start)).all()


def test_pairs_of_large_ids() -> None:
    first = 2**40
    owned = LabelRange(first, first + 10, 2**41)
    pairs = pairs_of([(5, first + 9), (0, first), (2**20, first + 9)], owned)
    ((rows, columns, _),) = pairs.by_chunk([(0, 10)])
    assert sorted(zip(rows.tolist(), columns.tolist(), strict=True)) == [
        (0, 0), (5, 9), (2**20, 9),
    ]  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "bf16_split"])
def test_nothing_of_batch_by_labels_is_ever_made(precision: str) -> None:
    batch, n, chunk, dim = 32, 2000, 64, 8
    shard = make_shard(precision, chunk, LabelRange(0, n, n), dim)
    rows = torch.arange(batch).repeat_interleave(3)
    pairs = Pairs(rows, (rows * 37) % n, shard.owned)
    inputs = embeddings(batch=batch, dim=dim)
    with Largest() as largest:
        shard.step(inputs, pairs, RULE, with_loss=True)
    assert largest.numel <= batch * chunk
    with Largest() as naive:
        inputs @ shard.weights.weight.read(0, n).T
    assert naive.numel == batch * n, "the naive expression is noticed"


@pytest.mark.parametrize(
    ("precision", "momentum", "own"), pairwise(STORAGES, [0.0, 0.9], [True, False])
)
def test_a_second_step_allocates_nothing_of_a_chunks_size(
    precision: str, momentum: float, own: bool
) -> None:
    batch, n, chunk, dim = 16, 640, 128, 48
    compute = STORAGES[precision].compute if own else torch.float32
    shard = Shard(
        LabelRange(0, n, n), Weights(precision, n, dim, momentum > 0, CPU, compute), chunk
    )
    pairs = Pairs(torch.arange(batch), torch.arange(batch) * 10, shard.owned)
    inputs = embeddings(batch=batch, dim=dim)
    sizes = []
    for step in range(2):
        with Fresh() as fresh:
            shard.step(inputs, pairs, SGD(0.1, momentum, 0.01, step=step))
        sizes.append(fresh.numel)
    assert sizes[0] >= chunk * batch, "the buffers of the first step are noticed"
    assert sizes[1] <= batch * dim, "dE and the embeddings in the compute dtype, once a step"


COMPUTE = {(name, dtype) for name, s in STORAGES.items() for dtype in (torch.float32, s.compute)}


@pytest.mark.parametrize(("precision", "compute"), sorted(COMPUTE, key=str))
def test_every_storage_gives_the_gradient_of_its_own_weights(
    precision: str, compute: torch.dtype
) -> None:
    """dE against float64 on the weights as stored: only the matmuls' dtype is inexact."""
    owned = LabelRange(START, STOP, NUM_LABELS)
    shard = Shard(owned, Weights(precision, N, DIM, True, CPU, compute), 4)
    shard.write(START, torch.randn(N, DIM, generator=torch.Generator().manual_seed(1)))
    stored = shard.weights.read(0, N).clone()
    losses, gradients, after = dense(POSITIVES["some"], weight=stored)
    seen: list[torch.Tensor] = []
    pairs = pairs_of(POSITIVES["some"], owned)
    loss = shard.step(embeddings(), pairs, RULE, with_loss=True, on_gradient=seen.append)
    unit = {torch.float32: 2.0**-22, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[compute]
    spacing = {"bf16_sr": 2.0**-7, "fp8_sr": 2.0**-3}.get(precision, 0.0)
    assert error(seen[0], gradients[0]) < 3 * unit
    assert error(loss, losses[0]) < 3 * unit
    assert error(shard.weights.read(0, N), after) < 3 * unit + spacing
    assert error(stored, after) > 0.05, "the step is larger than any tolerance but that of fp8"


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_positives_that_are_certain_keep_their_digits(compute: torch.dtype) -> None:
    """sigmoid(8) - 1 in bf16 would be 0."""
    logits = torch.full((3, 2), 8.0, dtype=compute)
    residual = subtract_positives(logits, torch.tensor([1]), torch.tensor([0]))
    assert float(residual[1, 0]) == pytest.approx(-1 / (1 + math.exp(8)), rel=2**-8)
    assert float(residual[0, 0]) == pytest.approx(1, rel=2**-8)


def test_default_chunk() -> None:
    sizes = []
    for batch, dim in [(256, 384), (1024, 384), (1, 1), (2**14, 768), (0, 384)]:
        weights = Weights("fp32", 3, dim, False, CPU)
        each = buffer_bytes(batch, weights, choose_operations(weights))
        sizes.append(default_chunk(each, "cpu"))
        assert sizes[-1] >= 64
        assert sizes[-1] % 64 == 0
    assert sizes[0] >= sizes[1]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("precision", STORAGES)
def test_a_chunk_takes_no_more_working_memory_than_is_counted(
    precision: str, momentum: float
) -> None:
    """What the chunk on a GPU is chosen by."""
    batch, dim, n = 24, 48, 4096
    compute = STORAGES[precision].compute
    weights = Weights(precision, n, dim, momentum > 0, CPU, compute)
    shard = Shard(LabelRange(0, n, n), weights, n)
    pairs = Pairs(torch.arange(batch), torch.arange(batch), shard.owned)
    with_loss = 8 * batch  # its fp32 copies are not kept, and not by scratch
    shard.step(embeddings(batch=batch, dim=dim), pairs, SGD(0.1, momentum, 0.01), with_loss=True)
    counted = buffer_bytes(batch, weights, shard.operations) - with_loss
    labels = 3 * 8 * n  # label hashes and offsets
    assert weights.scratch.nbytes() - labels <= counted * n
    assert weights.scratch.nbytes() > counted * n / 40


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
def test_normal_weights_do_not_depend_on_the_shards(num_ranks: int) -> None:
    n = 2500
    rows = []
    for rank in range(num_ranks):
        owned = LabelRange(*split_range(n, num_ranks, rank), n)
        shard = Shard(owned, Weights("fp32", len(owned), 4, False, CPU))
        shard.initialise_normal(0.02, seed=3)
        rows.append(shard.weights.weight.read(0, len(owned)).clone())
    whole = torch.cat(rows)
    single = Shard(LabelRange(0, n, n), Weights("fp32", n, 4, False, CPU))
    single.initialise_normal(0.02, seed=3)
    assert torch.equal(whole, single.weights.weight.read(0, n))
    assert float(whole.std()) == pytest.approx(0.02, rel=0.03)
    assert abs(float(whole.mean())) < 0.02 * 4 / len(whole.view(-1)) ** 0.5
    assert len(whole.unique(dim=0)) == n, "no two labels share their weights"
    single.initialise_normal(0.02, seed=4)
    assert not torch.equal(whole, single.weights.weight.read(0, n))


def test_normal_weights_are_normal_and_independent() -> None:
    n, dim = 1 << 12, 63
    shard = Shard(LabelRange(2**40, 2**40 + n, 2**41), Weights("fp32", n, dim, False, CPU))
    shard.initialise_normal(1.0, seed=3)
    rows = shard.weights.weight.read(0, n).clone().double()
    shard.initialise_normal(1.0, seed=4)
    other = shard.weights.weight.read(0, n).double()
    standard = (n * dim) ** -0.5
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs(float((rows**power).mean()) - moment) < 4 * variance**0.5 * standard, power
    neighbours = [(rows[:, 1:], rows[:, :-1]), (rows[1:], rows[:-1]), (rows, other)]
    for a, b in [*neighbours, (rows[:, 2:], rows[:, :-2]), (rows[64:], rows[:-64])]:
        assert abs(float((a * b).mean())) < 4.5 * standard
        # Sizes that go together, as those of two numbers made of one radius could.
        assert abs(float(((a**2 - 1) * (b**2 - 1)).mean())) < 4.5 * 2 * standard
    assert float(rows.abs().max()) > 4


@pytest.mark.parametrize("precision", ["bf16_sr", "fp32"])
def test_an_update_may_be_prepared_before_the_step(precision: str) -> None:
    found = []
    for prepare in (True, False):
        shard = Shard(LabelRange(START, STOP, NUM_LABELS), Weights(precision, N, DIM, True, CPU))
        shard.initialise_normal(1.0, seed=1)
        update = shard.prepared(RULE) if prepare else RULE
        pairs = pairs_of(POSITIVES["some"], shard.owned)
        shard.step(embeddings(), pairs, update)
        found.append(shard.weights.read(0, N).clone())
    assert torch.equal(*found)


def test_normal_weights_of_an_empty_shard() -> None:
    shard = Shard(LabelRange(1024, 1024, 2048), Weights("fp32", 0, 4, False, CPU))
    shard.initialise_normal(0.02, seed=3)


def test_normal_weights_are_the_same_in_every_storage() -> None:
    read = []
    for precision in ("fp32", "bf16_split"):
        shard = Shard(LabelRange(5, 40, 50), Weights(precision, 35, 4, False, CPU))
        shard.initialise_normal(0.02, seed=3)
        read.append(shard.weights.weight.read(0, 35))
    assert torch.equal(*read)
