"""`renee-ray compare`: whether runs differ, in which settings, and on which points."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from renee_ray.config.overrides import dotted
from renee_ray.config.score import CompareConfig, ScoreConfig
from renee_ray.data.dataset import Dataset
from renee_ray.data.inspection import label_text, texts_of
from renee_ray.data.storage import absolute
from renee_ray.errors import ReneeError
from renee_ray.rank.batch import Ragged
from renee_ray.rank.collectives import Ranks
from renee_ray.report.charts import MAX_LINES
from renee_ray.report.compare import write_comparison
from renee_ray.scoring.comparison import Comparison, Terms, compare
from renee_ray.scoring.scorer import Propensities
from renee_ray.service.run.directory import HISTORY_FILE, RUN_FILE, RunDirectory
from renee_ray.service.score.predict import predict_run
from renee_ray.service.score.predictions import Predicted, padded, together, true_labels
from renee_ray.xfc.labels import LabelRange

K = 100
TOP = 5
EXAMPLES = 8
NOT_SETTINGS = ("data", "output", "recipe")


@dataclass(frozen=True)
class Compared:
    """A run or a directory of predictions.

    settings: dotted keys of a run; history: as it wrote; retired: labels that it hides, int64.
    """

    name: str
    predictions: str
    settings: dict[str, Any]
    history: dict[str, Any]
    retired: NDArray[np.int64]


def compare_runs(
    paths: Sequence[str], config: CompareConfig, on_progress: Callable[[str], None]
) -> dict[str, Any]:
    """Compares runs, or directories of predictions, with the first of them.

    Returns:
        "models"; "metrics", for each metric a list with value, low, high (95% confidence interval),
        difference_low, difference_high and p for each model; "differ", for each model but the first
        the metrics that differ by Holm's correction; "settings" that differ; "gained" and "lost",
        points by model; "points" and "report".

    Raises:
        ReneeError: fewer than two models or more than a chart has lines for, a path that holds
            neither a run nor predictions, or predictions of other points.
    """
    if not 2 <= len(paths) <= MAX_LINES:
        raise ReneeError(f"compare takes 2 to {MAX_LINES} runs or predictions, not {len(paths)}")
    if "://" in config.output:
        raise ReneeError(f"output={config.output!r} is a URL; give a local directory")
    paths = [absolute(path) for path in paths]
    directories = [RunDirectory(path) for path in paths]
    runs = [each if each.read(RUN_FILE) is not None else None for each in directories]
    if not config.data and not any(runs):
        raise ReneeError("compare needs data=DATASET where no run is given")
    first = next(filter(None, runs), None)
    dataset = first.dataset() if first and not config.data else Dataset.open(absolute(config.data))
    names = _names(paths)
    checkpoints = [run.checkpoint(config.checkpoint) for run in runs if run]
    hidden = np.unique(np.concatenate([[], *(each.state.retired for each in checkpoints)]))
    models = [
        Compared(name, path, {}, {}, np.empty(0, np.int64))
        if run is None
        else _predicted(run, name, dataset, config, K + len(hidden), on_progress)
        for run, path, name in zip(runs, paths, names, strict=True)
    ]
    on_progress("comparing")
    terms, best, true = _terms(models, dataset, config.split)
    found = compare(terms, config.seed)
    report = Path(config.output) / "comparison.html"
    facts: dict[str, Any] = {
        "models": names,
        "points": len(true),
        "metrics": _metrics(found),
        "differ": {name: found.differ(i) for i, name in enumerate(names) if i},
        "settings": _differing(models),
        **_changes(names, dataset, config.split, terms, best, true),
    }
    report.parent.mkdir(parents=True, exist_ok=True)
    write_comparison(str(report), facts, {each.name: each.history for each in models})
    return {**facts, "report": str(report)}


def _names(paths: Sequence[str]) -> list[str]:
    """Names each path by the end that tells it from the others."""
    parts = [path.rstrip("/").split("/") for path in paths]
    if len(set(paths)) < len(paths):
        raise ReneeError("a run is given twice; compare different ones")
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def _predicted(
    run: RunDirectory,
    name: str,
    dataset: Dataset,
    config: CompareConfig,
    k: int,
    say: Callable[[str], None],
) -> Compared:
    say(f"predicting the {config.split} points by {name}")
    destination = os.path.join(config.output, "predictions", name.replace("/", "-"))
    score = ScoreConfig(
        k=min(k, dataset.manifest.num_labels), split=config.split, checkpoint=config.checkpoint,
        num_workers=config.num_workers, overwrite=True,
    )  # fmt: skip
    predict_run(run.path, dataset.path, destination, score, say)
    settings = dict(dotted(run.config().model_dump()))
    history, retired = run.read(HISTORY_FILE) or {}, run.checkpoint(config.checkpoint).state.retired
    return Compared(name, absolute(destination), settings, history, np.asarray(retired, np.int64))


def _terms(
    models: Sequence[Compared], dataset: Dataset, split: str
) -> tuple[list[Terms], list[NDArray[np.int64]], Ragged]:
    """Returns for each model its terms and its TOP best labels int64 [n, TOP]; true labels."""
    predicted = [Predicted(model.predictions) for model in models]
    # As in `evaluate`; what one model hides no other is asked for, or may answer.
    hidden = np.concatenate([model.retired for model in models])
    points: list[pa.Array] = []
    labels: list[list[NDArray[np.int64]]] = [[] for _ in models]
    for _, ids, scored in together(predicted):
        points.append(ids)
        for own, (found, _) in zip(labels, scored, strict=True):
            own.append(padded(found.only(~np.isin(found.values, hidden)), K))
    true = true_labels(dataset, split, pa.chunked_array(points, pa.int64()), models[0].predictions)
    true = true.only(~np.isin(true.values, hidden))
    number = dataset.manifest.num_labels
    every = LabelRange(0, number, number)
    propensities = Propensities.read(dataset, every, Ranks())
    inverse = propensities.of(true.values)
    best = [np.concatenate(own) for own in labels]
    terms = [Terms.of(each, true, inverse, propensities.bounds) for each in best]
    return terms, [each[:, :TOP] for each in best], true


def _metrics(found: Comparison) -> dict[str, list[dict[str, float]]]:
    columns = ("value", "low", "high", "difference_low", "difference_high", "p")
    arrays = (
        found.values, found.low, found.high, found.difference_low, found.difference_high, found.p,
    )  # fmt: skip
    return {
        name: [
            {key: round(float(array[i, j]), 4) for key, array in zip(columns, arrays, strict=True)}
            for i in range(len(found.values))
        ]
        for j, name in enumerate(found.names)
    }


def _differing(models: Sequence[Compared]) -> dict[str, list[Any]]:
    """Returns the settings that differ among runs; None stands for predictions, without any."""
    runs = [model.settings for model in models if model.settings]
    keys = dict.fromkeys(key for settings in runs for key in settings)
    return {
        key: [model.settings.get(key) for model in models]
        for key in keys
        if key not in NOT_SETTINGS and any(each.get(key) != runs[0].get(key) for each in runs)
    }


def _changes(
    names: Sequence[str], dataset: Dataset, split: str, terms: Sequence[Terms],
    best: list[NDArray[np.int64]], true: Ragged,
) -> dict[str, dict[str, list[dict[str, Any]]]]:  # fmt: skip
    """Returns the points whose TOP labels gained or lost most right ones, against the first."""
    at = terms[0].names.index(f"P@{TOP}")
    hits = [np.rint(TOP * each.numerator[at]).astype(np.int64) for each in terms]
    chosen: dict[tuple[str, int], list[int]] = {}
    for i in range(1, len(names)):
        change = hits[i] - hits[0]
        for kind, sign in (("gained", 1), ("lost", -1)):
            order = np.argsort(-sign * change, kind="stable")[:EXAMPLES]
            chosen[kind, i] = [int(row) for row in order if sign * change[row] > 0]
    points = _points(dataset, split, sorted({row for rows in chosen.values() for row in rows}))

    def example(row: int, i: int) -> dict[str, Any]:
        right = set(true.values[true.offsets[row] : true.offsets[row + 1]].tolist())
        before, after = (
            [
                {"label": label_text(dataset, label), "right": label in right}
                for label in labels[row].tolist()
                if label >= 0
            ]
            for labels in (best[0], best[i])
        )
        return {**points[row], "before": before, "after": after}

    return {
        kind: {names[i]: [example(row, i) for row in chosen[kind, i]] for i in range(1, len(names))}
        for kind in ("gained", "lost")
    }


def _points(dataset: Dataset, split: str, rows: list[int]) -> dict[int, dict[str, Any]]:
    """Returns "point_id" and "text" of some rows of a split."""
    if not rows:
        return {}
    columns = ["point_id", "input_ids"]
    read = pa.concat_tables([dataset.read_rows(split, row, row + 1, columns) for row in rows])
    points = zip(read["point_id"].to_pylist(), texts_of(dataset, read), strict=True)
    return {
        row: {"point_id": point, "text": text}
        for row, (point, text) in zip(rows, points, strict=True)
    }
