"""`renee-ray tune`: searches settings by Ray Tune, on the validation split alone.

OUTPUT/trial-000     each trial is a run; the first has the settings of the configuration
OUTPUT/tuning.json   the journal: what is searched, and every trial with its results
OUTPUT/best.yaml     the best configuration, without data and output
OUTPUT/tuning.html   the trials as a page
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import wait
from typing import Any

import ray
import yaml

from renee_ray.config.overrides import dotted
from renee_ray.config.schema import Placed, RunConfig
from renee_ray.config.score import ScoreConfig
from renee_ray.config.tune import TuneConfig, Values, search_space, with_settings
from renee_ray.data.dataset import Dataset
from renee_ray.data.storage import absolute, make_directory, read_file, replace_file
from renee_ray.errors import ReneeError, reason

try:
    import optuna
    from optuna import distributions
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch
except ImportError as error:
    raise ReneeError(
        f"tuning needs Optuna ({reason(error):.200}); pip install 'renee_ray[tune]'"
    ) from error

from renee_ray.rank.threads import in_thread
from renee_ray.report.tuning import write_tuning
from renee_ray.service.cluster.connect import ensure_ray
from renee_ray.service.cluster.launch import decide_gpu, placement
from renee_ray.service.cluster.policies import READING_CPUS, user_error
from renee_ray.service.run.directory import HISTORY_FILE, RUN_FILE, RunDirectory
from renee_ray.service.run.lease import Lease
from renee_ray.service.score.evaluate import evaluate_run
from renee_ray.service.train.resuming import MAY_CHANGE, located
from renee_ray.service.train.train import check, train

log = logging.getLogger(__name__)

FEW_POINTS = 200
"""Validation points below which differences between trials are mostly chance."""
RANDOM_TRIALS = 6
"""Trials whose settings are drawn at random, before those of the best say where to look."""
RUNGS, REDUCTION = (50, 99), 2
"""ASHA compares trials once, after 50 percent of their own epochs (below 99); half go on."""
LOG_FROM = 4
"""Ratio of a range's ends from which on its values are drawn on a log scale."""
POLL_S, STOP_S = 5.0, 60.0
"""Between two looks at a trial's history; for its end, beyond checkpoint.grace_s."""
JOURNAL, BEST, PAGE = "tuning.json", "best.yaml", "tuning.html"
Trial = dict[str, Any]
"""settings; state: running (or cut off), finished, stopped (by ASHA) or failed; value, the last one
in percent or None; reason of a failure; results, each with value, epoch and progress."""


class Halving(ASHAScheduler):
    """ASHA that does not stop the first trial, with which the others are compared in the end."""

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Returns what Tune does with the trial."""
        decision = str(super().on_trial_result(controller, trial, result))
        return self.CONTINUE if str(trial) == "trial-000" else decision


class TrialRun(tune.Trainable):
    """Trains a run, or goes on with it; `step` returns at each of its evaluations.

    A result has "value", the metric in percent, "epoch" and "progress", the percentage of the run's
    own epochs. The last one has "final": its value is what `evaluate` says of the last checkpoint,
    with the votes of neighbours. Or it has "failed", the reason.
    """

    def setup(self, config: dict[str, Any], base: Any = None) -> None:
        self._run = RunConfig.model_validate(base)  # the trial's own from `_train` on
        self._told, self._last = 0, {"value": 0.0, "epoch": 0.0, "progress": 0.0}
        self._ends = threading.Event()
        self._trained = in_thread(lambda: self._train(config), "train")

    def _train(self, settings: dict[str, Any]) -> None:
        output = {"output": f"{self._run.output}/{self.trial_name}"}
        self._run = with_settings(self._run, settings | output, self.trial_name)
        train(self._run, stopping=self._ends.is_set)

    def step(self) -> dict[str, Any]:
        while True:
            ended = self._trained.done()  # asked first: nothing is written after it
            try:
                history = RunDirectory(self._run.output).read(HISTORY_FILE) or {}
            except (OSError, ReneeError) as error:  # read again at the next look
                if ended:
                    return self._last | {"failed": reason(error), "done": True} | self._ended()
                history = {}
            for each in [each for each in history.get("evals", ()) if each["step"]][self._told :]:
                self._told += 1
                value = each["metrics"].get(self._run.evaluation.metric, 0.0)
                progress = 100 * each["epoch"] / self._run.epochs
                self._last = {"value": value, "epoch": each["epoch"], "progress": progress}
                return self._last
            if ended:
                return self._last | self._ended() | {"done": True}
            wait([self._trained], timeout=POLL_S)

    def _ended(self) -> dict[str, Any]:
        """Returns the value of the last checkpoint, with the votes of neighbours, or a failure."""
        try:
            self._trained.result()
            if not self._run.evaluation.neighbours:
                return {"final": True}
            run = self._run
            placed = {key: getattr(run, key) for key in Placed.model_fields}
            score = ScoreConfig(
                split="validation", checkpoint="last", num_workers=run.min_workers, **placed
            )
            found = evaluate_run(self._run.output, self._run.data, score)["metrics"]
            return {"value": found[self._run.evaluation.metric], "final": True}
        except Exception as error:  # Tune would keep it in a file for itself
            log.exception("%s failed", self.trial_name)
            return {"failed": reason(user_error(error) or error)}

    def cleanup(self) -> None:
        """Ends the run, with a checkpoint where it trains; Tune calls it at the trial's end."""
        self._ends.set()
        wait([self._trained], timeout=self._run.checkpoint.grace_s + STOP_S)


