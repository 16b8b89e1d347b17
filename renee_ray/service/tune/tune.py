"""`renee-ray tune`: searches settings by Ray Tune, on the validation split alone.

OUTPUT/trial-000     each trial is a run; the first has the settings of the configuration
OUTPUT/tuning.json   the journal: what is searched, and every trial with its results
OUTPUT/best.yaml     the best configuration, without data and output
OUTPUT/tuning.html   the trials as a page
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import ray
import yaml

from renee_ray.config.overrides import dotted
from renee_ray.config.schema import RunConfig
from renee_ray.config.tune import (
    DEFAULT_TRIALS,
    TuneConfig,
    Values,
    search_space,
    with_settings,
)
from renee_ray.data.dataset import Dataset
from renee_ray.data.storage import absolute, make_directory, replace_file
from renee_ray.errors import ReneeError
from renee_ray.parallel.threads import in_thread
from renee_ray.report.run import check_libraries
from renee_ray.report.tuning import write_tuning
from renee_ray.service.cluster import ensure_ray
from renee_ray.service.launch import decide_gpu, placement
from renee_ray.service.run.directory import RUN_FILE, RunDirectory
from renee_ray.service.run.lease import Lease
from renee_ray.service.train.resuming import MAY_CHANGE
from renee_ray.service.train.train import check

FEW_POINTS = 200
"""Validation points below which differences between trials are mostly chance."""
FIRST_RUNG, LAST_RUNG, REDUCTION = 25, 99, 2
"""ASHA's rungs, in percent of a trial's own epochs: 25 and 50; half of the trials go on at each."""
JOURNAL, VERSION = "tuning.json", 1


def tune(
    config: TuneConfig, given: Collection[str], on_progress: Callable[[str], None]
) -> dict[str, Any]:
    """Searches settings, or goes on with the search at `config.output`.

    Args:
        given: keys of the command line, which are not searched.

    Returns:
        "trials", each with settings, state, value, reason and results; "best", the number of one;
        "metric", "space", "points" (of the validation split), "yaml" and "report", two paths.

    Raises:
        ReneeError: no validation points, a package is missing, the output holds something else, or
            no trial has finished.
        LeaseHeld: another driver searches at this output.
    """
    check_libraries()
    if importlib.util.find_spec("optuna") is None:
        raise ReneeError("tune needs optuna, which is not installed; pip install 'renee_ray[tune]'")
    dataset = Dataset.open(config.data)
    fixed = {"data": dataset.path, "output": absolute(config.output)}
    base = with_settings(config.run, fixed, "tune")
    points = dataset.manifest.num_points("validation")
    if not points:
        raise ReneeError(
            f"{dataset.path} has no validation points to choose by; convert it with validation=0.15"
        )
    if points < FEW_POINTS:
        on_progress(
            f"{points} validation points tell trials apart badly; convert the dataset with "
            f"validation=0.15 for the search"
        )
    check(base, dataset)
    space = search_space(config, given, dataset.manifest.has_label_texts)
    make_directory(base.output)
    with Lease(base.output, on_progress) as lease:
        return _Tuning(config, base, space, points, lease, on_progress).run()


class _Tuning:
    """A search at an output whose lease this process holds."""

    def __init__(
        self, config: TuneConfig, base: RunConfig, space: dict[str, Values], points: int,
        lease: Lease, say: Callable[[str], None],
    ) -> None:  # fmt: skip
        from renee_ray.service.tune.search import Trial

        self._config, self._base, self._space, self._points = config, base, space, points
        self._lease, self._say, self._began = lease, say, time.time()
        self._directory = RunDirectory(base.output)
        # JSON makes lists of tuples
        kept = base.model_dump(exclude=MAY_CHANGE - {"evaluation"}, mode="json")
        self._identity = {
            "format_version": VERSION,
            "settings": dict(dotted(kept)),
            "space": {key: str(values) for key, values in space.items()},
        }
        before = self._earlier()
        self._seconds = float(before.get("seconds", 0))
        self._trials = [Trial(**each) for each in before.get("trials", [])]

    def _earlier(self) -> dict[str, Any]:
        """Returns the journal of earlier calls; refuses one of another search."""
        path, before = self._directory.path, self._directory.read(JOURNAL)
        if self._directory.read(RUN_FILE) is not None:
            raise ReneeError(f"{path} is a run; give another output for the search")
        if before is None:
            return {}
        for part, own in self._identity.items():
            if before.get(part) == own:
                continue
            theirs = before.get(part)
            keys = [part]
            if isinstance(own, dict) and isinstance(theirs, dict):
                keys = [k for k in (own | theirs) if own.get(k) != theirs.get(k)]
            raise ReneeError(
                f"{path} is a search with another {part} ({', '.join(keys)}); give the same "
                f"command to go on with it, or another output"
            )
        return before

    def run(self) -> dict[str, Any]:
        if (left := self._trials_left()) and self._seconds_left() > 0:
            self._search(left)
        return self._result()

    def _trials_left(self) -> int:
        """Returns the trials that may still run; -1: any number."""
        if not self._config.trials and self._config.hours:
            return -1
        ended = sum(trial.state != "running" for trial in self._trials)
        return max(0, (self._config.trials or DEFAULT_TRIALS) - ended)

    def _seconds_left(self) -> float:
        return self._config.hours * 3600 - self._seconds if self._config.hours else math.inf

    def _search(self, left: int) -> None:
        os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
        ensure_ray(self._base.min_workers + 1, local_cpus=self._base.max_workers + 1)
        import optuna
        from ray import tune

        from renee_ray.service.tune.search import Search
        from renee_ray.service.tune.trial import TrialRun

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        logging.getLogger("ray.tune").setLevel(logging.ERROR)
        until = self._began + self._seconds_left() if self._config.hours else 0.0
        own = dict(dotted(self._base.model_dump()))
        search = Search(
            self._space, self._trials,
            {key: values.nearest(own[key]) for key, values in self._space.items()},
            self._base.seed, self._save, self._say, until,
        )  # fmt: skip
        trainable = tune.with_parameters(TrialRun, base=self._base.model_dump(), deadline=until)
        with tempfile.TemporaryDirectory(prefix="renee-ray-", ignore_cleanup_errors=True) as place:
            tuner = tune.Tuner(
                # A trial itself takes no CPU: its workers reserve their own.
                tune.with_resources(trainable, {"memory": 1}),
                tune_config=tune.TuneConfig(
                    search_alg=search,
                    scheduler=self._scheduler(),
                    num_samples=left,
                    max_concurrent_trials=self._config.parallel or self._room(),
                ),
                run_config=tune.RunConfig(storage_path=place, name="tune", verbose=0),
            )
            # In a thread, where Ray Tune leaves the signals alone.
            in_thread(tuner.fit, "tune").result()
        self._save()

    def _scheduler(self) -> Any:
        """Returns ASHA, which knows the trials of earlier calls.

        Trials are compared at the same share of their own epochs, since the learning rates fall to
        0 over them.
        """
        from types import SimpleNamespace

        from ray.tune.schedulers import ASHAScheduler

        scheduler = ASHAScheduler(
            "progress", "value", "max", LAST_RUNG, FIRST_RUNG, REDUCTION, stop_last_trials=False
        )
        for i, trial in enumerate(self._trials):
            if trial.state != "running":
                known: Any = SimpleNamespace(trial_id=f"earlier-{i}")
                scheduler.on_trial_add(None, known)  # type: ignore[arg-type]
                for result in trial.results:
                    scheduler.on_trial_result(None, known, result)  # type: ignore[arg-type]
        return scheduler

    def _room(self) -> int:
        """Returns how many trials the cluster has room for."""
        use_gpu = decide_gpu(self._base.use_gpu, self._base.min_workers)
        have, most = ray.cluster_resources(), self._base.max_workers
        if use_gpu:
            return max(1, int(have["GPU"] // most))
        each = placement(self._base, use_gpu)["resources_per_worker"]["CPU"]
        return max(1, int(have["CPU"] // (each * most + 1)))

    def _save(self) -> None:
        from renee_ray.service.tune.search import to_json

        self._lease.check()
        spent = self._seconds + time.time() - self._began
        content = {"seconds": spent, "trials": to_json(self._trials)}
        self._directory.write(JOURNAL, self._identity | content)

    def _result(self) -> dict[str, Any]:
        """Writes the best configuration and the page."""
        from renee_ray.service.tune.search import best_of, to_json

        best = best_of(self._trials)
        if best is None:
            failed = [trial.reason for trial in self._trials if trial.reason]
            raise ReneeError(failed[0] if failed else "no trial has finished; give more hours")
        output, metric = self._base.output, self._base.evaluation.metric
        facts = {
            "best": best,
            "metric": metric,
            "points": self._points,
            "space": self._identity["space"],
            "log": [k for k, v in self._space.items() if getattr(v, "log", False)],
            "trials": to_json(self._trials),
            "yaml": f"{output}/best.yaml",
            "report": f"{output}/tuning.html",
        }
        chosen = with_settings(self._base, self._trials[best].settings, f"trial {best}")
        keys = chosen.model_dump(exclude_unset=True, exclude={"data", "output"}, mode="json")
        note = f"# {metric} {self._trials[best].value:.2f} on {self._points} validation points\n"
        replace_file(facts["yaml"], (note + yaml.safe_dump(keys, sort_keys=False)).encode())
        with tempfile.TemporaryDirectory(prefix="renee-ray-") as scratch:
            page = Path(scratch) / "tuning.html"
            write_tuning(str(page), facts)
            replace_file(facts["report"], page.read_bytes())
        return facts
