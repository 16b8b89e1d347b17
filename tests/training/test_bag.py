"""A bag of n-grams against n-grams counted in Python and dense autograd in float64."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from renee_ray.checkpoint.registry import Checkpoints
from renee_ray.checkpoint.resume import resume
from renee_ray.checkpoint.state import State, set_moments
from renee_ray.checkpoint.writer import CheckpointWriter
from renee_ray.config.overrides import make_config
from renee_ray.config.schema import ClassifierConfig, RunConfig
from renee_ray.data.dataset import Dataset
from renee_ray.model.bag import BagOptimizer
from renee_ray.model.dropout import dropout_mask
from renee_ray.model.encoder import Encoder, adamw, build_encoder, data_parallel
from renee_ray.model.initialise import weigh_ngrams
from renee_ray.model.model import Model
from renee_ray.model.token_gradient import TokenGradient
from renee_ray.rank.batch import Batch, Position, Ragged, row_keys
from renee_ray.rank.collectives import Ranks
from renee_ray.rank.recorder import Recorder
from renee_ray.rank.rounds import Rounds
from renee_ray.training.loop import Trainer
from renee_ray.training.schedule import Schedule
from renee_ray.training.step import Step
from renee_ray.xfc.labels import LabelRange, split_range
from renee_ray.xfc.shard import Shard
from renee_ray.xfc.weights.storages import SGD, Weights
from tests.data.tiny import write_tiny
from tests.training.gloo import on_ranks

CPU = torch.device("cpu")
BUCKETS, DIM, LABELS, VOCABULARY, STEPS, BATCH, SEED = 61, 6, 11, 15, 12, 7, 3
NORM, RATE, CLIP = 2.0, 0.05, 6.0
RULE = SGD(lr=0.05, momentum=0.9, weight_decay=0.01)


def config_of(dropout: float = 0.3, decay: float = 1.0, **encoder: Any) -> RunConfig:
    bag = {"dim": DIM, "buckets": BUCKETS, "ngrams": 3, "norm": NORM, "dropout": dropout}
    settings = {"name": "none", "dropout": 0.2, "clip_norm": CLIP, **encoder}
    settings["bag"] = {**bag, "learning_rate": RATE, "decay": decay}
    return make_config(
        RunConfig, {"data": "d", "output": "o", "seed": SEED, "epochs": 1, "encoder": settings}
    )


def rows_of(number: int) -> tuple[list[list[int]], list[list[int]]]:
    """(tokens, labels) of a global batch; the last has so few rows that a rank has none."""
    rng = np.random.default_rng(number)
    rows = BATCH if number < STEPS - 1 else 2
    tokens = [rng.integers(1, VOCABULARY, rng.integers(1, 7)).tolist() for _ in range(rows)]
    return tokens, [rng.choice(LABELS, rng.integers(0, 4)).tolist() for _ in range(rows)]


def batch_of(ranks: Ranks, number: int) -> Batch:
    tokens, labels = rows_of(number)
    mine = slice(*split_range(len(tokens), ranks.num_ranks, ranks.rank))
    rows = np.arange(len(tokens))[mine]
    lists = (Ragged.of_lists(each) for each in (tokens[mine], labels[mine], [[]] * len(rows)))
    return Batch(Position(0, number), 100 * number + rows, *lists, pad_id=0)


def first_weights(dim: int = DIM) -> torch.Tensor:
    return torch.randn(LABELS, dim, generator=torch.Generator().manual_seed(2)) * 0.3


def shard_of(ranks: Ranks, dim: int = DIM) -> Shard:
    owned = LabelRange.of_rank(LABELS, ranks.num_ranks, ranks.rank)
    shard = Shard(owned, Weights("fp32", len(owned), dim, True, CPU), chunk=3)
    shard.write(owned.start, first_weights(dim)[owned.start : owned.stop])
    return shard


def weighed(encoder: Encoder, ranks: Ranks) -> Encoder:
    assert encoder.bag is not None
    points = [batch_of(ranks, number) for number in range(STEPS - 2)]  # some n-grams are new later
    encoder.bag.weigh(points, BATCH * len(points), Rounds(ranks, "n-grams"))
    return encoder


def trained(
    ranks: Ranks,
    micro_batch: int = 0,
    gradient: str = "sum",
    name: str = "none",
    decay: float = 1.0,
) -> dict[str, torch.Tensor]:
    config = config_of(
        name=name, autocast="off", learning_rate=1e-3, decay=decay, micro_batch=micro_batch
    )
    encoder = weighed(build_encoder(config.encoder, CPU, SEED), ranks)
    shard = shard_of(ranks, encoder.dim)
    tokens = None if name == "none" else TokenGradient(encoder, ranks, mean=gradient == "mean")
    assert encoder.bag is not None
    bag = BagOptimizer(encoder.bag, ranks, mean=gradient == "mean")
    bag.rate = RATE
    step = Step(
        config, data_parallel(encoder, ranks, gradient, tokens, bag=bag), shard,
        adamw(encoder, config.encoder), ranks, CPU, tokens=tokens, bag=bag,
    )  # fmt: skip
    for number in range(STEPS):
        batch = batch_of(ranks, number).for_training(
            SEED, token_dropout=0.0, filter_labels_positive=False, with_keys=True
        )
        assert not step(batch, number, RULE).skipped
    return {
        "weight": shard.weights.weight.read(0, len(shard.owned)).clone(),
        **{name: tensor.clone() for name, tensor in encoder.state_dict().items()},
    }


def signed(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63


def mix(value: int) -> int:
    value = signed((value ^ (value >> 32)) * 0x9E3779B97F4A7C15)
    value = signed((value ^ (value >> 29)) * -0x4B47D0C5A0F5A6D3)
    return value ^ (value >> 32)


def counted(tokens: list[int]) -> Counter[int]:
    """How often n-grams of each bucket stand in a row."""
    found: Counter[int] = Counter()
    for n in (1, 2, 3):
        for start in range(len(tokens) - n + 1):
            value = mix(tokens[start] + 1)
            for token in tokens[start + 1 : start + n]:
                value = mix(signed(3 * value + mix(token + 1)))
            found[value % BUCKETS] += 1
    return found


@cache
def idf() -> torch.Tensor:
    texts = [row for number in range(STEPS - 2) for row in rows_of(number)[0]]
    seen = Counter(bucket for row in texts for bucket in counted(row))
    found = [math.log(len(texts) / seen[b]) if seen[b] else 0.0 for b in range(BUCKETS)]
    return torch.tensor(found, dtype=torch.float64)


def features(number: int, dropout: float) -> torch.Tensor:
    """float64 [B, P]: the weight of each bucket in each row of a global batch."""
    tokens, _ = rows_of(number)
    points = 100 * number + np.arange(len(tokens))
    keys = row_keys(points, SEED, Position(0, number)).view(np.int64).tolist()
    weights = torch.zeros(len(tokens), BUCKETS, dtype=torch.float64)
    for row, (text, key) in enumerate(zip(tokens, keys, strict=True)):
        for bucket, times in counted(text).items():
            kept = mix(key ^ mix(bucket)) % 2**24 >= dropout * 2**24
            weights[row, bucket] = kept * idf()[bucket] * (1 + math.log(times))
    return NORM * weights / weights.norm(dim=1, keepdim=True).clamp(min=1e-12)


def oracle(dropout: float = 0.3, divisor: int = 1, decay: float = 1.0) -> dict[str, torch.Tensor]:
    """The same steps, dense; `divisor` of the encoder's gradient."""
    encoder = build_encoder(config_of().encoder, CPU, SEED)
    assert encoder.bag is not None
    table = encoder.bag.table.detach().double().requires_grad_()
    squares = torch.zeros(BUCKETS, dtype=torch.float64)
    weight = first_weights().double().requires_grad_()
    classifier = torch.optim.SGD(
        [weight], RULE.lr, momentum=RULE.momentum, weight_decay=RULE.weight_decay
    )
    for number in range(STEPS):
        target = torch.zeros(len(rows_of(number)[0]), LABELS, dtype=torch.float64)
        for row, positives in enumerate(rows_of(number)[1]):
            target[row, positives] = 1
        embedded = features(number, dropout) @ table
        embedded = embedded * dropout_mask(embedded, 0.2, SEED, number, 0)
        nn.functional.binary_cross_entropy_with_logits(
            embedded @ weight.T, target, reduction="sum"
        ).backward()
        assert table.grad is not None
        table.grad /= divisor
        nn.utils.clip_grad_norm_([table], CLIP)
        with torch.no_grad():
            new = table.grad.square().mean(1)
            squares = torch.where(new > 0, decay * squares, squares) + new
            table -= RATE * table.grad / squares.sqrt().clamp(min=1e-30)[:, None]
        classifier.step()
        classifier.zero_grad()
        table.grad = None
    return {"weight": weight.detach(), "bag.table": table.detach(), "bag.squares": squares,
            "bag.idf": idf(), "constant": torch.zeros(DIM, dtype=torch.float64)}  # fmt: skip


