"""`renee-ray evaluate`: metrics of a trained run on a split of a dataset."""

from __future__ import annotations

from itertools import chain
from typing import Any

from renee_ray.config.score import ScoreConfig
from renee_ray.data.dataset import Dataset
from renee_ray.data.storage import absolute
from renee_ray.errors import ReneeError
from renee_ray.scoring.metrics import MOST
from renee_ray.scoring.scorer import Propensities, metric_sums
from renee_ray.service.run.directory import RunDirectory
from renee_ray.service.score.calibrate import CALIBRATION, Seen, calibration_of, facts, measured
from renee_ray.service.score.job import ScoringJob, check_source, refuse
from renee_ray.service.score.worker import Worker

PREDICTED = ("k", "scores", "threshold", "texts", "explain", "overwrite")
"""Keys of scoring that are about predictions alone."""


def evaluate_run(run: str, data: str, score: ScoreConfig) -> dict[str, Any]:
    """Computes metrics of a run's checkpoint on a split. Hidden labels count as if nobody had them.

    Returns:
        "metrics" in percent, "points", "step" and "split"; where labels have texts, "augmented",
        PSP and PSnDCG whose propensities count each text as a point; "calibration", how far
        scores are probabilities. `calibrate` fits a map and keeps it in the run.

    Raises:
        ReneeError: no run, no checkpoint, a dataset of another kind or with other labels, or
            no point of the split has a label, or calibrate= is asked for on another split than
            validation.
    """
    if score.calibrate and score.split != "validation":
        raise ReneeError(
            f"calibrate=true learns from points that were held out of training: give "
            f"split=validation, not split={score.split}"
        )
    refuse(score, PREDICTED, "evaluate")
    if score.calibrate:
        refuse(score, ("allow", "deny", "search"), "evaluate calibrate=true")
    directory = RunDirectory(absolute(run))
    directory.config()
    check_source(data, "dataset")
    points, split = Dataset.open(data), str(score.split)
    nothing = ReneeError(f"no point of split={split} of {points.path} has a label; give another")
    counts = points.manifest.statistics.get(split)
    some = points.manifest.num_points(split) > 0
    if some and isinstance(counts, dict) and counts.get("label_pairs") == 0:
        raise nothing
    job = ScoringJob.checked(directory, points, score)
    found = job.run(evaluate_worker, points, split)
    if found["metrics"] is None:
        raise nothing
    if fitted := found.pop("fitted", None):
        directory.write(CALIBRATION, facts(job.checkpoint, job.config.evaluation) | fitted)
    return {"split": split, **found}


def evaluate_worker(arguments: dict[str, Any]) -> dict[str, Any]:
    """Computes the metrics of all ranks' rows, as one worker; None where no row has a label."""
    job: ScoringJob = arguments["job"]
    worker = Worker.of(job)
    number = job.labels.manifest.num_labels
    k = min(number, MOST)
    layout = job.layout(arguments["points"], arguments["split"], k)
    passes = worker.passes(layout)
    ways = [
        Propensities.read(job.labels, worker.owned, worker.ranks, augmented=each)
        for each in (False, True)[: 1 + job.labels.manifest.has_label_texts]
    ]
    seen = Seen(worker.ranks)
    answers = seen.each(chain.from_iterable(worker.answers(arguments, layout, passes)))
    plain, *augmented = metric_sums(worker.ranks, answers, ways)
    if not plain.any_label:
        return {"metrics": None}
    found: dict[str, Any] = {"metrics": plain.metrics()}
    for sums in augmented:
        found["augmented"] = {k: v for k, v in sums.metrics().items() if k.startswith("PS")}
    pairs = seen.gathered(worker.device)
    if worker.ranks.rank == 0:
        known = calibration_of(job.directory, job.checkpoint, job.config.evaluation)
        found["calibration"], fitted = measured(pairs, job.score.calibrate, known)
        found["fitted"] = fitted and fitted.to_json()
    return found
