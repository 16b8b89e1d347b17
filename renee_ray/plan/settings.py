"""Settings by themselves: those of the recipe whose dataset is most like the one at hand.

    training points     with a transformer                     without
    below SMALL         quickstart                             perl-bag
    SMALL and more      lf-debian-40k                          debian-bag
    LARGE and more      the same; with GPUs lf-debian-40k-minilm

A dataset whose tokenizer comes without a model has no transformer, nor has a run that wants none.
What differs from the recipe follows from the manifest and the machine (`choose`). A run that begins
with the weights of another one takes the settings of that one in place of a recipe's
(`choose_from`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from renee_ray.config.grammar import Layer
from renee_ray.config.overrides import changed, dotted, read_yaml
from renee_ray.config.schema import NO_TRANSFORMER, RunConfig
from renee_ray.data.dataset import Dataset
from renee_ray.data.dataset.manifest import Manifest
from renee_ray.data.models import read_settings, resolve_model
from renee_ray.errors import ReneeError
from renee_ray.plan.norm import fitted_norm

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

NOT_FROZEN = (
    "encoder.gradient_checkpointing", "encoder.internal_dropout", "encoder.lora.",
    "encoder.weights", "feed.token_dropout",
)  # fmt: skip
"""What keys begin with that encoder.frozen=true excludes."""
RATES = "encoder.learning_rate", "encoder.weight_decay"
"""What has no effect beside it without a bottleneck, whatever the value."""
KEPT = {
    "batch_size", "epochs", "warmup", "average", "loss_every", "encoder", "classifier", "feed",
    "evaluation",
}  # fmt: skip
"""Settings that a run takes from the one with whose weights it begins."""
NOT_KEPT: dict[str, Any] = {"encoder": {"weights"}, "feed": {"targets", "targets_weight"}}
"""What of these it does not take: other weights to begin with, and predictions for other points."""


def choose(
    manifest: Manifest, gpus: int, cores: int, given: Mapping[str, Any] | None = None
) -> tuple[Layer, list[str]]:
    """Chooses settings for a dataset.

    Args:
        gpus: GPUs to train on; cores: CPU cores of this machine; given: what the user sets, by
            dotted key.

    Returns:
        (the settings, with the name of their recipe; a line for each choice, for people)
    """
    points, given = manifest.num_points("train"), given or {}
    encoder = given.get("encoder.name") or manifest.tokenizer
    embeds = _has_transformer(encoder)
    if not embeds:
        name = "perl-bag" if points < SMALL else "debian-bag"
    elif gpus and points >= LARGE and not given.get("encoder.frozen"):
        name = "lf-debian-40k-minilm"
    else:
        name = "quickstart" if points < SMALL else "lf-debian-40k"
    devices = f"{gpus} GPU{'s' * (gpus > 1)}" if gpus else "no GPU"
    lacks = "no transformer" if encoder == NO_TRANSFORMER else f"no model in {encoder}"
    line = (
        f"settings of the recipe {name}, for {points:,} training points, {devices}"
        f"{'' if embeds else f' and {lacks}'}"
    )
    settings = read_yaml(name)
    fitted = chain(
        _fitted(settings, manifest, encoder if embeds else "", given),
        _sized(settings, manifest, gpus, cores, given),
    )
    return settings, [line, *_added(settings, fitted, given, f"{points} points")]


def choose_from(
    start: RunConfig, manifest: Manifest, gpus: int, cores: int, given: Mapping[str, Any]
) -> tuple[Layer, list[str]]:
    """Chooses settings for a run that begins with the weights of another, as `choose` does.

    Only what follows from the dataset's size and the machine is changed, and never the model.

    Args:
        start: the settings of the other run; given: has its path.
    """
    settings, path = Layer(), given["start"]
    for key, value in dotted(start.model_dump(include=KEPT, exclude=NOT_KEPT)):
        settings.add(key, value, f"the settings of {path}")
    fitted = list(_sized(settings, manifest, gpus, cores, given))
    if start.evaluation.tails and manifest.num_points("validation") < ENOUGH:
        fitted.append(("evaluation.tails", [], "too few validation points to choose by"))
    line = f"settings of {path}, with whose weights it begins"
    return settings, [line, *_added(settings, fitted, given, path)]


def add_norm(
    settings: Layer, config: RunConfig, dataset: Dataset, given: Mapping[str, Any]
) -> list[str]:
    """Adds to chosen settings what a transformer of another norm needs; returns lines on it.

    config: what the settings make so far; given: as `choose` takes it.
    """
    ruled = {"encoder.scale", "encoder.bag.norm"} & given.keys()  # by the user
    found = () if ruled else fitted_norm(config.encoder, dataset)
    return _added(settings, found, given, config.encoder.name)


def _added(
    settings: Layer, fitted: Iterable[tuple[str, Any, str]], given: Mapping[str, Any], what: str
) -> list[str]:
    """Adds (key, value, reason) to settings but where it is given; returns a line for each."""
    lines = []
    for key, value, why in fitted:
        if key not in given:
            settings.add(key, value, f"the settings chosen for {what}")
            lines.append(f"{key}={value}: {why}")
    return lines


def _fitted(
    recipe: Layer, manifest: Manifest, encoder: str, given: Mapping[str, Any]
) -> Iterator[tuple[str, Any, str]]:
    """Yields (key, value, reason) of what a recipe does not say of another dataset.

    encoder: the transformer; empty: none.
    """
    points, labels = manifest.num_points("train"), manifest.num_labels
    if encoder:
        yield "encoder.name", encoder, "the model of the dataset's tokenizer"
        if (pooling := _pooling(encoder)) != "mean":
            yield "encoder.pooling", pooling, "the model's own"
    trained = given.get("encoder.frozen") is False
    if "frozen" in recipe["encoder"]:
        excluded = [key for key, *_ in changed(given) if key.startswith(NOT_FROZEN)]
        rates = () if given.get("encoder.bottleneck") else RATES
        for key in [*(key for key in rates if key in given), *excluded][:1]:
            yield "encoder.frozen", False, f"{key} is given"
            trained = True
    yield "encoder.max_length", min(manifest.max_length, LONGEST), "what the dataset keeps"
    if points >= LARGE:
        yield "batch_size", LARGE_BATCH, f"{LARGE:,} points and more"
    if max(points, labels) >= LARGE:
        yield "classifier.precision", "auto", "a large classifier"
    if "average" in recipe and max(points, labels) >= LARGE:
        yield "average", 0, "a mean takes as much memory as a momentum"
    elif "average" in recipe and trained:
        yield "average", 0, "the mean of a trained transformer was not measured"
    yield "evaluation.every", 0, "the last weights are kept"
    if manifest.num_points("validation") >= ENOUGH and "evaluation.tail" not in given:
        yield "evaluation.tails", TAILS, "the best is chosen by the validation points"


def _sized(
    settings: Layer, manifest: Manifest, gpus: int, cores: int, given: Mapping[str, Any]
) -> Iterator[tuple[str, Any, str]]:
    """Yields (key, value, reason) of what follows from size and machine and is not the model's."""
    points, labels = manifest.num_points("train"), manifest.num_labels
    if gpus:
        yield "num_workers", gpus, "one for each GPU"
    elif cores == 1:
        yield "num_workers", 1, "one core"
    if points >= LARGE:
        yield "evaluation.neighbours", 0, "votes hold all training points in memory"
    if not manifest.has_label_texts:
        yield "feed.augment", 0, "the labels have no texts"
    elif labels >= LARGE:
        share = min(float(settings["feed"]["augment"]), points / labels)
        yield "feed.augment", share, "an epoch has no more label texts than points, about"
    if given.get("evaluation.every"):
        yield "checkpoint.every_steps", 0, "each validation writes a checkpoint"
    else:
        batch = int(given.get("batch_size", settings["batch_size"]))  # with what is yielded above
        steps = SAVED if points < LARGE else max(1, points // batch)
        yield "checkpoint.every_steps", steps, "checkpoints, from which a stopped run goes on"


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
