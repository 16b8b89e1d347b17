"""Pieces of a trained run, read from one of its checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from renee_ray.checkpoint.state import Checkpoint
from renee_ray.config.schema import EncoderConfig
from renee_ray.data.dataset import Dataset
from renee_ray.model.encoder import Encoder, build_encoder
from renee_ray.scoring.index import Classifier
from renee_ray.scoring.scorer import prior_offset, read_counts
from renee_ray.xfc.labels import LabelRange
from renee_ray.xfc.shard import Shard
from renee_ray.xfc.weights.storages import Weights

CPU = torch.device("cpu")
TRAINED: dict[str, Any] = {"compile": False, "weights": ""}
"""Settings of an encoder that has all its weights: what it began with is not looked at."""


def trained_encoder(
    settings: EncoderConfig, checkpoint: Checkpoint, device: torch.device
) -> Encoder:
    """Builds the encoder of a run, with the weights of one of its checkpoints."""
    encoder = build_encoder(settings.model_copy(update=TRAINED), device, 0)
    checkpoint.load_encoder(encoder)
    return encoder


def trained_shard(
    checkpoint: Checkpoint, owned: LabelRange, device: torch.device, chunk: int = 0
) -> Shard:
    """Loads the rows of a range of labels, in the precision that they were trained in."""
    facts = checkpoint.state.facts
    weights = Weights(facts["precision"], len(owned), facts["dim"], False, device)
    shard = Shard(owned, weights, chunk)
    checkpoint.load_shard(shard)
    return shard


def trained_classifier(
    checkpoint: Checkpoint, labels: Dataset, owned: LabelRange, tail: float,
    hidden: np.ndarray | None, device: torch.device, chunk: int = 0,
) -> Classifier:  # fmt: skip
    """Loads a range of the labels of a dataset, with the adjustment of their scores.

    tail: tau of the logit adjustment; hidden: bool [L], labels that are not found, or None.
    """
    shard = trained_shard(checkpoint, owned, device, chunk)
    own = None if hidden is None else hidden[owned.start : owned.stop]
    return adjusted([shard], read_counts(labels, owned), tail, own)


def adjusted(
    shards: Sequence[Shard], counts: np.ndarray, tail: float, hidden: np.ndarray | None
) -> Classifier:
    """Joins shards without a gap; counts int64 [n] and hidden bool [n] are of all their labels."""
    first, device = shards[0].owned.start, shards[0].weights.device
    offset = prior_offset(counts, tail, device, hidden)
    ranges = (slice(each.owned.start - first, each.owned.stop - first) for each in shards)
    return Classifier(shards, [None if offset is None else offset[each] for each in ranges])