class Journal(tune.Callback):
    """Writes down what Tune tells of trials, so that a later call goes on with them.

    identity: what another call must have, too, or ReneeError is raised.
    """

    def __init__(
        self, directory: RunDirectory, identity: dict[str, Any], say: Callable[[str], None],
        check: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._directory, self._identity, self._say, self._check = directory, identity, say, check
        before = directory.read(JOURNAL) or identity | {"seconds": 0.0, "trials": []}
        for key, value in identity.items():
            if before.get(key) != value:
                raise ReneeError(
                    f"{directory.path} is a search with {key}={before.get(key)} and not {value}; "
                    f"give the same command to go on, or another output"
                )
        self.trials: list[Trial] = before["trials"]
        self.seconds, self._began = before["seconds"], time.time()
        self.cut_off = [each for each in self.trials if each["state"] == "running"]

    def name(self, trial: Any) -> str:
        """Names a trial that Tune begins: one that was cut off, or a new one."""
        if self.cut_off:
            known = self.cut_off.pop(0)
            known["results"].clear()
        else:
            known = {"settings": dict(trial.config), "state": "running", "value": None}
            known |= {"reason": "", "results": []}
            self.trials.append(known)
        return f"trial-{next(i for i, each in enumerate(self.trials) if each is known):03d}"

    def on_trial_result(self, trial: Any, result: dict[str, Any], **_: Any) -> None:  # type: ignore[override]
        if "failed" in result:
            return
        results = self._of(trial)["results"]
        if result.get("final"):  # of the last evaluation, which was told before
            del results[-1:]
        results.append({key: result[key] for key in ("value", "epoch", "progress")})
        said = f"epoch {result['epoch']:.1f}, {result['value']:.2f}"
        self._note(trial, said, value=result["value"])

    def on_trial_complete(self, trial: Any, **_: Any) -> None:  # type: ignore[override]
        if told := trial.last_result.get("failed"):
            self._note(trial, f"failed: {told}", state="failed", reason=told)
        else:
            state = "finished" if trial.last_result.get("final") else "stopped"
            self._note(trial, state, state=state)

    def on_trial_error(self, trial: Any, **_: Any) -> None:  # type: ignore[override]
        self._note(trial, "failed", state="failed", reason="its process ended; see Ray's logs")

    def _of(self, trial: Any) -> Trial:
        return self.trials[int(str(trial).rpartition("-")[2])]

    def _note(self, trial: Any, said: str, **known: Any) -> None:
        self._of(trial).update(known)
        self._say(f"{trial}: {said}")
        self.write()

    def write(self) -> None:
        self._check()
        content = {"seconds": self.seconds + time.time() - self._began, "trials": self.trials}
        self._directory.write(JOURNAL, self._identity | content)

    def __getstate__(self) -> dict[str, Any]:
        """Returns nothing: Tune pickles what it is given, and the journal is what is read again."""
        return {}


def search(
    config: TuneConfig, given: Collection[str], say: Callable[[str], None]
) -> dict[str, Any]:
    """Searches settings, or goes on with the search at `config.output`.

    Args:
        given: keys of the command line, which are not searched.

    Returns:
        "trials", "best", the number of one; "metric", "points" (of the validation split), "space",
        and two paths, "yaml" and "report".

    Raises:
        ReneeError: no validation points, the output holds something else, or no trial finished.
        LeaseHeld: another driver searches at this output.
    """
    dataset = Dataset.open(config.data)
    fixed = {"data": dataset.path, "output": absolute(config.output)}
    base = located(with_settings(config.run, fixed, "tune"))
    points = dataset.manifest.num_points("validation")
    if not points:
        raise ReneeError(f"{dataset.path} has no validation points; convert with validation=0.15")
    if points < FEW_POINTS:
        say(f"{points} validation points tell trials apart badly; convert with validation=0.15")
    check(base, dataset)
    space = search_space(config, given, dataset.manifest.has_label_texts)
    directory = RunDirectory(base.output)
    if directory.read(RUN_FILE) is not None:
        raise ReneeError(f"{base.output} is a run; give another output for the search")
    for name in (BEST, PAGE) if directory.read(JOURNAL) is None else ():
        if read_file(f"{base.output}/{name}") is not None:
            raise ReneeError(
                f"{base.output}/{name} is not of a search; give another output, or move the file"
            )
    make_directory(base.output)
    shown = {key: shown_values(values) for key, values in space.items()}
    settings = base.model_dump(exclude=MAY_CHANGE - {"evaluation"}, mode="json")
    identity = dict(dotted(settings)) | {"space": shown, "dataset": dataset.manifest.hash}
    with Lease(base.output, say) as lease:
        journal = Journal(directory, identity, say, lease.check)
        left = config.trials - sum(each["state"] != "running" for each in journal.trials)
        seconds = config.hours * 3600 - journal.seconds
        if left > 0 and (seconds > 0 or not config.hours):
            _run(config, base, space, journal, left, seconds if config.hours else None)
            journal.write()
    facts: dict[str, Any] = {
        "best": best_of(journal.trials, points), "metric": base.evaluation.metric, "points": points,
        "space": shown, "trials": journal.trials,
        "yaml": f"{base.output}/{BEST}", "report": f"{base.output}/{PAGE}",
    }  # fmt: skip
    best = journal.trials[facts["best"]]
    chosen = with_settings(base, best["settings"], "tune")
    keys = chosen.model_dump(exclude_unset=True, exclude={"data", "output"}, mode="json")
    note = f"# {facts['metric']} {best['value']:.2f} on {points} validation points\n"
    replace_file(facts["yaml"], (note + yaml.safe_dump(keys, sort_keys=False)).encode())
    write_tuning(facts["report"], facts)
    return facts


def _run(
    config: TuneConfig, base: RunConfig, space: Mapping[str, Values], journal: Journal, left: int,
    seconds: float | None,
) -> None:  # fmt: skip
    """Runs trials, `left` at most, for `seconds`."""
    os.environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0"}
    ensure_ray(1, local_cpus=base.max_workers + 1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    gpu = decide_gpu(base.use_gpu, base.min_workers)
    parallel = parallel_trials(config, gpu, ray.cluster_resources())
    with tempfile.TemporaryDirectory(prefix="renee-ray-", ignore_cleanup_errors=True) as scratch:
        tuner = tune.Tuner(
            # A trial itself takes no CPU: its workers reserve their own.
            tune.with_resources(
                tune.with_parameters(TrialRun, base=base.model_dump(exclude_unset=True)),
                {"memory": 1},
            ),
            tune_config=tune.TuneConfig(
                search_alg=sampler(space, base, journal),
                # At the same share of their epochs, since the learning rates fall over them.
                scheduler=Halving(
                    "progress", "value", "max", RUNGS[1], RUNGS[0], REDUCTION,
                    stop_last_trials=False,
                ),
                num_samples=left,
                max_concurrent_trials=parallel,
                time_budget_s=seconds,
                trial_name_creator=lambda trial: journal.name(trial),  # a method would be copied
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                storage_path=scratch,
                name="tune",
                verbose=0,
                callbacks=[journal],
                # A run writes its own checkpoints.
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        )  # fmt: skip
        # In a thread, where Ray Tune leaves the signals alone.
        in_thread(tuner.fit, "tune").result()


def parallel_trials(config: TuneConfig, gpu: bool, have: Mapping[str, float]) -> int:
    """Returns how many trials run at a time: each has workers, and a CPU that reads for them.

    Args:
        have: resources of the cluster, as Ray names them.

    Raises:
        ReneeError: `parallel` trials have no room, for which Ray would wait silently.
    """
    each = placement(config, gpu)["resources_per_worker"]
    needs = {name: config.max_workers * count for name, count in each.items()}
    needs["CPU"] += READING_CPUS
    room = int(min(have.get(name, 0) // need for name, need in needs.items() if need)) or 1
    if config.parallel > room:
        raise ReneeError(
            f"parallel={config.parallel} trials do not fit the cluster, which has room for {room}; "
            f"lower parallel, num_workers or cpus_per_worker, or add nodes"
        )
    return config.parallel or room


def sampler(space: Mapping[str, Values], base: RunConfig, journal: Journal) -> OptunaSearch:
    """Returns Optuna's sampler: first what was cut off, or the settings of the configuration."""
    own = dict(dotted(base.model_dump()))
    first = {
        key: min(max(own[key], values[0]), values[1])
        if isinstance(values, tuple)
        else (own[key] if own[key] in values else values[0])
        for key, values in space.items()
    }
    found = OptunaSearch(
        {key: _distribution(values) for key, values in space.items()},
        metric="value",
        mode="max",
        points_to_evaluate=[_drawn(each) for each in journal.cut_off]
        if journal.trials
        else [first],
        # A sampler that begins again with the same seed would repeat what it drew.
        sampler=optuna.samplers.TPESampler(
            seed=base.seed + len(journal.trials), n_startup_trials=RANDOM_TRIALS
        ),
    )
    for trial in journal.trials:
        if trial["state"] in ("finished", "stopped"):
            found.add_evaluated_point(_drawn(trial), trial["value"])
    return found


def _drawn(trial: Trial) -> dict[str, Any]:
    """Returns a trial's settings as they were drawn: JSON has made lists of tuples."""
    values = trial["settings"].items()
    return {key: tuple(each) if isinstance(each, list) else each for key, each in values}


def _distribution(values: Values) -> distributions.BaseDistribution:
    if isinstance(values, list):
        return distributions.CategoricalDistribution(values)
    low, high = values
    log = low > 0 and high >= LOG_FROM * low
    if isinstance(low, int):
        return distributions.IntDistribution(low, int(high), log=log)
    return distributions.FloatDistribution(low, high, log=log)


def shown_values(values: Values) -> str:
    """Returns values as the command line has them."""
    if isinstance(values, tuple):
        return "..".join(f"{end:.4g}" for end in values)
    return f"[{', '.join(map(str, values))}]"


def best_of(trials: list[Trial], points: int) -> int:
    """Returns the number of the finished trial with the highest value, the first of equals.

    The first trial, with the settings as given, stays the best unless another is ahead by more than
    a standard error, sqrt(p (1 - p) / points) for a share p of `points` validation points: the best
    of a dozen trials is that of the luckiest, too.

    Raises:
        ReneeError: none has finished.
    """
    finished = [i for i, each in enumerate(trials) if each["state"] == "finished"]
    if not finished:
        reasons = [each["reason"] for each in trials if each["reason"]]
        raise ReneeError(reasons[0] if reasons else "no trial has finished; give more hours")
    values = {i: float(trials[i]["value"]) / 100 for i in finished}
    best = max(finished, key=values.__getitem__)
    error = math.sqrt(max(0.0, values[best] * (1 - values[best])) / points)
    return 0 if 0 in values and values[best] - values[0] <= error else best
