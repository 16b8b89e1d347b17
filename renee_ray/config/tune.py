"""The configuration of `renee-ray tune`: a run's keys, a budget, and the values to search."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import Field

from renee_ray.config.grammar import Layer
from renee_ray.config.overrides import dotted, keys_of, make_config
from renee_ray.config.schema import NO_TRANSFORMER, RunConfig
from renee_ray.errors import SHOWN, ConfigError

NOT_SEARCHED = (
    "data", "output", "recipe", "start", "evaluation.metric", "evaluation.every",
    "evaluation.tails",
)  # fmt: skip
TABLE = {
    "encoder.learning_rate": (0.25, 4, True),
    "encoder.dropout": (0, 0.3, False),
    "encoder.bag.learning_rate": (0.25, 4, True),
    "encoder.bag.dropout": (0, 0.3, False),
    "encoder.bag.norm": (0.5, 2, True),
    "classifier.learning_rate": (0.25, 4, True),
    "classifier.init_scale": (0.5, 2, True),
    "batch_size": (0.5, 2, True),
    "epochs": (0.5, 2, True),
    "feed.augment": (0, 1, False),
    "evaluation.tail": (0, 0.5, False),
    "evaluation.neighbour_weight": (0.5, 2, True),
}
"""Key -> ends of its range, and whether they are factors of the configuration's value."""
Values = tuple[float, float] | list[Any]
"""The ends of a range, integers where the key is one; or a choice."""


class TuneConfig(RunConfig):
    """`renee-ray tune CONFIG`: the keys of a run, and these."""

    trials: int = Field(20, ge=1)
    """Trials in all, those of earlier calls included."""
    hours: float = Field(0.0, ge=0)
    """Hours of all calls, after which trials end at their next evaluation; 0: no limit."""
    parallel: int = Field(0, ge=0)
    """Trials at a time; 0: as many as the cluster has CPUs or GPUs for."""
    table: bool = True
    """Searches the settings of the table in docs/tuning.md, too; false: those of `space` alone."""
    space: dict[str, Any] = Field({})
    """Values to search: a range (space.epochs=2..8) or a list (space.batch_size=[64, 128])."""

    @property
    def run(self) -> RunConfig:
        """The configuration that a trial changes."""
        own = set(TuneConfig.model_fields) - set(RunConfig.model_fields)
        return RunConfig.model_validate(self.model_dump(exclude_unset=True, exclude=own))


def search_space(
    config: TuneConfig, given: Collection[str], label_texts: bool
) -> dict[str, Values]:
    """Returns the values of each key that is searched: of TABLE where they matter, then of `space`.

    Args:
        given: keys of the command line, which are not searched.
        label_texts: whether the dataset has any.

    Raises:
        ConfigError: a key or value of `space` is wrong, or nothing is left to search.
    """
    if tails := config.evaluation.tails:
        raise ConfigError(
            f"evaluation.tails={list(tails)} would replace each trial's evaluation.tail; leave "
            f"evaluation.tails out"
        )
    run, bag, found = config.run, config.encoder.bag.dim > 0, dict[str, Values]()
    matters = {
        "encoder.learning_rate": run.encoder.trains_transformer or run.encoder.lora.rank > 0,
        "encoder.bag.learning_rate": bag,
        "encoder.bag.dropout": bag,
        "encoder.bag.norm": bag and run.encoder.name != NO_TRANSFORMER,
        "classifier.init_scale": run.classifier.init == "label_text",
        "feed.augment": label_texts,
        "evaluation.neighbour_weight": run.evaluation.neighbours > 0,
    }
    own = dict(dotted(run.model_dump()))
    for key, (low, high, times) in TABLE.items():
        value = own[key]
        if not config.table or key in given or not matters.get(key, True):
            continue
        ends = (low * value, high * value) if times else (min(low, value), max(high, value))
        if key == "batch_size":
            sizes = (round(ends[0]), value, round(ends[1]))
            least = max(run.feed.streams, run.max_workers)
            found[key] = [n for n in sizes if n >= least and n % run.feed.streams == 0]
        elif isinstance(value, int):
            found[key] = max(1, round(ends[0])), round(ends[1])
        else:
            found[key] = float(ends[0]), float(ends[1])
    found |= {key: _parsed(run, key, value) for key, value in dotted(config.space)}
    if not found:
        raise ConfigError("nothing is searched; give values, as space.epochs=2..8, or table=true")
    return found


def with_settings(config: RunConfig, settings: Mapping[str, Any], where: str) -> RunConfig:
    """Returns `config` with other values of dotted keys; ConfigError where one is wrong."""
    layer = Layer()
    for key, value in settings.items():
        layer.add(key, value, where)
    return make_config(RunConfig, config.model_dump(exclude_unset=True), layer, where=where)


def _parsed(config: RunConfig, key: str, value: Any) -> Values:
    """Returns the values that space.KEY=VALUE names, each end or entry of which is checked."""
    if key in NOT_SEARCHED:
        raise ConfigError(f"space.{key}: {key} cannot be searched; leave it out")
    low, dots, high = str(value).partition("..")
    whole = ("int", key) in {(kind, name) for name, kind, *_ in keys_of(RunConfig)}
    found: Values = []
    with contextlib.suppress(TypeError, ValueError):
        if not isinstance(value, str):
            found = list(value)
        elif dots:
            found = (int(low), int(high)) if whole else (float(low), float(high))
    if key == "batch_size" and isinstance(found, tuple) and config.feed.streams > 1:
        raise ConfigError(
            f"space.batch_size={value!s:.{SHOWN}} is a range, and few of its values are "
            f"multiples of feed.streams={config.feed.streams}; give a list, as [64, 128]"
        )
    if not found or (isinstance(found, tuple) and not found[0] < found[1]):
        raise ConfigError(
            f"space.{key}={value!s:.{SHOWN}} is neither a range nor a list; give it as "
            f"space.{key}=LOW..HIGH or space.{key}=[A, B]"
        )
    checked = [with_settings(config, {key: each}, f"space.{key}") for each in found]
    if isinstance(found, tuple):
        return found
    return [dict(dotted(each.model_dump()))[key] for each in checked]
