"""The search for settings: Optuna's sampler, and the journal that a later call goes on from."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import TPESampler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from renee_ray.config.tune import Choice, Values

RANDOM_TRIALS = 6
"""Trials whose settings are drawn at random, before those of the best say where to look."""


@dataclass
class Trial:
    """A trial: its settings, and its results so far, as service/tune/trial.py has them.

    state: running (or cut off), finished, stopped (by the scheduler) or failed.
    value: the last one, in percent; None before the first evaluation.
    """

    settings: dict[str, Any]
    state: str = "running"
    value: float | None = None
    reason: str = ""
    results: list[dict[str, float]] = field(default_factory=list)

    def add(self, result: Mapping[str, Any]) -> None:
        kept = {key: float(result[key]) for key in ("value", "epoch", "progress")}
        self.results.append(kept)
        self.value = kept["value"]


def best_of(trials: Sequence[Trial]) -> int | None:
    """Returns the number of the finished trial with the highest value, the first of equals."""
    finished = [i for i, trial in enumerate(trials) if trial.state == "finished"]
    return max(finished, key=lambda i: trials[i].value or 0.0, default=None)


def distribution(values: Values) -> BaseDistribution:
    """Returns Optuna's distribution of the values of a key."""
    if isinstance(values, Choice):
        return CategoricalDistribution(values.values)
    if values.whole:
        return IntDistribution(int(values.low), int(values.high), log=values.log)
    return FloatDistribution(values.low, values.high, log=values.log)


class Search(OptunaSearch):
    """Suggests settings: those given first, then what a run that was cut off had, then Optuna's.

    Args:
        trials: of earlier calls; new ones are added.
        own: the settings of the configuration itself, which the first trial has.
        save: writes the trials; called after each change.
        deadline: seconds since 1970 after which no trial begins; 0: none.
    """

    def __init__(
        self,
        space: Mapping[str, Values],
        trials: list[Trial],
        own: dict[str, Any],
        seed: int,
        save: Callable[[], None],
        say: Callable[[str], None],
        deadline: float,
    ) -> None:
        self._trials, self._save, self._say, self._until = trials, save, say, deadline
        self._cut_off = [each for each in trials if each.state == "running"]
        again = [each.settings for each in self._cut_off] or ([] if trials else [own])
        super().__init__(
            {key: distribution(values) for key, values in space.items()},
            metric="value",
            mode="max",
            points_to_evaluate=again,
            # A sampler that begins again with the same seed would repeat what it drew.
            sampler=TPESampler(seed=seed + len(trials), n_startup_trials=RANDOM_TRIALS),
        )
        for trial in trials:
            if trial.state in ("finished", "stopped") and trial.value is not None:
                self.add_evaluated_point(trial.settings, trial.value)
        self._known: dict[str, Trial] = {}

    def suggest(self, trial_id: str) -> Any:
        late = self._until and time.time() > self._until
        if late or (self._trials and self._trials[0].state == "failed"):
            return Searcher.FINISHED
        settings = super().suggest(trial_id)
        trial = self._cut_off.pop(0) if self._cut_off else Trial(settings)
        if not any(trial is each for each in self._trials):
            self._trials.append(trial)
        trial.results.clear()
        self._known[trial_id] = trial
        self._save()
        return {"number": self._number(trial), "settings": trial.settings}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        super().on_trial_result(trial_id, result)
        self._take(trial_id, result)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        found, trial = result or {}, self._known[trial_id]
        failed = error or "failed" in found
        super().on_trial_complete(trial_id, None if failed else found, failed)
        if found.get("unfinished"):
            return
        if failed:
            trial.state, trial.reason = "failed", found.get("failed", "see Ray's logs")
            self._say(f"trial {self._number(trial)} failed: {trial.reason}")
        else:
            trial.state = "finished" if found.get("final") else "stopped"
            self._take(trial_id, found)
        self._save()

    def _take(self, trial_id: str, result: dict[str, Any]) -> None:
        trial = self._known[trial_id]
        trial.add(result)
        ended = "" if trial.state == "running" else f", {trial.state}"
        self._say(
            f"trial {self._number(trial)}: epoch {result['epoch']:.1f}, {trial.value:.2f}{ended}"
        )
        self._save()

    def _number(self, trial: Trial) -> int:
        return next(i for i, each in enumerate(self._trials) if each is trial)

    def save(self, checkpoint_path: str) -> None:
        """Writes nothing: the journal is what a later call reads, and no pickle."""


def to_json(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    return [asdict(trial) for trial in trials]
