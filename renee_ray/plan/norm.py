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
from renee_ray.data.models import quiet, resolve_model
from renee_ray.rank.batch import ragged

NORM = 5.0
"""Mean norm of embeddings in the recipes: of all-MiniLM-L6-v2, titles of some 20 tokens."""
CLOSE = 2.0
"""Factor by which a norm may differ from it: that of MiniLM is 7.3 for 5 tokens, 1.9 for 128."""
TEXTS = 32
LARGEST = 1_000_000_000
"""Weights of a model that is loaded where `train` is typed."""


def fitted_norm(config: EncoderConfig, dataset: Dataset) -> Iterator[tuple[str, Any, str]]:
    """Yields (key, value, reason) of what gives embeddings the norm `NORM`, if they have another.

    config: the encoder as it would be trained, whose `scale` is 1.

    Raises:
        ReneeError: the model cannot be loaded, or has too few positions.
    """
    if config.name == NO_TRANSFORMER:
        return
    norm = mean_norm(config, dataset)
    if norm is None:
        why = f"no model of over {LARGEST:,} weights is measured; set it to {NORM:.3g} / its norm"
        yield "encoder.scale", 1.0, why
        return
    why = f"so that embeddings have the norm {NORM:.3g}, as in the recipe"
    other = norm > 0 and not NORM / CLOSE < norm < NORM * CLOSE
    if config.normalise:  # all columns together
        yield "encoder.scale", round(NORM * 2**0.5, 2) if config.bag.dim else NORM, why
    elif other:
        yield "encoder.scale", float(f"{NORM / norm:.3g}"), why
    if other and config.bag.dim:
        yield "encoder.bag.norm", float(f"{norm:.3g}"), "that of the transformer's columns"


def mean_norm(config: EncoderConfig, dataset: Dataset) -> float | None:
    """Returns the mean norm of the transformer's embeddings of the first training points.

    None: it has more than `LARGEST` weights. Without points it is NaN.
    """
    # The imports take seconds, which most commands need not wait for.
    from renee_ray.model.encoder import build_encoder, check_positions, described
    from renee_ray.model.initialise import embed_texts

    quiet()
    manifest = dataset.manifest
    check_positions(config, manifest.max_length)
    model = described(resolve_model(config.name), "eager")[1]
    if sum(each.numel() for each in model.parameters()) > LARGEST:
        return None
    plain = {"bag": BagConfig(dim=0), "compile": False, "normalise": False}
    encoder = build_encoder(config.model_copy(update=plain), torch.device("cpu"), seed=0).eval()
    texts = min(TEXTS, manifest.num_points("train"))
    tokens = ragged(dataset.read_rows("train", 0, texts, ["input_ids"])["input_ids"])
    with torch.inference_mode():
        rows = embed_texts(encoder, tokens, config.max_length, manifest.pad_id)
    return float(rows.norm(dim=1).mean())
