"""`renee-ray evaluate`: metrics of a trained run on a split of a dataset."""

from __future__ import annotations

from typing import Any

from renee_ray.config.schema import ScoreConfig
from renee_ray.data.dataset import Dataset
from renee_ray.data.storage import absolute
from renee_ray.errors import ReneeError
from renee_ray.scoring.scorer import Propensities, metric_sums, without_labels
from renee_ray.service.run.directory import RunDirectory
from renee_ray.service.score.job import ScoringJob, check_source


def evaluate_run(run: str, data: str, score: ScoreConfig) -> dict[str, Any]:
    """Computes metrics of a run's checkpoint on a split. Hidden labels count as if nobody had them.

    Returns:
        "metrics" in percent, "points", "step" and "split"; where labels have texts, "augmented",
        PSP and PSnDCG whose propensities count each text as a point.

    Raises:
        ReneeError: no run, no checkpoint, a dataset of another kind or with other labels, or
            no point of the split has a label.
    """
    directory = RunDirectory(absolute(run))
    directory.config()
    check_source(data, "dataset")
    points, split = Dataset.open(data), str(score.split)
    nothing = ReneeError(f"no point of split={split} of {points.path} has a label; give another")
    counts = points.manifest.statistics.get(split)
    some = points.manifest.num_points(split) > 0
    if some and isinstance(counts, dict) and counts.get("label_pairs") == 0:
        raise nothing
    found = ScoringJob.checked(directory, points, score).run(evaluate_worker, points, split)
    if found["metrics"] is None:
        raise nothing
    return {"split": split, **found}


def evaluate_worker(arguments: dict[str, Any]) -> dict[str, Any]:
    """Computes the metrics of all ranks' rows, as one worker; None where no row has a label."""
    job: ScoringJob = arguments["job"]
    scorer = job.load_scorer()
    batches = job.batches(arguments["points"], arguments["split"], scorer.ranks)
    batches = without_labels(batches, job.hidden)
    ways = [
        Propensities.read(job.labels, scorer.shard.owned, scorer.ranks, augmented=each)
        for each in (False, True)[: 1 + job.labels.manifest.has_label_texts]
    ]
    plain, *augmented = metric_sums(scorer, batches, ways)
    found: dict[str, Any] = {"metrics": plain.metrics() if plain.any_label else None}
    for sums in augmented:
        found["augmented"] = {k: v for k, v in sums.metrics().items() if k.startswith("PS")}
    return found
