"""The encoder and the classifier's shard of one rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from renee_ray.config.schema import RunConfig
from renee_ray.model.encoder import Encoder, build_encoder
from renee_ray.model.remembered import Remembered
from renee_ray.rank.collectives import Ranks, all_max, gather_bytes
from renee_ray.xfc.device import choose_precision, native_narrow
from renee_ray.xfc.labels import LabelRange
from renee_ray.xfc.shard import Shard
from renee_ray.xfc.weights.storages import Weights


@dataclass(frozen=True)
class Model:
    """The encoder, a replica on every rank, and this rank's shard of the classifier."""

    encoder: Encoder
    shard: Shard


def build_model(
    config: RunConfig,
    num_labels: int,
    ranks: Ranks,
    device: torch.device,
    *,
    precision: str | None = None,
) -> Model:
    """Builds the encoder and an all-zero shard.

    precision: that of a checkpoint to be loaded, where the configuration says `auto`.
    """
    encoder = build_encoder(config.encoder, device, config.seed)
    # One loss scale is for all ranks: where the GPU of any needs fp16, all take it.
    needs_fp16 = torch.tensor(int(encoder.autocast == torch.float16))
    if all_max(ranks, needs_fp16):
        encoder.autocast = torch.float16
    if config.encoder.frozen:
        encoder.remembered = Remembered(encoder.pooled)
    owned = LabelRange.of_rank(num_labels, ranks.num_ranks, ranks.rank)
    momentum = config.classifier.momentum > 0
    # All ranks use rank 0's choice, whatever devices they have: a checkpoint has one precision.
    chosen = precision or choose_precision(config.classifier.precision, *native_narrow(device))
    precision = gather_bytes(ranks, chosen.encode())[0].decode()
    averaged = config.average > 0
    weights = Weights(precision, len(owned), encoder.dim, momentum, device, averaged=averaged)
    return Model(encoder, Shard(owned, weights, config.classifier.chunk))
