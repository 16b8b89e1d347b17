"""`renee-ray evaluate` and `expect`: metrics of a run, beside those published for its recipe."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

from renee_ray.config.overrides import dotted, make_config, parse_overrides, read_recipe
from renee_ray.config.recipes import About
from renee_ray.config.schema import ConvertConfig, RunConfig
from renee_ray.config.score import ScoreConfig
from renee_ray.data.dataset import Dataset, Manifest
from renee_ray.data.storage import absolute
from renee_ray.errors import Progress, ReneeError, silent
from renee_ray.scoring.metrics import MOST
from renee_ray.scoring.scorer import Propensities, metric_sums
from renee_ray.service.run.directory import RunDirectory
from renee_ray.service.score.calibrate import CALIBRATION, Seen, calibration_of, facts, measured
from renee_ray.service.score.job import ScoringJob, as_scored, refuse, refuse_run
from renee_ray.service.score.worker import Worker
from renee_ray.service.train.resuming import MAY_CHANGE

PREDICTED = ("k", "scores", "threshold", "texts", "explain", "overwrite")
"""Keys of scoring that are about predictions alone."""


def evaluate_run(
    run: str, data: str, score: ScoreConfig, on_progress: Progress = silent
) -> dict[str, Any]:
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
    refuse_run(data, "dataset")
    points, split = Dataset.open(data), str(score.split)
    nothing = ReneeError(f"no point of split={split} of {points.path} has a label; give another")
    counts = points.manifest.statistics.get(split)
    some = points.manifest.num_points(split) > 0
    if some and isinstance(counts, dict) and counts.get("label_pairs") == 0:
        raise nothing
    job = ScoringJob.checked(directory, points, score)
    found = job.run(evaluate_worker, points, split, on_progress)
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
        known = None
        if not job.score.calibrate:  # a new one needs no file, which may be damaged
            known = calibration_of(job.directory, job.checkpoint, job.config.evaluation)
        found["calibration"], fitted = measured(pairs, job.score.calibrate, known)
        found["fitted"] = fitted and fitted.to_json()
    return found


Difference = tuple[str, Any, Any]
"""What differs, its value in the run, and that in the recipe or the published dataset."""
FIXED = ("split", "calibrate", "allow", "deny", "search", "index", *PREDICTED)
"""Settings of scoring that `expect` leaves as they are: published metrics are of the test split."""


def expect_run(run: str, recipe: str, score: ScoreConfig) -> dict[str, Any]:
    """Evaluates a run on its own dataset, and compares it with its recipe.

    Args:
        recipe: empty: the one that the run began as.

    Returns:
        recipe, source; what `evaluate_run` does; expected: published percent by metric;
        propensities: how the published PSP counts; differences: lists of (what, run, recipe).

    Raises:
        ConfigError: `score` sets what is of no use here.
        ReneeError: the run has no recipe, or nothing was published for it.
    """
    refuse(score, FIXED, "expect")
    directory = RunDirectory(absolute(run))
    config = directory.config()
    name = recipe or config.recipe
    if not name:
        raise ReneeError(f"{run} was not started from a recipe; give --recipe NAME")
    layer, about = read_recipe(name)
    if about is None or not about.expected:
        raise ReneeError(f"nothing was published for the recipe {name!r:.80}; give another")
    theirs = make_config(RunConfig, layer, {"data": config.data, "output": config.output})
    dataset = directory.dataset()
    return {
        "recipe": name,
        "source": about.source,
        "expected": about.expected,
        "propensities": about.propensities,
        "differences": [*differences(as_scored(config, score), theirs, about, dataset.manifest)],
        **evaluate_run(run, dataset.path, score),
    }


def differences(
    config: RunConfig, theirs: RunConfig, about: About, manifest: Manifest
) -> Iterator[Difference]:
    """Yields what may explain a gap: first weights, the dataset, then settings that matter."""
    if about.weights and not config.encoder.weights:
        yield "encoder.weights", "", about.weights
    points = manifest.num_points("train") + manifest.num_points("validation")
    yield from _unlike("labels", manifest.num_labels, about.labels)
    yield from _unlike("points", points, about.points or points)
    held_out = manifest.num_points("validation")
    yield from _unlike("points held out for validation", held_out, about.held_out)
    published = make_config(ConvertConfig, parse_overrides(about.convert.split()))
    if about.convert:
        for key in ("propensity_a", "propensity_b"):
            yield from _unlike(key, getattr(manifest, key), getattr(published, key))
    if about.dataset.startswith("LF-"):
        yield from _unlike("label texts", manifest.has_label_texts, True)
        pairs = manifest.statistics.get("test", {}).get("filter_pairs", 0)
        yield from _unlike("filter labels of the test split", bool(pairs), True)
    left_out = MAY_CHANGE - {"evaluation"}
    own = dict(dotted(config.model_dump(exclude=left_out)))
    for key, value in dotted(theirs.model_dump(exclude=left_out)):
        if key not in ("encoder.weights", "seed", "evaluation.every", "evaluation.batch_size"):
            yield from _unlike(key, own.get(key), value)


def _unlike(what: str, own: Any, theirs: Any) -> Iterator[Difference]:
    if own != theirs:
        yield what, own, theirs
