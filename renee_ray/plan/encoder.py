"""What a transformer takes, by its own code, which runs without data: what it keeps is counted."""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Hashable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from renee_ray.config.recipes import EncoderShape
from renee_ray.config.schema import NO_TRANSFORMER, EncoderConfig
from renee_ray.data.models import resolve_model
from renee_ray.errors import SHOWN, ReneeError, reason
from renee_ray.model.adapters import add_adapters
from renee_ray.model.dropout import draw_fast
from renee_ray.model.encoder import described, dropout_keys

log = logging.getLogger(__name__)

COUNTED_ROWS = 4, 12
"""Rows that are counted: what is kept is linear in them, weights in a narrow dtype being fixed."""


@dataclass(frozen=True)
class Transformer:
    """parameters: all of them; multiplied: those that every token is multiplied with.

    adapters: parameters of LoRA's adapters, which are not among the former.
    table: rows and columns of the token vectors, the largest embedding.
    settings: the model's own configuration; None: there is no transformer.
    """

    parameters: int = 0
    multiplied: int = 0
    hidden: int = 0
    layers: int = 0
    settings: Any = None
    adapters: int = 0
    table: tuple[int, int] = 0, 0

    def activations(
        self, rows: int, tokens: int, attention: str, autocast: torch.dtype | None, kind: str,
        layered: bool,
    ) -> int:  # fmt: skip
        """Returns the bytes that a forward keeps for its backward, for [rows, tokens] tokens.

        kind: of the device, cpu or cuda.
        layered: with gradient checkpointing, which keeps the inputs of layers, and one layer's all.
        """
        if self.settings is None or not rows:
            return 0
        text = self.settings.to_json_string(use_diff=False)
        model = cast(Hashable, type(self.settings))
        few, many = _counted(text, model, tokens, attention, autocast, kind)
        each = (many - few) / (COUNTED_ROWS[1] - COUNTED_ROWS[0])
        kept = int(few + (rows - COUNTED_ROWS[0]) * each)
        if not layered:
            return kept
        return kept // max(1, self.layers) + 4 * rows * tokens * self.hidden * self.layers


def find_transformer(config: EncoderConfig, shape: EncoderShape | None) -> Transformer:
    """Describes the encoder by its config.json where that is at hand, else by a recipe's shape.

    Raises:
        ReneeError: it is not at hand, and no recipe has its shape.
    """
    if config.name == NO_TRANSFORMER:
        return Transformer()
    try:
        settings = described(resolve_model(config.name, fetch=False), "eager")[0]
    except ReneeError:
        if shape is None:
            raise
        size = SimpleNamespace(
            vocab_size=shape.vocabulary, hidden_size=shape.hidden,
            num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        )  # fmt: skip
        settings = _bert(size, config.max_length)
    if config.internal_dropout is not None:
        for key in dropout_keys(settings):
            setattr(settings, key, config.internal_dropout)
    return _facts(settings, config)


def _bert(settings: Any, tokens: int) -> Any:
    """Returns the configuration of a BERT of another model's size."""
    from transformers import BertConfig  # seconds, as for every encoder

    hidden = settings.hidden_size
    return BertConfig(
        vocab_size=settings.vocab_size, hidden_size=hidden,
        num_hidden_layers=settings.num_hidden_layers,
        num_attention_heads=settings.num_attention_heads,
        intermediate_size=getattr(settings, "intermediate_size", 4 * hidden),
        max_position_embeddings=max(512, tokens),
    )  # fmt: skip


def _facts(settings: Any, config: EncoderConfig) -> Transformer:
    with torch.device("meta"):
        model = build(settings, "eager")
    tables = [
        (m.num_embeddings, m.embedding_dim) for m in model.modules() if isinstance(m, nn.Embedding)
    ]
    parameters, adapters = sum(p.numel() for p in model.parameters()), 0
    if config.lora.rank:
        adapted = add_adapters(model, config)
        adapters = sum(p.numel() for p in adapted.parameters()) - parameters
    return Transformer(
        parameters, parameters - sum(map(math.prod, tables)), settings.hidden_size,
        settings.num_hidden_layers, settings, adapters, max(tables, default=(0, 0)),
    )  # fmt: skip


def build(settings: Any, attention: str) -> Any:
    """Builds a model with random weights, as a run uses it."""
    from transformers import AutoModel

    model = AutoModel.from_config(settings, attn_implementation=attention, dtype=torch.float32)
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return model.train()


@functools.lru_cache(64)
def _counted(text: str, kind: type, tokens: int, *given: Any) -> tuple[int, int]:
    """Returns what `_kept` finds for each of COUNTED_ROWS, with a stand-in where it finds nothing.

    It is asked again and again for one plan, and a model that needs data is told of once.
    """
    try:
        few, many = (_kept(text, kind, rows, tokens, *given) for rows in COUNTED_ROWS)
    except _NeedsData as error:
        settings = kind.from_dict(json.loads(text))  # type: ignore[attr-defined]
        log.warning(
            "%s models do not run without data (%s): activations are counted as those of a "
            "BERT of the same size", settings.model_type, reason(error),
        )  # fmt: skip
        bert = _bert(settings, tokens)
        return _counted(
            bert.to_json_string(use_diff=False), cast(Hashable, type(bert)), tokens, *given
        )
    return few, many


class _NeedsData(Exception):
    """A model does not run without data."""


class _Masked(nn.Dropout):
    """Keeps what dropout on a GPU keeps: a byte for each number."""

    def forward(self, input: Tensor) -> Tensor:
        return input * torch.ones_like(input, dtype=torch.bool)


def _kept(
    text: str, kind: type, rows: int, tokens: int, attention: str, autocast: torch.dtype | None,
    device_type: str,
) -> int:  # fmt: skip
    """Sums the distinct tensors that a forward without memory keeps, parameters left out.

    Raises:
        _NeedsData: the forward fails without data.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        from transformers.initialization import no_init_weights
    except ImportError:  # transformers 4
        from transformers.modeling_utils import no_init_weights

    settings = kind.from_dict(json.loads(text))  # type: ignore[attr-defined]
    on_gpu, dropped = device_type == "cuda", False
    for key in dropout_keys(settings) if on_gpu else ():  # fused attention keeps no mask there
        dropped = dropped or bool(getattr(settings, key))
        setattr(settings, key, 0.0)
    seen: dict[int, tuple[int, Any]] = {}
    with FakeTensorMode():
        with no_init_weights():
            model = build(settings, attention)
        for parent in list(model.modules()) if dropped else ():
            for name, child in parent.named_children():
                if isinstance(child, nn.Dropout):
                    setattr(parent, name, _Masked(0.0))
        if not on_gpu:
            draw_fast(model)
        own = {p.untyped_storage()._cdata for p in model.parameters()}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                seen[storage._cdata] = storage.nbytes(), storage  # held, so that no id is reused
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", autocast, enabled=autocast is not None),
        ):
            try:
                model(input_ids=torch.zeros(rows, tokens, dtype=torch.int64), attention_mask=None)
            except Exception as error:  # the model's own code may look at numbers, for one
                raise _NeedsData(f"{reason(error):.{SHOWN}}") from error
    return sum(size for size, _ in seen.values())
