"""Resumes from the newest checkpoint that every rank can read."""

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
from renee_ray.rank.collectives import Ranks, all_sum, gather_bytes

log = logging.getLogger(__name__)


def resume(
    checkpoints: Checkpoints, ranks: Ranks, build: Callable[[Checkpoint | None], Model]
) -> tuple[Model, Checkpoint | None, dict[str, Tensor]]:
    """Returns (model, the checkpoint that it was loaded from or None, the optimizer's moments
    and averages).

    All ranks leave out a checkpoint that some rank finds damaged, and take the one before it.

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
        # There may be no memory for two models, and the error's traceback refers to this one.
        del model, moments
        gc.collect()


def _chosen(checkpoints: Checkpoints, ranks: Ranks, damaged: set[str]) -> Checkpoint | None:
    """Lets rank 0 choose for all, since a remote directory may look older to another rank."""
    name, problem = "", ""
    if ranks.rank == 0:
        try:
            found = checkpoints.newest(but=damaged)
            name = found.name if found else ""
            if damaged and not name:
                problem = f"{checkpoints.run} has no checkpoint that can be read; see the warnings"
        except CheckpointError as error:
            problem = str(error)
    name, problem = json.loads(gather_bytes(ranks, json.dumps([name, problem]).encode())[0])
    if problem:
        raise CheckpointError(problem)
    if not name:
        return None
    try:
        return checkpoints.at(name)
    except CheckpointError as error:
        if ranks.rank == 0:
            raise
        # Not a user's error, which would be final: another attempt finds it.
        raise OSError(f"{name} is not there yet for rank {ranks.rank}: {error}") from None