def difference(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    assert found.keys() == wanted.keys()
    norms = [(found[k].double() - wanted[k]).norm() / (wanted[k].norm() + 1e-9) for k in wanted]
    return float(max(norms))


@pytest.mark.parametrize(
    ("num_ranks", "micro_batch", "gradient", "decay"),
    [(1, 0, "sum", 1.0), (1, 3, "sum", 0.7), (2, 2, "sum", 1.0), (3, 0, "sum", 0.7),
     (3, 2, "mean", 1.0)],
)  # fmt: skip
def test_any_number_of_ranks_makes_the_dense_steps(
    num_ranks: int, micro_batch: int, gradient: str, decay: float
) -> None:
    arguments = micro_batch, gradient, "none", decay
    alone = num_ranks == 1
    found = [trained(Ranks(), *arguments)] if alone else on_ranks(num_ranks, trained, *arguments)
    for each in found[1:]:
        for name in each.keys() - {"weight"}:
            assert torch.equal(each[name], found[0][name]), "replicas would drift apart"
    whole = {**found[0], "weight": torch.cat([each["weight"] for each in found])}
    divisor = num_ranks if gradient == "mean" else 1
    assert difference(whole, oracle(divisor=divisor, decay=decay)) < 2e-5
    assert difference(whole, oracle(divisor=divisor, decay=1.7 - decay)) > 1e-2
    assert difference(whole, oracle(dropout=0.0)) > 1e-2


def test_beside_a_transformer_the_ranks_make_no_difference(tmp_path: Path) -> None:
    """The transformer's gradient travels by DDP, the token vectors' and the bag's do not."""
    name = str(tmp_path)
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=VOCABULARY, num_attention_heads=2, **size))
    model.save_pretrained(name)
    wanted = {key: value.double() for key, value in trained(Ranks(), name=name).items()}
    found = on_ranks(2, trained, 2, "sum", name)
    whole = {**found[0], "weight": torch.cat([each["weight"] for each in found])}
    for each in (whole, wanted):  # a softmax ignores it: AdamW makes steps of its rounding errors
        del each["backbone.encoder.layer.0.attention.self.key.bias"]
    assert difference(whole, wanted) < 1e-3, {
        key: difference({key: whole[key]}, {key: wanted[key]}) for key in wanted
    }
    assert torch.equal(found[1]["bag.table"], found[0]["bag.table"])


