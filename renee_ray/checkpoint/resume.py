"""Going on from the newest checkpoint that every rank can read."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from renee_ray.checkpoint.registry import Checkpoints
from renee_ray.checkpoint.state import Checkpoint, CheckpointError
from renee_ray.model.model import Model
from renee_ray.parallel.collectives import Ranks, all_sum, broadcast_bytes

log = logging.getLogger(__name__)


def resume(
    checkpoints: Checkpoints, ranks: Ranks, build: Callable[[Checkpoint | None], Model]
) -> tuple[Model, Checkpoint | None, dict[str, Tensor]]:
    """(model, the checkpoint that it was loaded from or None, the optimizer's moments).

    One that some rank finds damaged is left out by all, and the one before it taken.

    Args:
        build: makes the model that a checkpoint is of, or a new one.

    Raises:
        CheckpointError: on all ranks; there are checkpoints, and none can be read.
    """
    damaged: set[str] = set()
    while True:
        checkpoint = _chosen(checkpoints, ranks, damaged)
        model = build(checkpoint)
        if checkpoint is None:
            return model, None, {}
        moments: dict[str, Tensor] = {}
        problem = None
        try:
            checkpoint.load_encoder(model.encoder)
            checkpoint.load_shard(model.shard)
            moments = checkpoint.moments()
        except CheckpointError as error:
            problem = str(error)
            log.warning("rank %d: %s", ranks.rank, problem)
        if not bool(all_sum(ranks, torch.tensor(int(problem is not None)))):
            return model, checkpoint, moments
        damaged.add(checkpoint.name)
        # There may be no memory for two models, and the error's frames refer to this one in cycles.
        del model, moments
        gc.collect()


def _chosen(checkpoints: Checkpoints, ranks: Ranks, damaged: set[str]) -> Checkpoint | None:
    """Rank 0 chooses for all: to another, a remote directory may look older."""
    name, problem = "", ""
    if ranks.rank == 0:
        try:
            found = checkpoints.newest(but=damaged)
            name = found.name if found else ""
            if damaged and not name:
                problem = f"{checkpoints.run} has no checkpoint that can be read; see the warnings"
        except CheckpointError as error:
            problem = str(error)
    told = json.loads(broadcast_bytes(ranks, json.dumps([name, problem]).encode()))
    if told[1]:
        raise CheckpointError(told[1])
    if not told[0]:
        return None
    try:
        return checkpoints.at(told[0])
    except CheckpointError as error:
        if ranks.rank == 0:
            raise
        # Not a user's error, which would be final: another attempt finds it.
        raise OSError(f"{told[0]} is not there yet for rank {ranks.rank}: {error}") from error
