"""Recipes: the configurations that come with the package, and what a file says of itself below its
key `about`: what was published for its settings."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Literal

from pydantic import Field

from renee_ray.config.schema import Config, Name
from renee_ray.errors import SHOWN, ConfigError

DIRECTORY = Path(__file__).resolve().parents[1] / "recipes"


def recipe_path(name: str) -> Path:
    """Returns where the recipe `name` is, whether there is one or not."""
    return DIRECTORY / f"{name}.yaml"


def find_recipe(config: str) -> Path | None:
    """Returns the recipe that `config` names, or None where `config` is the path of a file.

    A path has a slash, ends in .yaml, or is that of an existing file.

    Raises:
        ConfigError: `config` is neither.
    """
    existing = os.path.exists(config) and not os.path.isdir(config)
    if existing or "/" in config or config.endswith(".yaml"):
        return None
    if config not in (names := recipe_names()):
        nearest = difflib.get_close_matches(config[:SHOWN], names, 1, 0.0)[0]
        raise ConfigError(
            f"{config!r:.{SHOWN}} is neither a file nor one of the {len(names)} recipes; did you "
            f"mean {nearest!r}? `renee-ray recipes` lists them"
        )
    return recipe_path(config)


def recipe_names() -> list[str]:
    """Returns the names of all recipes, in alphabetical order."""
    return sorted(path.stem for path in DIRECTORY.glob("*.yaml"))


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
