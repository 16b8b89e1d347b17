"""The distributed step against dense autograd in float64."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from renee_ray.config.overrides import make_config
from renee_ray.config.schema import EncoderConfig, RunConfig
from renee_ray.model.dropout import dropout_mask
from renee_ray.model.encoder import adamw, data_parallel
from renee_ray.model.loss_scale import LossScale
from renee_ray.model.token_gradient import TokenGradient
from renee_ray.rank.batch import Batch, Position, Ragged
from renee_ray.rank.collectives import Ranks
from renee_ray.training.step import Step
from renee_ray.xfc.labels import LabelRange, split_range
from renee_ray.xfc.shard import Shard
from renee_ray.xfc.weights.storages import SGD, STORAGES, Weights
from tests.training.gloo import on_ranks

WORLD_SIZES = (1, 2, 3)
LABELS, DIM, VOCABULARY, STEPS, BATCH, SEED = 11, 6, 20, 20, 7, 4
CLIP = 18.0  # between the norms that occur: some steps are clipped, some are not
RULE = SGD(lr=0.05, momentum=0.9, weight_decay=0.01)
ENCODER = EncoderConfig(learning_rate=1e-2, weight_decay=0.1, dropout=0.2, clip_norm=CLIP)


class Bag(nn.Module):
    """A small encoder: mean of token vectors, a normalisation, a matrix."""

    autocast: torch.dtype | None = None
    bag = None

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.tokens = nn.Embedding(VOCABULARY, DIM)
        self.norm = nn.LayerNorm(DIM)
        self.out = nn.Linear(DIM, DIM)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        mask = mask.unsqueeze(-1).to(self.out.weight.dtype)
        return self.out(self.norm((self.tokens(ids) * mask).sum(1) / mask.sum(1)))


def global_batches() -> list[tuple[list[list[int]], list[list[int]]]]:
    """(tokens, labels) of each step: repeated positives, rows without any, a ragged last batch;
    labels 3..6 are never positive, so that the middle shard of three has none."""
    rng = np.random.default_rng(1)
    labels = np.array([0, 1, 2, 7, 8, 9, 10])
    out = []
    for step in range(STEPS):
        rows = BATCH if step < STEPS - 1 else 2
        tokens = [rng.integers(0, VOCABULARY, rng.integers(1, 6)).tolist() for _ in range(rows)]
        positives = [rng.choice(labels, rng.integers(0, 4)).tolist() for _ in range(rows)]
        positives[0] = positives[0] * 2
        out.append((tokens, positives))
    return out


def first_weights() -> torch.Tensor:
    return torch.randn(LABELS, DIM, generator=torch.Generator().manual_seed(2)) * 0.3


def batch_of(ranks: Ranks, number: int) -> Batch:
    """This rank's rows of one global batch."""
    tokens, labels = global_batches()[number]
    mine = slice(*split_range(len(tokens), ranks.num_ranks, ranks.rank))
    rows = len(tokens[mine])
    return Batch(
        Position(0, number),
        np.arange(rows),
        Ragged.of_lists(tokens[mine]),
        Ragged.of_lists(labels[mine]),
        Ragged.of_lists([[]] * rows),
        pad_id=0,
    )


def run_config(encoder: EncoderConfig, **rest: Any) -> RunConfig:
    config = make_config(RunConfig, {"data": "d", "output": "o"}, rest)
    return config.model_copy(update={"encoder": encoder})


def distributed(
    ranks: Ranks,
    precision: str,
    gradient: str = "sum",
    poisoned: int = -1,
    poisoned_backward: int = -1,
    poison: float = torch.nan,
    loss_scale: LossScale | None = None,
    micro_batch: int = 0,
    sparse: bool = False,
) -> dict[str, torch.Tensor]:
    """Trains on this rank's rows of each batch; returns its shard, the encoder and the losses.

    poisoned, poisoned_backward: steps in which rank 0 has its embeddings, or the gradient of one
    matrix of its encoder, multiplied by `poison`.
    """
    owned = LabelRange.of_rank(LABELS, ranks.num_ranks, ranks.rank)
    compute = STORAGES[precision].compute
    weights = Weights(precision, len(owned), DIM, RULE.momentum > 0, torch.device("cpu"), compute)
    shard = Shard(owned, weights, chunk=3)
    shard.write(owned.start, first_weights()[owned.start : owned.stop])
    encoder = Bag()
    tokens = TokenGradient(encoder, ranks, mean=gradient == "mean") if sparse else None
    step = Step(
        run_config(ENCODER.model_copy(update={"micro_batch": micro_batch}), seed=SEED),
        data_parallel(encoder, ranks, gradient, tokens),  # type: ignore[arg-type]
        shard,
        adamw(encoder, ENCODER),  # type: ignore[arg-type]
        ranks,
        torch.device("cpu"),
        loss_scale=loss_scale or LossScale(),
        tokens=tokens,
    )
    results = []
    for number in range(STEPS):
        batch = batch_of(ranks, number)
        if number == poisoned and ranks.rank == 0:
            hook = encoder.out.register_forward_hook(lambda *call: call[-1] * poison)
        if number == poisoned_backward and ranks.rank == 0:
            hook = encoder.out.weight.register_hook(lambda gradient: gradient * poison)
        result = step(batch, number, RULE, with_loss=True)
        if number in (poisoned, poisoned_backward) and ranks.rank == 0:
            hook.remove()
        results.append(result)
    step.settle()
    state = {f"encoder.{name}": p.detach().clone() for name, p in encoder.named_parameters()}
    weight = weights.weight.read(0, len(owned)).clone()
    return {
        "weight": weight,
        "loss": torch.stack([result.loss for result in results]),
        "skipped": torch.tensor([n for n, result in enumerate(results) if result.skipped]),
        **state,
    }


