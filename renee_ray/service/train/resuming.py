"""Resuming a run: which settings it keeps, which may change, and whether it is finished."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from pydantic import BaseModel

from renee_ray.checkpoint.state import Checkpoint, State
from renee_ray.config.overrides import dotted, make_config
from renee_ray.config.schema import NO_TRANSFORMER, RunConfig
from renee_ray.data.dataset import Dataset, Extended
from renee_ray.data.order import Order
from renee_ray.data.storage import absolute
from renee_ray.errors import ReneeError
from renee_ray.report.status import STATUS_FILE
from renee_ray.service.run.directory import RUN_FILE, RunDirectory
from renee_ray.service.run.labels import labels_of

S = TypeVar("S", bound=BaseModel)

MAY_CHANGE = {
    "data", "output", "num_workers", "use_gpu", "threads", "timeout_s", "checkpoint",
    "evaluation", "loss_every", "observe", "placement_strategy", "accelerator_type",
    "cpus_per_worker", "regroup_s", "recipe",
}  # fmt: skip
"""Keys that a resumed run may set anew; any other would change the trajectory it continues."""

MODEL = (
    "encoder.frozen", "encoder.max_length", "encoder.prompt", "encoder.pooling",
    "encoder.bottleneck", "encoder.normalise", "encoder.scale", "encoder.lora.rank",
    "encoder.lora.alpha", "encoder.lora.targets", "encoder.bag.dim", "encoder.bag.ngrams",
    "encoder.bag.buckets", "encoder.bag.norm", "classifier.objective",
)  # fmt: skip
"""Keys without which weights are another model's, or fit none: a run that begins with the weights
of another one must have them as that one has. Not encoder.name, whose directory may have moved:
the weights tell."""


def located(config: RunConfig) -> RunConfig:
    """Makes the paths of a configuration absolute: workers have another working directory."""

    def placed(settings: S, keys: Iterable[str]) -> S:
        given = {key: value for key in keys if (value := getattr(settings, key))}
        return settings.model_copy(update={key: absolute(path) for key, path in given.items()})

    model = config.encoder.name  # or the hub's name of one
    local = ["weights", *["name"] * (model != NO_TRANSFORMER and os.path.isdir(model))]
    config = placed(config, ("data", "output", "start"))
    parts = {"feed": ["targets"], "observe": ["tensorboard_dir"], "encoder": local}
    for part, keys in parts.items():
        settings = getattr(config, part)
        if any(getattr(settings, key) for key in keys):  # what is not set stays so
            config = config.model_copy(update={part: placed(settings, keys)})
    return config


def resumed(
    config: RunConfig, directory: RunDirectory, dataset: Dataset, on_progress: Callable[[str], None]
) -> RunConfig:
    """Returns the configuration to go on with: what is not given now is as the run has it.

    Raises:
        ReneeError: the run that is there has another configuration or dataset.
    """
    saved = directory.read(RUN_FILE)
    if saved is None:
        return config
    own = located(directory.config()).model_dump(exclude=MAY_CHANGE)
    given, before = config.model_dump(exclude_unset=True), dict(dotted(own))
    for key, value in dotted(given):
        if before.get(key, value) != value:
            raise ReneeError(
                f"{directory.path} is a run with {key}={before[key]!r} and not {value!r}; "
                f"give the same configuration to resume it, or another output"
            )
    for key, value in identity(dataset).items():
        if key != "path" and saved["dataset"].get(key) != value:
            raise ReneeError(
                f"{directory.path} was trained on a dataset with {key}="
                f"{saved['dataset'].get(key)!r} and {dataset.path} has {value!r}; "
                f"give the same dataset to resume it, or another output"
            )
    for key, value in dotted(config.model_dump()):
        if before.get(key, value) != value:
            on_progress(f"{directory.path} goes on with its {key}={before[key]!r}, not {value!r}")
    return make_config(RunConfig, own, given)


def start_of(config: RunConfig, dataset: Dataset, newest: Checkpoint | None) -> str:
    """Returns the name of the checkpoint that a new run begins with; empty where there is none.

    Raises:
        ReneeError: it, or the newest of the run itself, has not the labels of the dataset, or it
            has another precision, or is of another model.
    """
    total = dataset.manifest.num_labels
    if newest and newest.state.facts.get("num_labels", total) != total:
        raise ReneeError(
            f"since `renee-ray labels add` {config.output} has "
            f"{newest.state.facts['num_labels']} labels, and {dataset.path} has {total}; train to "
            f"another output with start={config.output}, on a dataset with all of them"
        )
    if newest or not config.start:
        return ""
    directory = RunDirectory(config.start)
    found = directory.checkpoint("best")
    if isinstance(labels_of(directory, dataset, found), Extended):
        raise ReneeError(
            f"{dataset.path} lacks labels that were added to {config.start}; convert it with those "
            f"that `renee-ray labels list {config.start}` writes"
        )
    precision, has = config.classifier.precision, found.state.facts["precision"]
    if precision not in ("auto", has):
        raise ReneeError(
            f"classifier.precision={precision}, and {config.start}, with whose weights it begins, "
            f"was trained in {has}; leave classifier.precision out, or give {has}"
        )
    _check_model(config, directory.config())
    return found.name


def _check_model(config: RunConfig, start: RunConfig) -> None:
    """Raises ReneeError where a run and the one that it begins from are of different models."""
    own, before = (dict(dotted(each.model_dump(mode="json"))) for each in (config, start))
    without_bag = not (config.encoder.bag.dim or start.encoder.bag.dim)
    for key in MODEL:
        if own[key] != before[key] and not (without_bag and key.startswith("encoder.bag.")):
            raise ReneeError(
                f"{key}={own[key]!r:.200}, and {config.start}, with whose weights it begins, was "
                f"trained with {before[key]!r:.200}; give {key}={before[key]!r:.200}, or neither "
                f"{key} nor a configuration"
            )


def identity(dataset: Dataset) -> dict[str, Any]:
    """Returns what run.json says of the dataset, which a resumed run's dataset must have too."""
    manifest = dataset.manifest
    return {
        "path": dataset.path,
        "num_labels": manifest.num_labels,
        "num_points": manifest.num_points("train"),
        "tokenizer": manifest.tokenizer,
        "vocabulary_hash": manifest.vocabulary_hash,
        "has_label_texts": manifest.has_label_texts,
        "labels_hash": manifest.labels_hash,
        "manifest_hash": manifest.hash,
    }


def is_finished(directory: RunDirectory, state: State, epochs: Iterable[Order]) -> bool:
    """Returns whether a checkpoint's state is the end of the run, and status.json agrees."""
    try:
        status = directory.read(STATUS_FILE) or {}
    except ReneeError:  # damaged: the workers write another
        return False
    # Labels are added and retired once a run has finished, at its best checkpoint.
    at_end = state.revision > 0 or state.step >= sum(order.num_batches for order in epochs)
    return at_end and status.get("state") == "finished"
