"""`renee-ray expect`: a run's metrics beside those published for its recipe, and what differs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from renee_ray.config.about import About
from renee_ray.config.overrides import dotted, make_config, parse_overrides, read_recipe
from renee_ray.config.schema import ConvertConfig, RunConfig
from renee_ray.config.score import ScoreConfig
from renee_ray.data.dataset import Manifest
from renee_ray.data.storage import absolute
from renee_ray.errors import ReneeError
from renee_ray.service.run.directory import RunDirectory
from renee_ray.service.score.evaluate import PREDICTED, evaluate_run
from renee_ray.service.score.job import as_scored, refuse
from renee_ray.service.train.resuming import MAY_CHANGE

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
    published = make_config(ConvertConfig, parse_overrides(about.convert.split(), ConvertConfig))
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