def dense_optimizers(
    encoder: nn.Module, weight: torch.Tensor, config: EncoderConfig, rule: SGD
) -> tuple[torch.optim.SGD, torch.optim.AdamW]:
    """torch's optimizers of a dense classifier and of an encoder, whose vectors do not decay."""
    classifier = torch.optim.SGD(
        [weight], rule.lr, momentum=rule.momentum, weight_decay=rule.weight_decay
    )
    decayed = [p for p in encoder.parameters() if p.ndim > 1]
    others = [p for p in encoder.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay},
         {"params": others, "weight_decay": 0.0}],
        lr=config.learning_rate, eps=1e-6,
    )  # fmt: skip
    return classifier, optimizer


def oracle(
    without: Container[int] = (), classifier_alone: Container[int] = ()
) -> dict[str, torch.Tensor]:
    """Makes the same 20 steps, dense, by autograd in float64.

    without: steps that are left out; classifier_alone: those in which the encoder stays as it is.
    """
    encoder = Bag().double()
    weight = first_weights().double().requires_grad_()
    classifier, optimizer = dense_optimizers(encoder, weight, ENCODER, RULE)
    losses = []
    for number, (tokens, labels) in enumerate(global_batches()):
        if number in without:
            continue
        width = max(map(len, tokens))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in tokens])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in tokens])
        target = torch.zeros(len(tokens), LABELS, dtype=torch.float64)
        for row, positives in enumerate(labels):
            target[row, positives] = 1
        embedded = encoder(ids, mask)
        embedded = embedded * dropout_mask(embedded, ENCODER.dropout, SEED, number, 0)
        loss = nn.functional.binary_cross_entropy_with_logits(
            embedded @ weight.T, target, reduction="sum"
        )
        loss.backward()
        nn.utils.clip_grad_norm_(encoder.parameters(), CLIP)
        for each in (classifier, optimizer):
            if each is classifier or number not in classifier_alone:
                each.step()
            each.zero_grad()
        losses.append(loss.detach())
    state = {f"encoder.{name}": p.detach() for name, p in encoder.named_parameters()}
    return {"weight": weight.detach(), "loss": torch.stack(losses), **state}


