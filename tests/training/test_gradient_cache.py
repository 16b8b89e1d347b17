"""Micro-batches against one graph over all of them: gradients, dropout masks, live activations."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from renee_ray.config.schema import EncoderConfig
from renee_ray.model import encoder as encoder_module
from renee_ray.model.encoder import Encoder, build_encoder, data_parallel
from renee_ray.model.token_gradient import TokenGradient
from renee_ray.rank.batch import Batch, Position, Ragged, length_groups
from renee_ray.rank.collectives import Ranks
from renee_ray.training.gradient_cache import GradientCache
from tests.training.gloo import on_ranks

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    model = BertModel(
        BertConfig(
            vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=24, max_position_embeddings=16,
        )
    )  # fmt: skip
    path = str(tmp_path_factory.mktemp("bert"))
    model.save_pretrained(path)
    return path


def make(directory: str, dropout: float = 0.0, autocast: str = "off") -> Encoder:
    config = EncoderConfig(name=directory, internal_dropout=dropout, autocast=autocast)
    return build_encoder(config, CPU, seed=0).train()


def batch_of(rows: int) -> Batch:
    rng = np.random.default_rng(rows)
    tokens = [rng.integers(1, 30, rng.integers(2, 13)).tolist() for _ in range(rows)]
    nothing = Ragged.of_lists([[]] * rows)
    ids = Ragged.of_lists(tokens)
    return Batch(Position(), np.arange(rows), ids, nothing, nothing, pad_id=0)


def upstream(rows: int) -> torch.Tensor:
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(7))


def gradient_of(encoder: Encoder) -> torch.Tensor:
    found = torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None])
    encoder.zero_grad()
    return found


def cached(encoder: Encoder, batch: Batch, limit: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    cache = GradientCache(encoder, batch, limit, CPU)
    assert not cache.embeddings.requires_grad
    cache.backward(upstream(len(batch)))
    return cache.embeddings, gradient_of(encoder)


def one_graph(encoder: Encoder, batch: Batch, limit: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All micro-batches forward with their graphs, then one backward."""
    torch.manual_seed(3)
    groups = batch.micro_batches(limit)
    rows = torch.from_numpy(np.concatenate(groups))
    parts = [encoder(*batch.tokens(CPU, group)) for group in groups]
    embeddings = torch.cat(parts)[torch.argsort(rows)]
    embeddings.backward(upstream(len(batch)))
    return embeddings.detach(), gradient_of(encoder)


@pytest.mark.parametrize("autocast", ["off", "bf16"])
@pytest.mark.parametrize("limit", [0, 1, 3, 4, 11, 50])
def test_equals_one_graph_with_dropout_inside(directory: str, limit: int, autocast: str) -> None:
    encoder, batch = make(directory, 0.3, autocast), batch_of(11)
    found, wanted = cached(encoder, batch, limit), one_graph(encoder, batch, limit)
    assert torch.equal(found[0], wanted[0])
    # The order of summation over micro-batches differs, in the dtype of the backward.
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-4, atol=1e-5)


