"""The streaming top-k against torch.topk on dense logits."""

from __future__ import annotations

import math

import pytest
import torch

from renee_ray.benchmarks.topk import against_exact, rounding
from renee_ray.xfc import shard as shard_module
from renee_ray.xfc.labels import LabelRange, split_range
from renee_ray.xfc.shard import Pairs, Shard
from renee_ray.xfc.topk import best as module
from renee_ray.xfc.topk.select import NONE, merge_topk, shard_topk
from renee_ray.xfc.weights.storages import STORAGES, Weights
from tests.pairwise import pairwise
from tests.xfc.memory import Largest, peak_bytes

CPU = torch.device("cpu")
NUM_LABELS, DIM, BATCH = 53, 8, 12
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = [CPU, pytest.param(torch.device("cuda"), marks=[pytest.mark.gpu, needs_gpu])]


WAYS = ["compiled", "plain torch"]


@pytest.fixture(autouse=True, params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes what a CPU does, or what other devices do."""
    if request.param == "plain torch":
        monkeypatch.setattr(module, "Best", module.PlainBest)


def weight_of(n: int = NUM_LABELS, dim: int = DIM) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(0))


def inputs_of(batch: int = BATCH, dim: int = DIM) -> torch.Tensor:
    return torch.randn(batch, dim, generator=torch.Generator().manual_seed(1))


def shard_of(owned: LabelRange, weight: torch.Tensor, chunk: int, precision: str = "fp32") -> Shard:
    shard = Shard(owned, Weights(precision, len(owned), weight.shape[1], False, CPU), chunk)
    shard.write(owned.start, weight[owned.start : owned.stop])
    return shard


def excluded_pairs() -> torch.Tensor:
    """[m, 2]: rows 0..7 lose a few labels, row 8 all but two, row 9 all."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.randint(0, 8, (60,), generator=generator)
    labels = torch.randint(0, NUM_LABELS, (60,), generator=generator)
    best = (inputs_of() @ weight_of().T).argmax(1)
    many = [[8, label] for label in range(2, NUM_LABELS)] + [[9, i] for i in range(NUM_LABELS)]
    return torch.cat(
        [
            torch.stack([rows, labels], 1),
            torch.stack([torch.arange(8), best[:8]], 1),
            torch.tensor(many),
        ]
    )


def owned_pairs(pairs: torch.Tensor, owned: LabelRange) -> Pairs:
    mine = pairs[(pairs[:, 1] >= owned.start) & (pairs[:, 1] < owned.stop)]
    return Pairs(mine[:, 0], mine[:, 1], owned)


def dense(k: int, excluded: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    logits = inputs_of() @ weight_of().T
    if excluded is not None:
        logits[excluded[:, 0], excluded[:, 1]] = -torch.inf
    width = max(k, NUM_LABELS)
    padded = torch.full((BATCH, width), -torch.inf)
    padded[:, :NUM_LABELS] = logits
    scores, labels = padded.topk(k, dim=1)
    return scores, torch.where(scores > -torch.inf, labels, NONE)


@pytest.mark.parametrize(
    ("k", "chunk", "with_excluded", "precision", "way"),
    pairwise([1, 5, 53, 70], [1, 7, 53, 0], [False, True], ["fp32", "bf16_split"], WAYS),
    indirect=["way"],
)
def test_one_shard_equals_dense(k: int, chunk: int, with_excluded: bool, precision: str) -> None:
    """bf16_split too: scores are products of the fp32 weights."""
    owned = LabelRange(0, NUM_LABELS, NUM_LABELS)
    excluded = excluded_pairs() if with_excluded else None
    wanted = dense(k, excluded)
    pairs = None if excluded is None else owned_pairs(excluded, owned)
    scores, labels = shard_topk(
        shard_of(owned, weight_of(), chunk, precision), inputs_of(), k, pairs
    )
    assert labels.dtype == torch.int64
    assert torch.equal(labels, wanted[1])
    torch.testing.assert_close(scores, wanted[0], rtol=1e-5, atol=1e-6)
    if with_excluded and k >= 5:
        assert labels[8].tolist()[2:] == [NONE] * (k - 2)
        assert labels[9].tolist() == [NONE] * k
        assert scores[9].tolist() == [-torch.inf] * k


def test_filtering_after_the_cut_would_be_noticed() -> None:
    _, labels = dense(5, None)
    pairs = {tuple(pair) for pair in excluded_pairs().tolist()}
    kept = [
        [label for label in row if (i, label) not in pairs] for i, row in enumerate(labels.tolist())
    ]
    assert min(map(len, kept[:8])) < 5
    assert (dense(5, excluded_pairs())[1][:8] != NONE).all()


@pytest.mark.parametrize(("num_ranks", "k"), [(2, 1), (3, 5), (5, 30), (60, 5)])
def test_merged_shards_equal_the_whole(num_ranks: int, k: int) -> None:
    """60 ranks: most shards have one label, some none."""
    excluded = excluded_pairs()
    scores, labels = [], []
    for rank in range(num_ranks):
        owned = LabelRange(*split_range(NUM_LABELS, num_ranks, rank), NUM_LABELS)
        shard = shard_of(owned, weight_of(), chunk=4)
        found = shard_topk(shard, inputs_of(), k, owned_pairs(excluded, owned))
        scores.append(found[0])
        labels.append(found[1])
    merged = merge_topk(scores, labels, k)
    wanted = dense(k, excluded)
    assert torch.equal(merged[1], wanted[1])
    torch.testing.assert_close(merged[0], wanted[0], rtol=1e-5, atol=1e-6)


def test_ties_go_to_the_smaller_id_when_merging() -> None:
    scores = [torch.tensor([[2.0, 1.0, 1.0]]), torch.tensor([[2.0, 1.0, -torch.inf]])]
    labels = [torch.tensor([[9, 8, 3]]), torch.tensor([[4, 5, NONE]])]
    assert merge_topk(scores, labels, 4)[1].tolist() == [[4, 9, 3, 5]]
    assert merge_topk(scores[::-1], labels[::-1], 4)[1].tolist() == [[4, 9, 3, 5]]
    assert merge_topk(scores, labels, 6)[1].tolist() == [[4, 9, 3, 5, 8, NONE]]


def test_large_ids_survive_a_merge() -> None:
    base = 2**53
    scores = [torch.tensor([[1.0]]), torch.tensor([[1.0]])]
    labels = [torch.tensor([[base + 1]]), torch.tensor([[base]])]
    assert merge_topk(scores, labels, 2)[1].tolist() == [[base, base + 1]]


@pytest.mark.parametrize("chunk", [3, 10, 40])
def test_equal_scores_are_ordered_by_id(chunk: int) -> None:
    weight = torch.randint(-1, 2, (40, 3), generator=torch.Generator().manual_seed(5)).float()
    inputs = torch.randint(-1, 2, (20, 3), generator=torch.Generator().manual_seed(6)).float()
    scores, labels = shard_topk(shard_of(LabelRange(0, 40, 40), weight, chunk), inputs, 40)
    for row, (score, label) in enumerate(zip(scores.tolist(), labels.tolist(), strict=True)):
        pairs = [(-s, i) for s, i in zip(score, label, strict=True)]
        assert pairs == sorted(pairs), row
        assert sorted(label) == list(range(40))


@pytest.mark.parametrize("chunk", [3, 10, 40])
def test_equal_scores_at_the_cut_go_to_the_smaller_id(chunk: int) -> None:
    """Otherwise the result depends on chunks and on the number of ranks."""
    weight = torch.randint(-1, 2, (40, 3), generator=torch.Generator().manual_seed(5)).float()
    inputs = torch.randint(-1, 2, (20, 3), generator=torch.Generator().manual_seed(6)).float()
    found = shard_topk(shard_of(LabelRange(0, 40, 40), weight, chunk), inputs, 7)
    order = (inputs @ weight.T).argsort(dim=1, descending=True, stable=True)[:, :7]
    assert torch.equal(found[1], order)


@pytest.mark.parametrize(
    ("kind", "chunk", "k", "way"),
    pairwise(
        ["normal", "ties", "ascending", "descending", "equal"],
        [64, 100, 1000, 3000],
        [1, 7, 100, 300],
        WAYS,
    ),
    indirect=["way"],
)
def test_long_shards_equal_a_stable_sort(kind: str, chunk: int, k: int) -> None:
    """Scores are whole numbers, exact in any order of summation. Ascending: every label beats
    all before it, so that the room for candidates overflows in every chunk."""
    n = 3000
    generator = torch.Generator().manual_seed(7)
    score = {
        "normal": (torch.randn(n, generator=generator) * 1e6).round(),
        "ties": torch.randint(-3, 4, (n,), generator=generator).float(),
        "ascending": torch.arange(n).float(),
        "descending": -torch.arange(n).float(),
        "equal": torch.ones(n),
    }[kind]
    # Row 1 sees all scores negated; the third column spreads a few rows apart.
    weight = torch.stack([score, torch.randint(0, 2, (n,), generator=generator).float()], 1)
    inputs = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 2.0], [0.0, 1.0]])
    owned = LabelRange(5, n + 5, n + 9)
    whole = torch.cat([torch.zeros(5, 2), weight])
    rows = torch.arange(4).repeat_interleave(60)
    banned = torch.randint(5, n + 5, (240,), generator=generator)
    logits = inputs @ weight.T
    logits[rows, banned - 5] = -torch.inf
    wanted = logits.sort(dim=1, descending=True, stable=True)
    shard = shard_of(owned, whole, chunk)
    scores, labels = shard_topk(shard, inputs, k, Pairs(rows, banned, owned))
    assert torch.equal(scores, wanted.values[:, :k])
    assert torch.equal(labels, wanted.indices[:, :k] + 5)


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("precision", STORAGES)
def test_every_storage_gives_the_labels_of_exact_scores(
    precision: str, device: torch.device
) -> None:
    """All but ties: in three shards, with an offset, without the best and the worst labels."""
    n, dim, batch, k = 2000, 64, 24, 30
    weight = weight_of(n, dim).to(device) / 8
    inputs = inputs_of(batch, dim).to(device)
    offset = weight_of(n, 1).flatten().to(device)
    found, stored, banned = [], [], []
    for owned in (LabelRange(a, b, n) for a, b in ((0, 700), (700, 701), (701, n))):
        weights = Weights(precision, len(owned), dim, False, device)
        shard = Shard(owned, weights, 300)
        shard.write(owned.start, weight[owned.start : owned.stop])
        stored.append(weights.read(0, len(owned)).clone())
        z = inputs @ stored[-1].T + offset[owned.start : owned.stop]
        ends = torch.cat([z.argmax(1), z.argmin(1)]).cpu() + owned.start
        rows = torch.arange(batch).repeat(2)
        pairs = torch.stack([rows, ends], 1).unique(dim=0)[owned.start == 700 :]
        banned.append(pairs)
        excluded = Pairs(pairs[:, 0], pairs[:, 1], owned, device)
        found.append(shard_topk(shard, inputs, k, excluded, offset[owned.start : owned.stop]))
    best = merge_topk(*map(list, zip(*found, strict=True)), k)
    whole = torch.cat(stored)
    exact = inputs.double() @ whole.double().T + offset.double()
    allowed = rounding(inputs, whole) + 2.0**-24 * exact.abs().amax(dim=1)
    pairs = torch.cat(banned).to(device)
    exact[pairs[:, 0], pairs[:, 1]] = -torch.inf

    def same(scores: torch.Tensor, labels: torch.Tensor) -> bool:
        return against_exact((scores, labels), [(0, exact.clone())], allowed)[0]

    assert same(*best)
    # Other last bits, as another BLAS gives them, and the order that follows from them.
    nudged = best[0] + 0.3 * allowed[:, None].float() * inputs_of(batch, k).sign().to(device)
    order = nudged.argsort(dim=1, descending=True)
    assert same(nudged.gather(1, order), best[1].gather(1, order))
    # Scores of numbers with 8 binary digits are noticed, and so is any other label or order.
    narrow = inputs.bfloat16().float() @ whole.bfloat16().float().T + offset
    narrow[pairs[:, 0], pairs[:, 1]] = -torch.inf
    assert not same(*narrow.topk(k, dim=1))
    assert not same(best[0].roll(1, 0), best[1])
    assert not same(best[0], best[1].flip(1))
    assert not same(*(each[:, 1:] for each in best))
    assert not same(best[0], best[1][:, :1].expand(-1, k))


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize(
    ("kind", "precision", "way"),
    pairwise(["normal", "ascending", "equal", "clustered"], ["fp32", "bf16_split", "fp8_sr"], WAYS),
    indirect=["way"],
)
def test_memory_is_that_of_a_chunk(
    kind: str, precision: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first chunk on, which has no threshold, whatever the order of the scores."""
    n, dim, batch, k, limit = 12_000, 16, 128, 50, 2 << 20
    monkeypatch.setattr(shard_module, "chunk_bytes", lambda device_type: limit)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    score = {
        "normal": weight_of(n, 1).flatten(),
        "ascending": torch.arange(n) / n,
        "equal": torch.zeros(n),
        "clustered": torch.arange(n) / n * (torch.arange(n) // 64 % 40 < 2),
    }[kind]
    shard = Shard(LabelRange(0, n, n), Weights(precision, n, dim, False, device))
    shard.write(0, score[:, None] * weight_of(1, dim).abs())
    inputs = inputs_of(batch, dim).abs().to(device)
    small = Shard(LabelRange(0, 9, 9), Weights(precision, 9, dim, False, device))
    shard_topk(small, inputs, k)  # what libraries take once
    peak = peak_bytes(lambda: shard_topk(shard, inputs, k), device)
    each_row = 36 * (k + max(k, 2 * module.BLOCK))  # the best ones, and once more while sorted
    assert limit / 4 < peak < limit + batch * each_row


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_score_without_value_hides_no_other(value: float) -> None:
    weight, inputs = weight_of(2000), inputs_of()
    for label in (5, 700, 1990):  # in a chunk that has no threshold, and in later ones
        weight[label] = value * inputs[0].sign()
    shard = shard_of(LabelRange(0, 2000, 2000), weight, 600)
    logits = (inputs @ weight.T).nan_to_num(nan=-torch.inf, posinf=torch.inf)
    wanted = logits.sort(dim=1, descending=True, stable=True)
    assert torch.equal(shard_topk(shard, inputs, 9)[1], wanted.indices[:, :9])


def test_no_rows_and_no_labels() -> None:
    shard = shard_of(LabelRange(0, NUM_LABELS, NUM_LABELS), weight_of(), 7)
    assert shard_topk(shard, torch.zeros(0, DIM), 5)[1].shape == (0, 5)
    empty = shard_of(LabelRange(3, 3, NUM_LABELS), weight_of(), 7)
    scores, labels = shard_topk(empty, inputs_of(), 5, owned_pairs(excluded_pairs(), empty.owned))
    assert (labels == NONE).all()
    assert (scores == -torch.inf).all()


def test_nothing_of_batch_by_labels_is_ever_made() -> None:
    batch, n, chunk, k = 32, 2000, 64, 10
    shard = shard_of(LabelRange(0, n, n), weight_of(n), chunk)
    rows = torch.arange(batch).repeat_interleave(2)
    excluded = Pairs(rows, (rows * 31) % n, shard.owned)
    with Largest() as largest:
        shard_topk(shard, inputs_of(batch), k, excluded)
    assert largest.numel <= batch * (chunk + 2 * max(k, 128))


@pytest.mark.parametrize("precision", sorted(STORAGES))
def test_rows_that_are_picked_are_those_that_are_read(precision: str) -> None:
    shard = shard_of(LabelRange(0, 90, 90), weight_of(90), 0, precision)
    rows = torch.tensor([5, 0, 89, 5, 44])
    assert torch.equal(shard.weights.weight.pick(rows), shard.weights.read(0, 90)[rows])


def test_pairs_of_some_rows() -> None:
    owned = LabelRange(10, 40, 50)
    pairs = Pairs(torch.tensor([0, 3, 3, 5, 8]), torch.tensor([12, 39, 11, 12, 30]), owned)
    found = pairs.of_rows(torch.tensor([3, 5, 7])).by_chunk([(0, 5), (5, 30)])
    assert [(r.tolist(), c.tolist()) for r, c, _ in found] == [([0, 1], [1, 2]), ([0], [24])]
    assert pairs.of_rows(torch.tensor([7])).by_chunk([(0, 30)])[0][0].tolist() == []
