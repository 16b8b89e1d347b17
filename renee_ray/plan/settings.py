"""Settings by themselves: those of the recipe whose dataset is most like the one at hand.

    training points     with a transformer                     without
    below SMALL         quickstart                             perl-bag
    SMALL and more      lf-debian-40k                          debian-bag
    LARGE and more      the same; with GPUs lf-debian-40k-minilm

A dataset whose tokenizer comes without a model has no transformer, nor has a run that wants none.
What differs from the recipe follows from the manifest and the machine (`choose`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from renee_ray.config.grammar import Layer
from renee_ray.config.overrides import read_yaml
from renee_ray.config.schema import NO_TRANSFORMER
from renee_ray.data.dataset.manifest import Manifest
from renee_ray.data.models import resolve_model
from renee_ray.errors import ReneeError

SMALL, LARGE = 10_000, 1_000_000
"""Training points from which on a dataset is no longer small, and is large."""
LARGE_BATCH = 1024
LONGEST = 128
"""Tokens of a text beyond which none is read."""
SAVED = 400
"""Steps between checkpoints of a run that is validated at its end alone, if it is not large."""
ENOUGH, TAILS = 100, [tenths / 10 for tenths in range(9)]
"""Validation points from which on `evaluation.tail` is chosen by them, and among which values."""


def choose(
    manifest: Manifest,
    gpus: int,
    cores: int,
    given: Collection[str] = (),
    encoder: str = "",
) -> tuple[Layer, list[str]]:
    """Chooses settings for a dataset.

    Args:
        gpus: GPUs to train on; cores: CPU cores of this machine; given: keys that the user sets.
        encoder: the transformer that the user sets, or `none`; empty: that of the tokenizer.

    Returns:
        (the settings, with the name of their recipe; a line for each choice, for people)
    """
    points, lines = manifest.num_points("train"), []
    encoder = encoder or manifest.tokenizer
    embeds = _has_transformer(encoder)
    if not embeds:
        name = "perl-bag" if points < SMALL else "debian-bag"
    elif gpus and points >= LARGE:
        name = "lf-debian-40k-minilm"
    else:
        name = "quickstart" if points < SMALL else "lf-debian-40k"
    devices = f"{gpus} GPU{'s' * (gpus > 1)}" if gpus else "no GPU"
    lacks = "no transformer" if encoder == NO_TRANSFORMER else f"no model in {encoder}"
    lines.append(
        f"settings of the recipe {name}, for {points:,} training points, {devices}"
        f"{'' if embeds else f' and {lacks}'}"
    )
    settings = read_yaml(name)
    for key, value, why in _fitted(manifest, points, gpus, cores, embeds, given):
        settings.add(key, value, f"the settings chosen for {points} points")
        lines.append(f"{key}={value}: {why}")
    return settings, lines


def _fitted(
    manifest: Manifest, points: int, gpus: int, cores: int, embeds: bool, given: Collection[str]
) -> Iterator[tuple[str, Any, str]]:
    """Yields (key, value, reason) of what a recipe does not say of another dataset."""
    if embeds and "encoder.name" not in given:
        yield "encoder.name", manifest.tokenizer, "the model of the dataset's tokenizer"
    yield "encoder.max_length", min(manifest.max_length, LONGEST), "what the dataset keeps"
    if gpus:
        yield "num_workers", gpus, "one for each GPU"
    elif cores == 1:
        yield "num_workers", 1, "one core"
    if points >= LARGE:
        yield "batch_size", LARGE_BATCH, f"{LARGE:,} points and more"
        yield "evaluation.neighbours", 0, "votes hold all training points in memory"
        yield "classifier.precision", "auto", "a large classifier"
    if not manifest.has_label_texts:
        yield "feed.augment", 0, "the labels have no texts"
    if "evaluation.every" not in given:
        yield "evaluation.every", 0, "the last weights are kept"
        if "checkpoint.every_steps" not in given:
            why = "checkpoints, from which a stopped run goes on"
            yield "checkpoint.every_steps", SAVED if points < LARGE else points // LARGE_BATCH, why
    if manifest.num_points("validation") >= ENOUGH and "evaluation.tail" not in given:
        yield "evaluation.tails", TAILS, "the best is chosen by the validation points"


def _has_transformer(name: str) -> bool:
    """Returns whether a directory or hub name, such as a tokenizer's, has a model's weights.

    Raises:
        ReneeError: it cannot be found.
    """
    try:
        return name != NO_TRANSFORMER and any(Path(resolve_model(name)).glob("*.safetensors"))
    except ReneeError as error:
        raise ReneeError(f"{error}; encoder.name=none trains a bag of n-grams alone") from None
