"""The configurations of what a trained run does: evaluate, predict, export."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from renee_ray.config.schema import Config, Placed


class Chosen(Config):
    """Which checkpoint of a run is used."""

    checkpoint: Literal["best", "last"] = "best"
    """Checkpoint of the run: the best on the validation split, or the newest."""


class Searched(Chosen):
    """How labels are found and scored."""

    search: Literal["exact", "index"] = "exact"
    """Scores every label, or those that an index of `renee-ray index RUN` finds."""
    index: str = ""
    """With search=index: its directory; empty: RUN-index."""
    tail: float | None = Field(None, ge=0)
    """tau of the logit adjustment; null: as `evaluation.tail` of the run."""
    neighbours: int | None = Field(None, ge=0)
    """Training points that vote; null: as `evaluation.neighbours` of the run."""
    neighbour_weight: float | None = Field(None, ge=0)
    """What a label gains that all neighbours have; null: as in the run."""


class ScoreConfig(Searched, Placed):
    """`renee-ray evaluate RUN DATASET` and `renee-ray predict RUN SRC DST`"""

    split: Literal["test", "validation", "train"] = "test"
    """Points of the dataset that are scored; of raw texts, all are."""
    k: int = Field(100, ge=1)
    """Labels predicted for each point."""
    num_workers: int = Field(0, ge=0)
    """Ray Train workers; 0: as many as trained the run."""
    batch_size: int = Field(512, ge=1)
    """Points of a global batch."""
    allow: str = ""
    """File with the ids or names of labels, one a line, that alone are predicted."""
    deny: str = ""
    """File with labels, as `allow`, that are not predicted."""
    scores: Literal["logits", "probabilities", "calibrated"] = "logits"
    """predict: as the model has them; or their sigmoids, which `feed.targets` are, for BCE without
    votes and adjustment; or probabilities by the run's calibration."""
    calibrate: bool = False
    """evaluate: fit probabilities of scores on validation points; the run and exports keep it."""
    threshold: float | None = None
    """predict: leave out labels whose written score is below; null: none."""
    memory_gib_per_worker: float = Field(0.0, ge=0)
    """GiB that a worker may take for labels, which come in passes if they do not fit; 0: what is
    free on its node or GPU."""
    texts: bool = False
    """predict: add the labels' texts as column `label_texts`."""
    explain: bool = False
    """predict: add what transformer, bag and the rest each add to a score; the run needs a bag."""
    overwrite: bool = False
    """predict: replace predictions that are already at DST."""


class ExportConfig(Chosen):
    """`renee-ray export RUN DST`"""

    overwrite: bool = False
    """Replace an export that is already at DST."""
