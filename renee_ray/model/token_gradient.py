"""The gradient of the token vectors, the largest matrix of a small encoder.

Ledger, for V tokens of width H, of which the rows of rank r contain v_r different ones:

    grad     sparse [V, H] on each rank   after the backward: own rows' tokens, repeated
    rows     [v_r, H] with ids [v_r]      own rows' tokens, each once
    dense    [V, H] on each rank          zero but for the tokens of the global batch

    grad  --added up-->  rows  --gather_rows, added in rank order-->  dense

The host knows the ids from the batch, if these are what the vectors are looked up by. For an
encoder whose largest embedding is another, it asks the device, and waits.

A batch contains some hundred of V = 30,522 tokens; a dense gradient would be most of what DDP
sends. `dense` is allocated once, and only the rows that were written are cleared again.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from renee_ray.rank.collectives import Ranks, all_sum, gather_rows, row_counts
from renee_ray.xfc.device import upload


class TokenGradient:
    """Makes the gradient of an encoder's token vectors sparse, and sums it over the ranks.

    Args:
        encoder: its largest embedding is taken for that of the tokens.
        mean: whether to divide the sum by the number of ranks.
    """

    def __init__(self, encoder: nn.Module, ranks: Ranks, *, mean: bool = False) -> None:
        embeddings = [module for module in encoder.modules() if isinstance(module, nn.Embedding)]
        embedding = max(embeddings, key=lambda each: each.num_embeddings)
        # Where a sparse gradient leaves out the padding, it asks a GPU for the places of it.
        self._padding, embedding.padding_idx = embedding.padding_idx, None
        embedding.sparse = True
        self.weight, self._by_token = embedding.weight, False
        with contextlib.suppress(AttributeError, NotImplementedError):  # no model of transformers
            backbone: Any = encoder.backbone
            self._by_token = backbone.get_input_embeddings() is embedding
        prompt = getattr(encoder, "prompt", None)
        self._prompt = torch.zeros(0, dtype=torch.int64) if prompt is None else prompt.tokens.cpu()
        self._ranks, self._scale = ranks, 1 / ranks.num_ranks if mean else 1.0
        self._dense = torch.zeros_like(self.weight, requires_grad=False)
        self._written = torch.zeros(0, dtype=torch.int64, device=self.weight.device)

    def reduce(self, tokens: Tensor) -> None:
        """Replaces the weight's sparse gradient by the dense one of the global batch.

        tokens: int64 [v_r], in host memory: the ids of own rows' tokens, ascending, each once.
        """
        assert self.weight.grad is not None
        found, values = self.weight.grad._indices()[0], self.weight.grad._values()
        if len(self._prompt):
            tokens = torch.cat([tokens, self._prompt]).unique()
        ids = upload(tokens, self.weight.device) if self._by_token else found.unique()
        places = torch.searchsorted(ids, found)
        # The backward of dense vectors: unlike `index_add_` it adds in the same order on a GPU.
        rows = torch.ops.aten.embedding_dense_backward(values, places, len(ids), -1, False)
        self._dense.index_fill_(0, self._written, 0.0)
        self._written = self._add(ids, rows * self._scale)
        if self._padding is not None:
            self._dense[self._padding] = 0.0
        self.weight.grad = self._dense

    def _add(self, ids: Tensor, rows: Tensor) -> Tensor:
        """Adds the rows of all ranks to `dense`; returns the ids of the rows written."""
        counts = row_counts(self._ranks, len(ids))
        if self._ranks.num_ranks * max(counts) > len(self._dense):
            # A ring all-reduce sends 2 V rows, the gather R times the rows of the fullest rank.
            self._dense.index_copy_(0, ids, rows)
            all_sum(self._ranks, self._dense)
            return torch.arange(len(self._dense), device=ids.device)
        everyone = gather_rows(self._ranks, rows, counts)
        all_ids = gather_rows(self._ranks, ids[:, None], counts)[:, 0]
        for of_rank, its_rows in zip(all_ids.split(counts), everyone.split(counts), strict=True):
            self._dense.index_add_(0, of_rank, its_rows)
        return all_ids
