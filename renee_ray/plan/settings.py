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
from renee_ray.data.models import read_settings, resolve_model
from renee_ray.errors import ReneeError

SMALL, LARGE = 10_000, 1_000_000
"""Training points from which on a dataset is no longer small, and points or labels from which on
it is large."""
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
    fitted = _fitted(settings, manifest, gpus, cores, encoder if embeds else "", given)
    for key, value, why in list(fitted):
        settings.add(key, value, f"the settings chosen for {points} points")
        lines.append(f"{key}={value}: {why}")
    return settings, lines


def _fitted(
    recipe: Layer, manifest: Manifest, gpus: int, cores: int, encoder: str, given: Collection[str]
) -> Iterator[tuple[str, Any, str]]:
    """Yields (key, value, reason) of what a recipe does not say of another dataset.

    encoder: the transformer; empty: none.
    """
    points, labels = manifest.num_points("train"), manifest.num_labels
    if encoder and "encoder.name" not in given:
        yield "encoder.name", encoder, "the model of the dataset's tokenizer"
    if encoder and "encoder.pooling" not in given and (pooling := _pooling(encoder)) != "mean":
        yield "encoder.pooling", pooling, "the model's own"
    yield "encoder.max_length", min(manifest.max_length, LONGEST), "what the dataset keeps"
    if gpus:
        yield "num_workers", gpus, "one for each GPU"
    elif cores == 1:
        yield "num_workers", 1, "one core"
    if points >= LARGE:
        yield "batch_size", LARGE_BATCH, f"{LARGE:,} points and more"
        yield "evaluation.neighbours", 0, "votes hold all training points in memory"
    if max(points, labels) >= LARGE:
        yield "classifier.precision", "auto", "a large classifier"
    if not manifest.has_label_texts:
        yield "feed.augment", 0, "the labels have no texts"
    elif labels >= LARGE and "feed.augment" not in given:
        share = min(float(recipe["feed"]["augment"]), points / labels)
        yield "feed.augment", share, "an epoch has no more label texts than points, about"
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


def _pooling(name: str) -> str:
    """Returns how a model makes an embedding of its tokens.

    That is what its sentence_transformers files say; without them, a decoder takes the last token.
    """
    directory = Path(resolve_model(name))
    found = read_settings(directory / "1_Pooling" / "config.json")
    for ours, key, word in (
        ("cls", "pooling_mode_cls_token", "cls"),
        ("last", "pooling_mode_lasttoken", "lasttoken"),
    ):
        if found.get(key) is True or found.get("pooling_mode") == word:
            return ours
    kinds = read_settings(directory / "config.json").get("architectures") or [""]
    return "mean" if found or not str(kinds[0]).endswith(("ForCausalLM", "LMHeadModel")) else "last"
