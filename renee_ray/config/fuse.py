"""The configuration of `renee-ray fuse`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from renee_ray.config.schema import METRIC, Config, Name

NonNegative = Annotated[float, Field(ge=0)]


class FuseConfig(Config):
    """`renee-ray fuse PRED PRED ... DST`"""

    weights: tuple[NonNegative, ...] = ()
    """A weight for each directory of predictions, as [0.7, 0.3]; empty: equal ones, or tuned."""
    tune: tuple[Name, ...] = ()
    """The same models' predictions for the validation split, by which weights are chosen."""
    data: str = ""
    """With `tune`: the dataset of these validation points."""
    metric: str = Field("nDCG@5", pattern=METRIC)
    """With `tune`: what the weights are to raise."""
    k: int = Field(100, ge=1)
    """Labels of each point."""
    overwrite: bool = False
    """Replace predictions that are already at DST."""

    @model_validator(mode="after")
    def _either(self) -> FuseConfig:
        if self.weights and self.tune:
            raise ValueError("weights and tune exclude each other; leave one out")
        return self
