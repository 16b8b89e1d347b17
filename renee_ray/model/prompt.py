"""A prompt: tokens put before every text that the transformer reads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from renee_ray.config.schema import EncoderConfig
from renee_ray.data.tokenizer import load, split_special
from renee_ray.errors import ReneeError

MIN_LENGTH = 4
"""Tokens of a text that a prompt must leave room for."""


class Prompt(nn.Module):
    """Inserts its P tokens behind the special tokens that a row begins with.

    A row t_1 .. t_n becomes t_1 .. t_first, prompt, t_(first + 1) .. t_n, after it was cut to
    `max_length` - P tokens, of which the last is t_n.

    tokens: int64 [P]; first: number of special tokens that a row begins with.

    Raises:
        ReneeError: the prompt has no tokens, or leaves no room for a text.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        tokens, self.first = split_special(load(config.name).serialised, config.prompt)
        self.limit = config.max_length - len(tokens)
        if not tokens or self.limit < MIN_LENGTH:
            raise ReneeError(
                f"encoder.prompt={config.prompt!r:.80} has {len(tokens)} tokens, and it needs one "
                f"at least and {MIN_LENGTH} fewer than encoder.max_length={config.max_length}; "
                f"change one of them"
            )
        self.tokens: Tensor
        self.register_buffer("tokens", torch.tensor(tokens), persistent=False)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """ids, mask: int64 [b, T], padded on the right -> the same with the prompt in each row."""
        if ids.shape[1] > self.limit:
            lengths = mask.sum(1, keepdim=True)
            columns = torch.arange(self.limit, device=ids.device).expand(len(ids), -1)
            last = (columns == self.limit - 1) & (lengths > self.limit)
            ids = ids.gather(1, torch.where(last, lengths - 1, columns))
            mask = mask[:, : self.limit]
        tokens, at = self.tokens.expand(len(ids), -1), self.first
        ids = torch.cat([ids[:, :at], tokens, ids[:, at:]], 1)
        if mask.stride(1) == 0:  # no row is padded: see `padded_tokens`
            return ids, mask[:, :1].expand(ids.shape)
        return ids, torch.cat([mask[:, :at], torch.ones_like(tokens), mask[:, at:]], 1)
