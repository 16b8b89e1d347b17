"""Recipes: the configurations that come with the package, each found by its name."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

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
