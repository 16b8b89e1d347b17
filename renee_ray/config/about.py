"""What a recipe says of itself, below its key `about`: what was published for its settings."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from renee_ray.config.schema import Config, Name


class EncoderShape(Config):
    """The transformer of a recipe, of which a plan is made where its files are not at hand.

    The numbers are those of its config.json on the hub.
    """

    layers: int = Field(ge=1)
    hidden: int = Field(ge=1)
    heads: int = Field(ge=1)
    vocabulary: int = Field(ge=1)


class Cost(Config):
    """What training took, as published."""

    hardware: Name
    source: Name
    hours: float | None = None
    """Hours of the whole run."""
    epoch_minutes: float | None = None
    memory_gib: float | None = None
    """Peak memory of one device."""


class About(Config):
    """What was published for the settings of a recipe."""

    dataset: Name
    source: Name
    """Where the settings come from."""
    labels: int = Field(ge=1)
    points: int | None = Field(None, ge=1)
    """Training points without label texts; null: unknown."""
    held_out: int = Field(0, ge=0)
    """Those of them that were held out for validation."""
    tokens: float | None = Field(None, ge=1)
    """Mean tokens of a point; null: encoder.max_length is assumed."""
    encoder: EncoderShape | None = None
    weights: str = ""
    """First weights that the published run began with, if not those of encoder.name."""
    expected: dict[str, float] = Field(default_factory=dict)
    """Published metrics on the test split in percent, by name and cut-off."""
    propensities: Literal["plain", "augmented"] = "plain"
    """How PSP counted the points of a label: augmented: its text was one more, as in the released
    code of Renée for datasets with label texts."""
    convert: str = ""
    """Settings of `renee-ray convert` that the published PSP needs."""
    costs: tuple[Cost, ...] = ()
