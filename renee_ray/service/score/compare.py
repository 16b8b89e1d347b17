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

from renee_ray.config.compare import CompareConfig
from renee_ray.config.overrides import dotted
from renee_ray.config.score import ScoreConfig
from renee_ray.data import tokenizer
from renee_ray.data.dataset import Dataset
from renee_ray.data.storage import absolute
from renee_ray.errors import ReneeError
from renee_ray.parallel.batch import Ragged
from renee_ray.parallel.collectives import Ranks
from renee_ray.report.compare import write_comparison
from renee_ray.report.run import SERIES, check_libraries
from renee_ray.scoring.comparison import Comparison, Terms, compare
from renee_ray.scoring.scorer import Propensities, read_counts
from renee_ray.service.run.directory import HISTORY_FILE, RUN_FILE, RunDirectory
from renee_ray.service.score.predict import predict_run
from renee_ray.service.score.predicted import Predicted, padded, together, true_labels
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
            neither a run nor predictions, predictions of other points, or a library is missing.
    """
    check_libraries()
    if not 2 <= len(paths) <= len(SERIES):
        raise ReneeError(f"compare takes 2 to {len(SERIES)} runs or predictions, not {len(paths)}")
    if "://" in config.output:
        raise ReneeError(f"output={config.output!r} is a URL; give a local directory")
    paths = [absolute(path) for path in paths]
    runs = [RunDirectory(path) for path in paths if RunDirectory(path).read(RUN_FILE) is not None]
    if not config.data and not runs:
        raise ReneeError("compare needs data=DATASET where no run is given")
    dataset = Dataset.open(absolute(config.data)) if config.data else runs[0].dataset()
    names = _names(paths)
    models = [
        _model(path, name, dataset, config, on_progress)
        for path, name in zip(paths, names, strict=True)
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
        **_changes(names, dataset, config.split, best, true),
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


def _model(
    path: str, name: str, dataset: Dataset, config: CompareConfig, say: Callable[[str], None]
) -> Compared:
    run = RunDirectory(path)
    if run.read(RUN_FILE) is None:
        return Compared(name, path, {}, {}, np.empty(0, np.int64))
    say(f"predicting the {config.split} points by {name}")
    destination = os.path.join(config.output, "predictions", name.replace("/", "-"))
    score = ScoreConfig(
        k=min(K, dataset.manifest.num_labels), split=config.split, checkpoint=config.checkpoint,
        num_workers=config.num_workers, overwrite=True,
    )  # fmt: skip
    predict_run(path, dataset.path, destination, score)
    settings = dict(dotted(run.config().model_dump()))
    history, retired = run.read(HISTORY_FILE) or {}, run.checkpoint(config.checkpoint).state.retired
    return Compared(name, absolute(destination), settings, history, np.asarray(retired, np.int64))


def _terms(
    models: Sequence[Compared], dataset: Dataset, split: str
) -> tuple[list[Terms], list[NDArray[np.int64]], Ragged]:
    """Returns for each model its terms and its TOP best labels int64 [n, TOP]; true labels."""
    predicted = [Predicted(model.predictions) for model in models]
    points: list[pa.Array] = []
    labels: list[list[NDArray[np.int64]]] = [[] for _ in models]
    for _, ids, scored in together(predicted):
        points.append(ids)
        for own, (found, _) in zip(labels, scored, strict=True):
            own.append(padded(found, K))
    true = true_labels(dataset, split, pa.chunked_array(points, pa.int64()), models[0].predictions)
    # As in `evaluate`; what one hides no other is asked for.
    hidden = np.concatenate([model.retired for model in models])
    true = true.only(~np.isin(true.values, hidden))
    number = dataset.manifest.num_labels
    every = LabelRange(0, number, number)
    inverse = Propensities.read(dataset, every, Ranks()).of(true.values)
    counts = read_counts(dataset, every)[true.values]
    best = [np.concatenate(own) for own in labels]
    terms = [
        Terms.of(each, true.values, true.offsets, inverse, np.asarray(counts)) for each in best
    ]
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
    keys = dict.fromkeys(key for model in models for key in model.settings)
    values = {key: [model.settings.get(key) for model in models] for key in keys}
    return {
        key: row
        for key, row in values.items()
        if key not in NOT_SETTINGS and any(value != row[0] for value in row)
    }


def _changes(
    names: Sequence[str], dataset: Dataset, split: str, best: list[NDArray[np.int64]], true: Ragged
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Returns the points whose TOP labels gained or lost most right ones, against the first."""
    hits = [_hits(each, true) for each in best]
    found: dict[str, dict[str, list[dict[str, Any]]]] = {"gained": {}, "lost": {}}
    for i in range(1, len(names)):
        change = hits[i] - hits[0]
        for kind, sign in (("gained", 1), ("lost", -1)):
            order = np.argsort(-sign * change, kind="stable")[:EXAMPLES]
            rows = [int(row) for row in order if sign * change[row] > 0]
            found[kind][names[i]] = [
                _example(dataset, split, row, (best[0][row], best[i][row]), true) for row in rows
            ]
    return found


def _hits(best: NDArray[np.int64], true: Ragged) -> NDArray[np.int64]:
    """Counts the right labels in each row of `best`, int64 [n, TOP]; -1 is none."""
    width = int(max(best.max(initial=0), true.values.max(initial=0))) + 1
    row = np.arange(len(best))[:, None] * width
    keys = true.pairs()[0] * width + true.values
    return np.asarray((np.isin(row + best, keys) & (best >= 0)).sum(axis=1))


def _example(
    dataset: Dataset, split: str, row: int, best: tuple[Any, Any], true: Ragged
) -> dict[str, Any]:
    read = dataset.read_rows(split, row, row + 1, ["point_id", "input_ids"]).to_pylist()[0]
    try:
        serialised = tokenizer.load(dataset.manifest.tokenizer, fetch=False).serialised
        text = tokenizer.decode(serialised, [read["input_ids"]])[0]
    except ReneeError:
        text = f"point {read['point_id']}"
    right = set(true.values[true.offsets[row] : true.offsets[row + 1]].tolist())
    before, after = (
        [
            {"label": _label(dataset, int(id_)), "right": int(id_) in right}
            for id_ in ids
            if id_ >= 0
        ]
        for ids in best
    )
    return {"point_id": read["point_id"], "text": text, "before": before, "after": after}


def _label(dataset: Dataset, label: int) -> str:
    if label >= dataset.manifest.num_labels:  # it was added since
        return f"label {label}"
    text = dataset.read_rows("labels", label, label + 1, ["text"])["text"][0].as_py()
    return text or f"label {label}"
