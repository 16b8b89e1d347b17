"""The summed gradient of the token vectors against the dense sum in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from renee_ray.model.token_gradient import TokenGradient
from renee_ray.rank.collectives import Ranks
from tests.devices import DEVICES
from tests.training.gloo import on_ranks

TOKENS, WIDTH, STEPS, PADDING = 50, 3, 4, 7


def ids_of(step: int, rank: int, few: bool) -> torch.Tensor:
    """Repeated tokens, others in each step; rank 1 has none in the last."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    rows = 0 if rank == 1 and step == STEPS - 1 else 6 if few else 80
    return torch.randint(0, TOKENS, (rows,), generator=generator)


def upstream(step: int, rank: int, few: bool) -> torch.Tensor:
    rows = len(ids_of(step, rank, few))
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(step - 3 * rank + 9))


class Model(nn.ModuleList):
    """A model of transformers, as far as it says which vectors are those of the tokens."""

    def get_input_embeddings(self) -> nn.Module:
        return self[1]


def gradients(
    ranks: Ranks, few: bool, mean: bool, device: str = "cpu", says: bool = True
) -> torch.Tensor:
    encoder = Model([nn.Embedding(8, WIDTH), nn.Embedding(TOKENS, WIDTH, padding_idx=PADDING)])
    encoder.to(device)
    whole = nn.ModuleDict({"backbone" if says else "other": encoder})
    tokens = TokenGradient(whole, ranks, mean=mean)
    found = []
    for step in range(STEPS):
        ids = ids_of(step, ranks.rank, few)
        encoder[1](ids.to(device)).backward(upstream(step, ranks.rank, few).to(device))
        tokens.reduce(torch.cat([ids, torch.tensor([PADDING, 3])]).unique())
        assert tokens.weight.grad is not None
        found.append(tokens.weight.grad.cpu().clone())
        encoder.zero_grad(set_to_none=True)
    return torch.stack(found)


def wanted(num_ranks: int, few: bool) -> torch.Tensor:
    dense = torch.zeros(STEPS, TOKENS, WIDTH, dtype=torch.float64)
    for step in range(STEPS):
        for rank in range(num_ranks):
            rows = upstream(step, rank, few).double()
            dense[step].index_add_(0, ids_of(step, rank, few), rows)
    dense[:, PADDING] = 0
    return dense


@pytest.mark.parametrize("few", [True, False], ids=["gathered", "summed dense"])
@pytest.mark.parametrize(("num_ranks", "mean"), [(1, False), (2, False), (3, True)])
@pytest.mark.parametrize("device", DEVICES)
def test_equals_the_dense_sum_in_every_step(
    device: str, num_ranks: int, mean: bool, few: bool
) -> None:
    """All ranks share one GPU, where there is one."""
    found = on_ranks(num_ranks, gradients, few, mean, device)
    expected = wanted(num_ranks, few) / (num_ranks if mean else 1)
    for each in found:
        assert torch.equal(each, found[0]), "replicas would drift apart"
        torch.testing.assert_close(each.double(), expected, rtol=1e-5, atol=1e-6)
    assert (expected[1] != expected[0]).any(), "what a step wrote has to be cleared"


@pytest.mark.parametrize("few", [True, False], ids=["gathered", "summed dense"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("says", [True, False])
def test_so_it_does_on_every_device(device: str, says: bool, few: bool) -> None:
    found = gradients(Ranks(), few, False, device, says)
    assert any(PADDING in ids_of(step, 0, few) for step in range(STEPS)) or few
    torch.testing.assert_close(found.double(), wanted(1, few), rtol=1e-5, atol=1e-6)
