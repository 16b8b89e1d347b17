"""The calibration of a run's scores, in RUN/calibration.json, and how it is measured.

    checkpoint, tail, neighbours, neighbour_weight    what it was fitted for
    slope, intercept                                  as in scoring/calibration.py

It holds for the checkpoint and the settings that it was fitted with, and for no other.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from renee_ray.config.schema import EvalConfig
from renee_ray.rank.collectives import Ranks, gather_rows, row_counts
from renee_ray.scoring.calibration import BINS, TOP, Calibration, calibration_error
from renee_ray.scoring.metrics import find_hits
from renee_ray.scoring.scorer import Answer
from renee_ray.service.run.directory import RunDirectory

log = logging.getLogger(__name__)

CALIBRATION = "calibration.json"
ROWS = 1 << 20
"""Points of all ranks that are looked at, about: the first of each, as rows come at random."""


def facts(checkpoint: str, settings: EvalConfig) -> dict[str, Any]:
    """Returns what a calibration depends on."""
    used = ("tail", "neighbours", "neighbour_weight")[: 3 if settings.neighbours else 2]
    return {"checkpoint": checkpoint, **{key: getattr(settings, key) for key in used}}


def calibration_of(
    directory: RunDirectory, checkpoint: str, settings: EvalConfig
) -> Calibration | None:
    """Reads the calibration of a run; None where it has none of this checkpoint and settings."""
    content = directory.read(CALIBRATION)
    if content is None:
        return None
    if not facts(checkpoint, settings).items() <= content.items():
        log.warning(
            "%s/%s is of another checkpoint, adjustment or number of votes: it is not used",
            directory.path, CALIBRATION,
        )  # fmt: skip
        return None
    return Calibration.from_json(content, f"{directory.path}/{CALIBRATION}")


@dataclass(frozen=True)
class Seen:
    """Collects the TOP best labels of points that pass by: (score, is true, is held out) float32.

    Every second row of a split is held out, whichever rank it is on.
    """

    ranks: Ranks
    pairs: list[Tensor] = field(default_factory=list)

    def each(self, answers: Iterable[Answer]) -> Iterator[Answer]:
        """Yields the answers."""
        left = ROWS // self.ranks.num_ranks
        for answer in answers:
            batch, labels = answer.batch, answer.labels[:, :TOP].numpy()
            if left > 0:
                assert batch.rows is not None
                hit = find_hits(labels, batch.labels)[0]
                odd = np.broadcast_to(batch.rows[:, None] % 2, labels.shape)
                found = np.stack([answer.scores[:, :TOP].numpy(), hit, odd], -1)[labels >= 0]
                self.pairs.append(torch.from_numpy(found.astype(np.float32)))
            left -= len(labels)
            yield answer

    def gathered(self, device: torch.device) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns scores float64, true float64 and held out bool [n] of all ranks."""
        own = torch.cat([torch.zeros(0, 3), *self.pairs]).to(device)
        scores, true, odd = gather_rows(self.ranks, own, row_counts(self.ranks, len(own))).T.cpu()
        return scores.double().numpy(), true.double().numpy(), odd.numpy() > 0


def measured(
    seen: tuple[np.ndarray, np.ndarray, np.ndarray], fit: bool, known: Calibration | None
) -> tuple[dict[str, Any], Calibration | None]:
    """Measures the calibration error of sigmoids, and of a calibration that is known or fitted.

    What is fitted, on one half of the rows, is measured on the other.

    Returns:
        (facts to show, what was fitted)

    Raises:
        ReneeError: as `Calibration.fit`.
    """
    scores, true, held_out = seen
    fitted = None
    if fit:
        known = fitted = Calibration.fit(scores[~held_out], true[~held_out])
        scores, true = scores[held_out], true[held_out]
    errors = {"ECE of sigmoids": calibration_error(1 / (1 + np.exp(-scores)), true)}
    if known is not None:
        errors["ECE calibrated"] = calibration_error(known(scores).astype(float), true)
    return {"best_labels": TOP, "bins": BINS, "labels": len(scores), **errors}, fitted