def test_other_masks_in_the_second_forward_would_be_seen(
    directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, batch = make(directory, 0.3), batch_of(11)
    wanted = one_graph(encoder, batch, 4)[1]
    monkeypatch.setattr(torch, "set_rng_state", lambda state: None)
    found = cached(encoder, batch, 4)[1]
    assert float((found - wanted).norm() / wanted.norm()) > 0.1


def test_equals_the_whole_batch_without_dropout(directory: str) -> None:
    encoder, batch = make(directory), batch_of(11)
    for found, wanted in zip(cached(encoder, batch, 4), cached(encoder, batch, 0), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_random_numbers_go_on_after_the_first_forwards(directory: str) -> None:
    """What is drawn after a step does not depend on the second forwards."""
    encoder, batch = make(directory, 0.3), batch_of(11)
    cached(encoder, batch, 4)
    after = torch.rand(3)
    one_graph(encoder, batch, 4)
    assert torch.equal(after, torch.rand(3))


SHARES = {1: [0, 11], 2: [0, 3, 11], 3: [0, 0, 5, 11]}
"""Rows before each rank's, for each number of ranks; one of them has none."""


def summed(ranks: Ranks, directory: str, limit: int, *, grouped: bool = True) -> list[Any]:
    """Returns own embeddings, the summed gradient of 11 rows, and the most forwards of a batch."""
    encoder_module.length_groups = partial(length_groups, cost=2)
    encoder, rows = make(directory), batch_of(11)
    encoder.grouped, calls = grouped, []
    encoder.backbone.register_forward_pre_hook(lambda *_: calls.append(1))
    own = slice(*SHARES[ranks.num_ranks][ranks.rank : ranks.rank + 2])
    ids = rows.input_ids.take(np.arange(11)[own])
    nothing = Ragged.of_lists([[]] * len(ids))
    batch = Batch(Position(), rows.points[own], ids, nothing, nothing, pad_id=0)
    tokens = TokenGradient(encoder, ranks)
    cache = GradientCache(data_parallel(encoder, ranks, "sum", tokens), batch, limit, CPU)
    cache.backward(upstream(11)[own])
    tokens.reduce(batch.distinct_tokens())
    return [cache.embeddings, gradient_of(encoder), len(calls)]


@pytest.mark.parametrize(("num_ranks", "limit"), [(1, 0), (1, 4), (2, 0), (2, 4), (3, 0), (3, 3)])
def test_groups_of_similar_length_change_nothing_on_any_number_of_ranks(
    directory: str, num_ranks: int, limit: int
) -> None:
    embeddings, gradient, forwards = summed(Ranks(), directory, 0, grouped=False)
    assert forwards == 1
    found = on_ranks(num_ranks, summed, directory, limit)
    parts = -(-max(np.diff(SHARES[num_ranks])) // limit) if limit else 1
    assert max(each[2] for each in found) > 2 * parts - 1, "rows were not grouped"
    torch.testing.assert_close(torch.cat([e for e, _, _ in found]), embeddings)
    for _, other, _ in found:
        torch.testing.assert_close(other, gradient, rtol=1e-4, atol=1e-5)


class Live:
    """Bytes saved for the backward at the same time, at most."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def pack(self, tensor: torch.Tensor) -> Any:
        live = self

        class Saved:
            def __init__(self) -> None:
                self.tensor = tensor
                self.size = tensor.numel() * tensor.element_size()
                live.now += self.size
                live.most = max(live.most, live.now)

            def __del__(self) -> None:
                live.now -= self.size

        return Saved()


def most_saved(encoder: Encoder, rows: int, limit: int) -> int:
    batch, live = batch_of(rows), Live()
    with torch.autograd.graph.saved_tensors_hooks(live.pack, lambda saved: saved.tensor):
        cached(encoder, batch, limit)
    assert live.now == 0
    return live.most


def test_memory_is_that_of_a_micro_batch(directory: str) -> None:
    encoder = make(directory, 0.3)
    small, large = most_saved(encoder, 8, 8), most_saved(encoder, 160, 8)
    assert large < 1.5 * small
    assert most_saved(encoder, 160, 0) > 10 * small


def test_micro_batches_are_padded_to_their_own_longest_row() -> None:
    batch = batch_of(40)
    groups = batch.micro_batches(16)
    assert [len(group) for group in groups] == [16, 16, 8]
    assert sorted(np.concatenate(groups)) == list(range(40))
    widths = [batch.tokens(CPU, group)[0].shape[1] for group in groups]
    assert widths == sorted(widths)
    cells = sum(len(g) * w for g, w in zip(groups, widths, strict=True))
    assert batch.padding(16) == (len(batch.input_ids.values), cells)
    assert cells < batch.padding()[1]
    for group in groups:
        ids, mask = batch.tokens(CPU, group)
        for row, tokens, length in zip(group, ids, mask.sum(1), strict=True):
            assert tokens[:length].tolist() == batch.input_ids.take(np.array([row])).values.tolist()
