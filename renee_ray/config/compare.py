"""The configuration of `renee-ray compare`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from renee_ray.config.schema import Config, Name


class CompareConfig(Config):
    """`renee-ray compare RUN RUN ...`"""

    data: str = ""
    """Dataset whose points are predicted; empty: that of the first run."""
    output: Name = "comparison"
    """Local directory for the page and for the predictions of runs."""
    split: Literal["test", "validation"] = "test"
    """Points that are compared."""
    checkpoint: Literal["best", "last"] = "best"
    """Checkpoint of each run: the best on the validation split, or the newest."""
    num_workers: int = Field(0, ge=0)
    """Workers that predict; 0: as many as trained the run."""
    seed: int = Field(0, ge=0)
    """Seed of the bootstrap samples."""
