"""The top-k that bf16 products screen, against the one by fp32 products alone."""

from __future__ import annotations

import pytest
import torch

from renee_ray.xfc.labels import LabelRange
from renee_ray.xfc.shard import Pairs, Shard
from renee_ray.xfc.topk import screen
from renee_ray.xfc.topk.screen import ROWS, kept, screened_topk, screens
from renee_ray.xfc.topk.select import NONE, shard_topk
from renee_ray.xfc.weights.storages import Weights
from tests.pairwise import pairwise

CPU = torch.device("cpu")
LABELS, DIM, BATCH, FIRST = 3000, 48, 21, 7
PRECISIONS = ["fp32", "bf16_split", "bf16_sr", "fp16", "fp8_sr"]


@pytest.fixture(autouse=True)
def bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Emulated where the machine has no bf16 instructions."""
    monkeypatch.setattr(screen, "native_bf16", lambda device: True)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shard_of(weight: torch.Tensor, precision: str = "fp32", chunk: int = 700) -> Shard:
    owned = LabelRange(FIRST, FIRST + len(weight), FIRST + len(weight) + 5)
    shard = Shard(owned, Weights(precision, len(weight), weight.shape[1], False, CPU), chunk)
    shard.write(FIRST, weight)
    return shard


def plain_topk(
    shard: Shard, inputs: torch.Tensor, k: int, excluded: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """A stable sort of dense logits; excluded: [m, 2]."""
    logits = inputs @ shard.weights.read(0, len(shard.owned)).T
    if offset is not None:
        logits += offset
    if excluded is not None:
        logits[excluded[:, 0], excluded[:, 1] - FIRST] = -torch.inf
    best = logits.sort(dim=1, descending=True, stable=True)
    scores, labels = best.values[:, :k], best.indices[:, :k] + FIRST
    return scores, torch.where(scores == -torch.inf, NONE, labels)


@pytest.mark.parametrize(
    ("precision", "k", "beside"),
    pairwise(PRECISIONS, [1, 10, 100], ["nothing", "offset", "excluded", "both"]),
)
def test_equals_the_dense_sort(precision: str, k: int, beside: str) -> None:
    shard, inputs = shard_of(drawn(LABELS, DIM) * 0.1, precision), drawn(BATCH, DIM, seed=1)
    offset = drawn(LABELS, seed=2) * 2 if beside in ("offset", "both") else None
    banned = None
    if beside in ("excluded", "both"):
        _, best = plain_topk(shard, inputs, 3, None, offset)
        # The three best of each row, and of row 2 all but five.
        many = torch.stack([torch.full((LABELS - 5,), 2), torch.arange(LABELS - 5) + FIRST], 1)
        pairs = torch.stack([torch.arange(BATCH).repeat_interleave(3), best.flatten()], 1)
        banned = torch.cat([pairs, many])
    excluded = None if banned is None else Pairs(banned[:, 0], banned[:, 1], shard.owned)
    assert screens(shard, BATCH, k)
    scores, labels, certain = screened_topk(shard, inputs, k, excluded, offset)
    assert bool(certain.all()), "no row of such weights should need a second look"
    wanted = plain_topk(shard, inputs, k, banned, offset)
    assert torch.equal(labels, wanted[1])
    torch.testing.assert_close(scores, wanted[0], rtol=1e-5, atol=1e-5)
    found = shard_topk(shard, inputs, k, excluded, offset)
    assert torch.equal(found[0], scores) and torch.equal(found[1], labels)


def test_labels_that_bf16_cannot_tell_apart_are_left_to_fp32() -> None:
    """2,000 labels whose scores of half the rows differ by less than a rounding, in any order."""
    weight = drawn(LABELS, DIM) * 0.1
    weight[500:2500] = 3 * drawn(DIM, seed=3) / DIM**0.5
    weight[500:2500, 0] += torch.linspace(0, 1e-3, 2000)[drawn(2000, seed=5).argsort()]
    inputs = drawn(BATCH, DIM, seed=1)
    inputs[::2] = weight[500] + 0.01 * drawn(len(inputs[::2]), DIM, seed=4)
    inputs[::2, 0] = 1.0
    shard, k = shard_of(weight), 20
    _, screened, certain = screened_topk(shard, inputs, k, None, None)
    wanted = plain_topk(shard, inputs, k)
    assert not certain[::2].any() and not torch.equal(screened, wanted[1])
    pairs = torch.stack([torch.arange(BATCH), wanted[1][:, 0]], 1)
    for banned in (None, pairs):
        excluded = None if banned is None else Pairs(banned[:, 0], banned[:, 1], shard.owned)
        scores, labels = shard_topk(shard, inputs, k, excluded)
        wanted = plain_topk(shard, inputs, k, banned)
        torch.testing.assert_close(scores, wanted[0], rtol=1e-6, atol=1e-6)
        # What differs must be equal but for the order of a sum.
        for row, label in (labels != wanted[1]).nonzero().tolist():
            exact = inputs[row].double() @ weight[labels[row, label] - FIRST].double()
            assert float(exact) == pytest.approx(float(wanted[0][row, label]), rel=1e-6)


@pytest.mark.parametrize("value", [1e4, 3e38, float("inf"), float("nan")])
def test_a_label_of_huge_or_no_value(value: float) -> None:
    weight, inputs = drawn(LABELS, DIM) * 0.1, drawn(BATCH, DIM, seed=1)
    weight[1234, 5] = value
    shard = shard_of(weight)
    found = shard_topk(shard, inputs, 9)
    logits = (inputs @ weight.T).nan_to_num(nan=-torch.inf, posinf=torch.inf)
    wanted = logits.sort(dim=1, descending=True, stable=True)
    assert torch.equal(found[1], wanted.indices[:, :9] + FIRST)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_label_without_value_does_not_hide_how_large_others_are(value: float) -> None:
    """The best label is one whose product bf16 loses, in the chunk of that without value."""
    weight, inputs = torch.zeros(LABELS, DIM), torch.zeros(BATCH, DIM)
    inputs[:, :3] = 1
    weight[200:260, 2] = 0.05
    weight[200, 2] = 0.06  # well above those that bf16 leaves out
    weight[300, :2] = torch.tensor([100.0, -99.9])
    weight[100, 5] = value
    found = shard_topk(shard_of(weight), inputs, 1)
    assert torch.equal(found[1], torch.full((BATCH, 1), 300 + FIRST))


def test_the_bound_holds() -> None:
    """Of every pair, for weights of very different lengths."""
    weight = drawn(LABELS, DIM) * torch.logspace(-3, 2, LABELS)[:, None]
    inputs = drawn(BATCH, DIM, seed=1)
    shard = shard_of(weight)
    narrow = screen.Narrow(shard.weights)
    rows = torch.cat([narrow.rows(i, i + 600).clone() for i in range(0, LABELS, 600)])
    products = (inputs.bfloat16() @ rows.T).double()
    off = (inputs.double() @ weight.double().T - products).abs()
    bound = narrow.bound(inputs, inputs.bfloat16())[:, None]
    assert bool((off <= bound + 1.01 * screen.HALF_ULP * products.abs()).all())
    assert narrow.size == pytest.approx(float(rows.float().norm(dim=1).max()), rel=1e-5)
    lost = (weight - rows.float()).norm(dim=1).max()
    assert narrow.error == pytest.approx(float(lost), rel=1e-4)
    assert torch.equal(rows, weight.bfloat16())


def test_where_it_is_not_used() -> None:
    shard = shard_of(drawn(LABELS, DIM))
    assert screens(shard, ROWS, 10)
    assert not screens(shard, ROWS - 1, 10)
    assert not screens(shard, ROWS, 1000)
    assert not screens(shard_of(drawn(8 * kept(10) - 1, DIM)), ROWS, 10)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_that_are_picked_are_those_that_are_read(precision: str) -> None:
    shard = shard_of(drawn(90, DIM), precision)
    rows = torch.tensor([5, 0, 89, 5, 44])
    assert torch.equal(shard.weights.weight.pick(rows), shard.weights.read(0, 90)[rows])


def test_pairs_of_some_rows() -> None:
    owned = LabelRange(10, 40, 50)
    pairs = Pairs(torch.tensor([0, 3, 3, 5, 8]), torch.tensor([12, 39, 11, 12, 30]), owned)
    found = pairs.of_rows(torch.tensor([3, 5, 7])).by_chunk([(0, 5), (5, 30)])
    assert [(r.tolist(), c.tolist()) for r, c in found] == [([0, 1], [1, 2]), ([0], [24])]
    assert pairs.of_rows(torch.tensor([7])).by_chunk([(0, 30)])[0][0].tolist() == []
