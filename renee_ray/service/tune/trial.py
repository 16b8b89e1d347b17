"""A trial: an ordinary run, in an actor of Ray Tune that tells of its evaluations."""

from __future__ import annotations

import threading
import time
from concurrent.futures import wait
from typing import Any

from ray import tune

from renee_ray.config.schema import RunConfig
from renee_ray.config.score import ScoreConfig
from renee_ray.config.tune import with_settings
from renee_ray.errors import ReneeError
from renee_ray.parallel.threads import in_thread
from renee_ray.service.run.directory import HISTORY_FILE, RunDirectory
from renee_ray.service.score.evaluate import evaluate_run
from renee_ray.service.train.train import train

POLL_S = 0.5
STOP_S = 60.0
"""Seconds beyond checkpoint.grace_s for which a trial that is stopped may take to end."""


def trial_directory(output: str, number: int) -> str:
    """Returns the run directory of a trial, whose first number is 0."""
    return f"{output}/trial-{number:03d}"


class TrialRun(tune.Trainable):
    """Trains a run, or goes on with it; `step` returns at each of its evaluations.

    A result has "value", the metric in percent, "epoch" and "progress", the share of the run's own
    epochs in percent. The last one has "final": the value is then what `evaluate` says of the last
    checkpoint, with the votes of neighbours. "failed" is the sentence of a user's error, and
    "unfinished" says that time was up.
    """

    def setup(self, config: dict[str, Any], base: Any = None, deadline: float = 0.0) -> None:
        """Starts the run with number and settings of `config`, until `deadline`, if any."""
        self._base, self._deadline = base, deadline
        self._told, self._last = 0, {"value": 0.0, "epoch": 0.0, "progress": 0.0}
        self._stop = threading.Event()
        self._trained = in_thread(lambda: self._train(config), "train")

    def _train(self, config: dict[str, Any]) -> RunConfig:
        base = RunConfig.model_validate(self._base)
        number = config["number"]
        output = {"output": trial_directory(base.output, number)}
        self._run = with_settings(base, config["settings"] | output, f"trial {number}")
        train(self._run, stopping=self._stop.is_set)
        return self._run

    def step(self) -> dict[str, Any]:
        while not self._trained.done():
            if self._told_more():
                return self._last
            if self._deadline and time.time() > self._deadline:
                self.cleanup()
                return self._last | {"unfinished": True, "done": True}
            wait([self._trained], timeout=POLL_S)
        try:
            run = self._trained.result()
        except ReneeError as error:
            return self._last | {"failed": str(error), "done": True}
        if self._told_more():
            return self._last
        if run.evaluation.neighbours:
            score = ScoreConfig(split="validation", checkpoint="last")
            found = evaluate_run(run.output, run.data, score)["metrics"]
            self._last["value"] = found[run.evaluation.metric]
        return self._last | {"final": True, "done": True}

    def _told_more(self) -> bool:
        """Takes the next evaluation that the run has written, if there is one."""
        if not hasattr(self, "_run"):
            return False
        history = RunDirectory(self._run.output).read(HISTORY_FILE) or {"evals": []}
        evals = [each for each in history["evals"] if each["step"]]
        if self._told == len(evals):
            return False
        found = evals[self._told]
        self._told += 1
        self._last = {
            "value": found["metrics"].get(self._run.evaluation.metric, 0.0),
            "epoch": found["epoch"],
            "progress": 100 * found["epoch"] / self._run.epochs,
        }
        return True

    def cleanup(self) -> None:
        """Ends the run, with a checkpoint where it trains; Tune calls it at the trial's end."""
        self._stop.set()
        grace = self._base["checkpoint"]["grace_s"]
        wait([self._trained], timeout=grace + STOP_S)