def test_scoring_drops_nothing_and_padding_changes_nothing() -> None:
    encoder = weighed(build_encoder(config_of().encoder, CPU, SEED), Ranks())
    assert encoder.bag is not None
    for number in (0, STEPS - 2):  # one with n-grams that no training point has
        wanted = features(number, 0.0) @ encoder.bag.table.detach().double()
        found = encoder(*batch_of(Ranks(), number).tokens(CPU)).double()
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_the_columns_follow_those_of_the_transformer() -> None:
    name = "sentence-transformers/all-MiniLM-L6-v2"
    settings = config_of(name=name, autocast="off").encoder
    encoder = weighed(build_encoder(settings, CPU, SEED), Ranks()).eval()
    assert encoder.bag is not None and encoder.backbone is not None
    ids, mask = batch_of(Ranks(), 0).tokens(CPU)
    with torch.inference_mode():
        hidden = encoder.backbone(ids, mask)[0] * mask[:, :, None]
        pooled = hidden.sum(1) / mask.sum(1, keepdim=True)
        wanted = torch.cat([pooled, encoder.bag(ids, mask)], 1)
        torch.testing.assert_close(encoder(ids, mask), wanted, rtol=1e-4, atol=1e-5)


def trainer_of(run: Path, steps: int, at: int) -> tuple[Trainer, CheckpointWriter]:
    """A trainer, resumed where `run` has a checkpoint; it writes one after `at` steps."""
    config = config_of()

    def build(checkpoint: object) -> Model:
        return Model(build_encoder(config.encoder, CPU, SEED), shard_of(Ranks()))

    model, checkpoint, moments = resume(Checkpoints(str(run)), Ranks(), build)
    state = checkpoint.state if checkpoint else State()
    writer = CheckpointWriter(Checkpoints(str(run)), Ranks(), 2, "P@1").start()
    trainer = Trainer(
        config, model, Ranks(), CPU, Schedule((steps,), 0, at), None, lambda record: None,
        lambda metrics: writer.save(state, model.encoder, trainer.optimizer, model.shard, {}),
        state,
    )  # fmt: skip
    if checkpoint:
        set_moments(model.encoder, trainer.optimizer, moments)
    else:
        weighed(model.encoder, Ranks())
    return trainer, writer


def batches(trainer: Trainer) -> Iterator[Batch]:
    return (batch_of(Ranks(), number) for number in range(trainer.state.position.batch, 99))


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, writer = trainer_of(tmp_path / "whole", 6, 0)
    whole.run(batches(whole))
    assert writer.wait()
    first, writer = trainer_of(tmp_path / "cut", 6, 3)
    source = batches(first)
    first.wish = lambda: 3 if first.state.step == 2 else 0
    first.run(source)
    assert writer.wait() and first.state.step == 3
    second, writer = trainer_of(tmp_path / "cut", 6, 0)
    assert second.state.step == 3
    second.run(batches(second))
    assert writer.wait()
    for name, tensor in whole.model.encoder.state_dict().items():
        assert torch.equal(second.model.encoder.state_dict()[name], tensor), name
    for name, tensor in whole.model.shard.weights.tensors().items():
        assert torch.equal(second.model.shard.weights.tensors()[name], tensor), name
    early, late = (each.model.encoder.state_dict()["bag.table"] for each in (first, whole))
    assert not torch.equal(early, late)


