"""The configuration of `renee-ray compare`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from renee_ray.config.schema import Name
from renee_ray.config.score import Chosen


class CompareConfig(Chosen):
    """`renee-ray compare RUN RUN ...`"""

    data: str = ""
    """Dataset whose points are predicted; empty: that of the first run."""
    output: Name = "comparison"
    """Local directory for the page and for the predictions of runs."""
    split: Literal["test", "validation"] = "test"
    """Points that are compared."""
    num_workers: int = Field(0, ge=0)
    """Workers that predict; 0: as many as trained the run."""
    seed: int = Field(0, ge=0)
    """Seed of the bootstrap samples."""