def whole(results: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Shards put together, losses summed; the encoder must be the same everywhere."""
    for other in results[1:]:
        for name in other:
            if name.startswith("encoder"):
                assert torch.equal(other[name], results[0][name]), name
    return {
        **results[0],
        "weight": torch.cat([r["weight"] for r in results]),
        "loss": torch.stack([r["loss"] for r in results]).sum(0),
    }


def difference(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Largest relative error (by norm) of any tensor."""
    return max(
        float((found[name].double() - tensor).norm() / tensor.norm())
        for name, tensor in wanted.items()
    )


Trajectory = dict[str, torch.Tensor]


def variants(ranks: Ranks) -> dict[str, Trajectory]:
    """Everything that is asked of one world size, in one start of its processes."""
    return {
        "fp32": distributed(ranks, "fp32"),
        "bf16_split": distributed(ranks, "bf16_split"),
        "mean": distributed(ranks, "fp32", "mean"),
        "poisoned": distributed(ranks, "fp32", poisoned=4),
        "beyond_fp16": distributed(ranks, "fp16", poisoned=4, poison=1e8),
        "poisoned_backward": distributed(ranks, "fp32", poisoned_backward=4),
        "micro_batches_backward": distributed(
            ranks, "fp32", poisoned_backward=4, micro_batch=2, sparse=True
        ),
        "overflow": distributed(ranks, "fp32", loss_scale=LossScale(2.0**130, dynamic=True)),
        "sparse": distributed(ranks, "fp32", sparse=True, micro_batch=2),
        "sparse_mean": distributed(ranks, "fp32", "mean", sparse=True),
        "sparse_poisoned": distributed(ranks, "fp32", poisoned=4, sparse=True),
        "micro_batches": distributed(ranks, "fp32", micro_batch=2),
        "micro_batches_mean": distributed(ranks, "fp32", "mean", micro_batch=1),
        "micro_batches_poisoned": distributed(ranks, "fp32", poisoned=4, micro_batch=1),
    }


@pytest.fixture(scope="module")
def runs() -> dict[int, list[dict[str, Trajectory]]]:
    return {num_ranks: on_ranks(num_ranks, variants) for num_ranks in WORLD_SIZES}


Runs = dict[int, list[dict[str, Trajectory]]]


def of(runs: Runs, num_ranks: int, variant: str) -> Trajectory:
    return whole([result[variant] for result in runs[num_ranks]])


@pytest.mark.parametrize("num_ranks", WORLD_SIZES)
def test_fp32_equals_float64_autograd(runs: Runs, num_ranks: int) -> None:
    assert difference(of(runs, num_ranks, "fp32"), oracle()) < 1e-5


@pytest.mark.parametrize("num_ranks", WORLD_SIZES)
def test_bf16_split_equals_it_to_the_rounding_of_the_operands(runs: Runs, num_ranks: int) -> None:
    # Operands and products carry 8 bits; twenty steps of SGD and AdamW add their errors up.
    assert 1e-5 < difference(of(runs, num_ranks, "bf16_split"), oracle()) < 4 * 2**-8


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_world_sizes_agree(runs: Runs, num_ranks: int) -> None:
    one = {name: t.double() for name, t in of(runs, 1, "fp32").items() if "skipped" not in name}
    assert difference(of(runs, num_ranks, "fp32"), one) < 1e-5


def test_the_mean_of_gradients_is_another_trajectory(runs: Runs) -> None:
    """The tolerance can fail: the reference's mean over workers is far outside it."""
    assert difference(of(runs, 2, "mean"), oracle()) > 1e-3


@pytest.mark.parametrize("num_ranks", WORLD_SIZES)
def test_micro_batches_change_nothing(runs: Runs, num_ranks: int) -> None:
    """Three ranks have 1, 1 and 2 of them, in the last step one has no row at all."""
    assert difference(of(runs, num_ranks, "micro_batches"), oracle()) < 1e-5
    mean = {n: t.double() for n, t in of(runs, num_ranks, "mean").items() if "skipped" not in n}
    assert difference(of(runs, num_ranks, "micro_batches_mean"), mean) < 1e-5


@pytest.mark.parametrize("num_ranks", WORLD_SIZES)
def test_a_sparse_gradient_of_the_token_vectors_is_the_dense_one(
    runs: Runs, num_ranks: int
) -> None:
    assert difference(of(runs, num_ranks, "sparse"), oracle()) < 1e-5
    mean = {n: t.double() for n, t in of(runs, num_ranks, "mean").items() if "skipped" not in n}
    assert difference(of(runs, num_ranks, "sparse_mean"), mean) < 1e-5


@pytest.mark.parametrize("variant", ["poisoned", "micro_batches_poisoned", "sparse_poisoned"])
@pytest.mark.parametrize("num_ranks", WORLD_SIZES)
def test_a_step_with_embeddings_that_are_not_finite_is_skipped_by_all(
    runs: Runs, num_ranks: int, variant: str
) -> None:
    assert [r[variant]["skipped"].tolist() for r in runs[num_ranks]] == [[4]] * num_ranks
    found = of(runs, num_ranks, variant)
    found["loss"] = found["loss"][torch.arange(STEPS) != 4]
    assert difference(found, oracle(without=[4])) < 1e-5


@pytest.mark.parametrize("num_ranks", WORLD_SIZES)
def test_so_is_one_whose_embeddings_fp16_cannot_hold(runs: Runs, num_ranks: int) -> None:
    """They are finite fp32 numbers, and so is dE; the weights would not be."""
    results = [result["beyond_fp16"] for result in runs[num_ranks]]
    assert [result["skipped"].tolist() for result in results] == [[4]] * num_ranks
    found = of(runs, num_ranks, "beyond_fp16")
    found["loss"] = found["loss"][torch.arange(STEPS) != 4]
    assert difference(found, oracle(without=[4])) < 4 * 2**-8


@pytest.mark.parametrize("variant", ["poisoned_backward", "micro_batches_backward"])
@pytest.mark.parametrize("num_ranks", WORLD_SIZES)
def test_a_gradient_that_is_not_finite_on_one_rank_leaves_the_update_of_the_classifier(
    runs: Runs, num_ranks: int, variant: str
) -> None:
    """No rank updates its encoder, and every shard is as if the gradient had been finite."""
    results = [result[variant] for result in runs[num_ranks]]
    assert [result["skipped"].tolist() for result in results] == [[4]] * num_ranks
    found = of(runs, num_ranks, variant)
    assert difference(found, oracle(classifier_alone=[4])) < 1e-5
    assert difference(found, oracle()) > 1e-3
    without = oracle(without=[4])
    assert difference({**found, "loss": without["loss"]}, without) > 1e-3


@pytest.mark.parametrize("num_ranks", WORLD_SIZES)
def test_a_loss_scale_that_overflows_is_halved_until_it_fits(runs: Runs, num_ranks: int) -> None:
    """Until then the classifier alone is updated; afterwards the scale changes nothing."""
    found = of(runs, num_ranks, "overflow")
    skipped = found["skipped"].tolist()
    assert 2 <= len(skipped) < STEPS - 5
    assert difference(found, oracle(classifier_alone=skipped)) < 1e-5
