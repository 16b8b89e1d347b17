"""The configuration of `renee-ray tune`: a run's keys, a budget, and the values to search."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from renee_ray.config.grammar import Layer
from renee_ray.config.overrides import dotted, keys_of, make_config
from renee_ray.config.schema import NO_TRANSFORMER, RunConfig
from renee_ray.errors import SHOWN, ConfigError

NOT_SEARCHED = ("data", "output", "recipe", "start", "evaluation.metric", "evaluation.every")
LOG_FROM = 4.0
"""Ratio of a range's ends from which on its values are drawn on a log scale."""
DEFAULT_TRIALS = 20


class TuneConfig(RunConfig):
    """`renee-ray tune CONFIG`: the keys of a run, and these."""

    trials: int = Field(0, ge=0)
    """Trials in all, earlier calls included; 0: as many as `hours` allow, or 20 without `hours`."""
    hours: float = Field(0.0, ge=0)
    """Hours in all, earlier calls included, after which trials are stopped; 0: no limit."""
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


@dataclass(frozen=True)
class Interval:
    """All numbers from `low` to `high`, both included; whole: integers alone."""

    low: float
    high: float
    whole: bool

    @property
    def log(self) -> bool:
        return self.low > 0 and self.high / self.low >= LOG_FROM

    def nearest(self, value: Any) -> Any:
        return min(max(value, self.low), self.high)

    def __str__(self) -> str:
        return f"{self.low:g}..{self.high:g}"


@dataclass(frozen=True)
class Choice:
    """One of several values."""

    values: tuple[Any, ...]

    def nearest(self, value: Any) -> Any:
        return value if value in self.values else self.values[0]

    def __str__(self) -> str:
        return f"[{', '.join(map(str, self.values))}]"


Values = Interval | Choice


@dataclass(frozen=True)
class Row:
    """A setting that is searched unless the command line gives it.

    low, high: ends of the range; `times`: they are factors of the configuration's value.
    applies: whether the setting has any effect in a configuration.
    """

    key: str
    low: float
    high: float
    times: bool
    applies: Callable[[RunConfig], bool] = lambda config: True

    def values(self, config: RunConfig) -> Values:
        value = dict(dotted(config.model_dump()))[self.key]
        if self.key == "batch_size":  # a multiple of feed.streams
            found = [round(value * times) for times in (self.low, 1, self.high)]
            return Choice(tuple(each for each in found if each % config.feed.streams == 0))
        low, high = (end * value if self.times else end for end in (self.low, self.high))
        if isinstance(value, int):
            return Interval(max(1, round(low)), round(high), True)
        return Interval(min(low, value), max(high, value), False)


def _trains_encoder(config: RunConfig) -> bool:
    return config.encoder.trains_transformer or config.encoder.lora.rank > 0


def _has_bag(config: RunConfig) -> bool:
    return config.encoder.bag.dim > 0


TABLE = (
    Row("encoder.learning_rate", 0.25, 4, True, _trains_encoder),
    Row("encoder.dropout", 0, 0.3, False),
    Row("encoder.bag.learning_rate", 0.25, 4, True, _has_bag),
    Row("encoder.bag.dropout", 0, 0.3, False, _has_bag),
    Row(
        "encoder.bag.norm", 0.5, 2, True,
        lambda config: _has_bag(config) and config.encoder.name != NO_TRANSFORMER,
    ),
    Row("classifier.learning_rate", 0.25, 4, True),
    Row("classifier.init_scale", 0.5, 2, True, lambda c: c.classifier.init == "label_text"),
    Row("batch_size", 0.5, 2, True),
    Row("epochs", 0.5, 2, True),
    Row("feed.augment", 0, 1, False),
    Row("evaluation.tail", 0, 0.5, False),
    Row("evaluation.neighbour_weight", 0.5, 2, True, lambda c: c.evaluation.neighbours > 0),
)  # fmt: skip
"""What is searched, where it applies; feed.augment on datasets with label texts alone."""


def search_space(
    config: TuneConfig, given: Collection[str], label_texts: bool
) -> dict[str, Values]:
    """Returns the values of each key that is searched: of the table, then of `space`.

    Args:
        given: keys of the command line, which are not searched.
        label_texts: whether the dataset has any.

    Raises:
        ConfigError: a key of `space` is unknown, or cannot be searched, or has a wrong value; or
            nothing is left to search.
    """
    run = config.run
    found: dict[str, Values] = {
        row.key: row.values(run)
        for row in TABLE
        if config.table and row.key not in given and row.applies(run)
        if label_texts or row.key != "feed.augment"
    }
    found |= {key: _parsed(run, key, value) for key, value in dotted(config.space)}
    if not found:
        raise ConfigError("nothing is searched; give values, as space.epochs=2..8, or table=true")
    return found


def with_settings(config: RunConfig, settings: Mapping[str, Any], where: str) -> RunConfig:
    """Returns `config` with other values of dotted keys.

    Raises:
        ConfigError: a key is unknown or a value is wrong.
    """
    layer = Layer()
    for key, value in settings.items():
        layer.add(key, value, where)
    return make_config(RunConfig, config.model_dump(exclude_unset=True), layer, where=where)


def _parsed(config: RunConfig, key: str, value: Any) -> Values:
    """Returns the values that space.KEY=VALUE names, each end or entry of which is checked."""
    name = f"space.{key}={value!s:.{SHOWN}}"
    if key in NOT_SEARCHED:
        raise ConfigError(f"{name}: {key} cannot be searched; leave it out of space")
    if isinstance(value, list | tuple) and value:
        for each in value:
            with_settings(config, {key: each}, f"space.{key}")
        return Choice(tuple(value))
    kinds = {name: kind for name, kind, *_ in keys_of(RunConfig)}
    whole = kinds.get(key) == "int"
    low, dots, high = str(value).partition("..")
    try:
        ends = [int(end) if whole else float(end) for end in (low, high)] if dots else []
    except ValueError:
        ends = []
    if len(ends) != 2 or not ends[0] < ends[1]:
        raise ConfigError(
            f"{name} is neither a range nor a list; give it as space.{key}=LOW..HIGH or "
            f"space.{key}=[A, B]"
        )
    for end in ends:
        with_settings(config, {key: end}, f"space.{key}")
    return Interval(ends[0], ends[1], whole)
