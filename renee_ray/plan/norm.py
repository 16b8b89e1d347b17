"""Settings by themselves, any transformer: embeddings get the norm that recipes are made for.

The gradient of a classifier's row is a sum of embeddings, so that a learning rate fits embeddings
of one norm only, and so does the share of a bag beside a transformer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from renee_ray.config.schema import NO_TRANSFORMER, BagConfig, EncoderConfig
from renee_ray.data.dataset import Dataset
from renee_ray.data.models import resolve_model
from renee_ray.rank.batch import ragged

MADE_FOR, NORM = "sentence-transformers/all-MiniLM-L6-v2", 5.0
"""The transformer of the recipes, and the mean norm of its embeddings."""
CLOSE = 1.25
"""Factor by which a norm may differ from it."""
TEXTS = 128
LARGEST = 1_000_000_000
"""Weights of a model that is loaded where `train` is typed."""


def fitted_norm(config: EncoderConfig, dataset: Dataset) -> Iterator[tuple[str, Any, str]]:
    """Yields (key, value, reason) of what gives embeddings the norm `NORM`, if they have another.

    config: the encoder as it would be trained.
    """
    if config.name in (NO_TRANSFORMER, MADE_FOR) or config.normalise or config.scale != 1:
        return
    norm = mean_norm(config, dataset)
    if norm is None:
        yield "encoder.scale", 1.0, f"a model of over {LARGEST:,} weights is not measured"
    elif norm > 0 and not NORM / CLOSE < norm < NORM * CLOSE:
        why = f"its embeddings have the norm {norm:.3g}, and the recipe's {NORM:.3g}"
        yield "encoder.scale", float(f"{NORM / norm:.3g}"), why
        if config.bag.dim:
            yield "encoder.bag.norm", float(f"{norm:.3g}"), "as the transformer's columns, before"


def mean_norm(config: EncoderConfig, dataset: Dataset) -> float | None:
    """Returns the mean norm of the transformer's embeddings of the first training points.

    None: it has more than `LARGEST` weights.

    Raises:
        ReneeError: it cannot be loaded.
    """
    # The imports take seconds, which most commands need not wait for.
    from renee_ray.model.encoder import build_encoder, described
    from renee_ray.model.initialise import embed_texts

    model = described(resolve_model(config.name), "eager")[1]
    if sum(each.numel() for each in model.parameters()) > LARGEST:
        return None
    alone = config.model_copy(update={"bag": BagConfig(dim=0), "compile": False})
    encoder = build_encoder(alone, torch.device("cpu"), seed=0).eval()
    manifest = dataset.manifest
    texts = min(TEXTS, manifest.num_points("train"))
    tokens = ragged(dataset.read_rows("train", 0, texts, ["input_ids"])["input_ids"])
    with torch.inference_mode():
        rows = embed_texts(encoder, tokens, config.max_length, manifest.pad_id)
    return float(rows.norm(dim=1).mean())