def weighed_twice(ranks: Ranks) -> list[torch.Tensor]:
    """idf of some points, what others make of it, and that of the others alone."""
    found, before = [], build_encoder(config_of().encoder, CPU, SEED).bag
    alone = build_encoder(config_of().encoder, CPU, SEED).bag
    assert before is not None and alone is not None
    for bag, numbers in (before, range(1)), (before, range(2, STEPS)), (alone, range(2, STEPS)):
        points = [batch_of(ranks, number) for number in numbers]
        bag.weigh(points, BATCH * len(points), Rounds(ranks, "n-grams"))
        found.append(bag.idf.clone())
    return found


def test_other_points_weigh_only_the_ngrams_without_a_weight() -> None:
    (before, after, alone), *_ = whole = [weighed_twice(Ranks()), *on_ranks(2, weighed_twice)]
    known = before > 0
    assert torch.equal(after[known], before[known]) and torch.equal(after[~known], alone[~known])
    assert (after > before).sum() > 3 and not torch.equal(alone[known], before[known])
    for each in whole[1:]:
        assert all(map(torch.equal, each, whole[0])), "replicas would drift apart"


def weighed_by(ranks: Ranks, path: str, used: bool) -> torch.Tensor:
    """idf as a run's start makes it."""
    dataset, config = Dataset.open(path), config_of(max_length=6)
    classifier = {"init": "label_text" if used else "normal"}
    config = config.model_copy(update={"classifier": ClassifierConfig.model_validate(classifier)})
    owned = LabelRange.of_rank(dataset.manifest.num_labels, ranks.num_ranks, ranks.rank)
    encoder = build_encoder(config.encoder, CPU, SEED)
    model = Model(encoder, Shard(owned, Weights("fp32", len(owned), DIM, False, CPU), chunk=3))
    points = [batch_of(ranks, 0)]
    weigh_ngrams(model, config, dataset, lambda: points, ranks, Recorder(), print)
    assert encoder.bag is not None
    return encoder.bag.idf.clone()


@pytest.mark.parametrize("used", [True, False])
def test_ngrams_of_label_texts_alone_weigh_as_those_of_one_point_if_these_are_used(
    tmp_path: Path, used: bool
) -> None:
    dataset = write_tiny(
        tmp_path / "set", train=(BATCH,), labels=(7, 4), vocabulary=200, empty=(3,)
    )
    bag = build_encoder(config_of().encoder, CPU, SEED).bag
    assert bag is not None

    def buckets(ids: list[int]) -> set[int]:
        row = torch.tensor([ids])
        return set(bag.ngrams(row, torch.ones_like(row))[1].tolist())

    texts = dataset.read_rows("labels", 0, 11, ["input_ids"])["input_ids"].to_pylist()
    assert buckets(texts.pop(3)) - set().union(*map(buckets, texts)), "an empty text does not count"
    assert any(len(ids) > 6 for ids in texts), "what is cut does not count"
    named = set().union(*(buckets(ids[:5] + ids[-1:] if len(ids) > 6 else ids) for ids in texts))
    rows = [buckets(ids) for ids in rows_of(0)[0]]
    wanted = torch.zeros(BUCKETS)
    for bucket in range(BUCKETS):
        seen = sum(bucket in row for row in rows) or (used and bucket in named)
        wanted[bucket] = math.log(BATCH / seen) if seen else 0
    assert len(named - set().union(*rows)) > 3
    path = dataset.path
    for found in (weighed_by(Ranks(), path, used), *on_ranks(3, weighed_by, path, used)):
        assert torch.allclose(found, wanted)


def test_a_gradient_whose_square_underflows_makes_no_step() -> None:
    bag = build_encoder(config_of().encoder, CPU, SEED).bag
    assert bag is not None
    optimizer, before = BagOptimizer(bag, Ranks()), bag.table.detach().clone()
    optimizer.rate = RATE
    gradient = torch.tensor([1e-30, 1e-3])[:, None].expand(2, DIM)
    bag.table.grad = torch.sparse_coo_tensor(
        torch.tensor([[3, 5]]), gradient, bag.table.shape, check_invariants=True
    )
    optimizer.reduce()
    optimizer.step(torch.tensor(0))
    moved = (bag.table.detach() - before).abs().amax(1)
    assert moved.nonzero().flatten().tolist() == [5] and moved[5] == pytest.approx(RATE, rel=1e-3)
