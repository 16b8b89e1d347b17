"""`renee-ray fuse`: puts predictions of several models together, each row by a weighted sum."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from renee_ray.config.score import FuseConfig
from renee_ray.data.dataset import Dataset
from renee_ray.data.destination import Destination, refuse_overlap
from renee_ray.data.storage import absolute, write_file
from renee_ray.errors import ReneeError
from renee_ray.rank.batch import Ragged
from renee_ray.rank.collectives import Ranks
from renee_ray.scoring.fusion import Pairs, tuned
from renee_ray.scoring.metrics import MOST, MetricSums
from renee_ray.scoring.scorer import Propensities
from renee_ray.service.score.predictions import (
    COLUMNS,
    PART_ROWS,
    PREDICTIONS,
    Predicted,
    padded,
    part_name,
    together,
    true_labels,
)
from renee_ray.xfc.labels import LabelRange


def fuse(sources: list[str], destination: str, config: FuseConfig) -> dict[str, Any]:
    """Writes the fusion of predictions of the same points, in the format of `predict`.

    Logits, which `predict` writes unless it is told otherwise, become probabilities by a sigmoid;
    those of a softmax are refused.
    The scores of other models must be probabilities. `scores` of the result are weighted sums
    of them, float32 in [0, 1].

    Returns:
        "weights", "points", "k", and with `tune` the metric on the validation points.

    Raises:
        ReneeError: predictions of other points or in another order, scores that are no
            probabilities, or a destination that is taken.
    """
    sources, destination = [absolute(each) for each in sources], absolute(destination)
    if len(sources) < 2:
        raise ReneeError("fuse needs two directories of predictions at least, and a destination")
    for source in (*sources, *config.tune):
        refuse_overlap(source, destination)
    output = Destination(destination, PREDICTIONS, config.overwrite)
    output.check()
    facts: dict[str, Any] = {}
    weights = np.array(config.weights or [1 / len(sources)] * len(sources))
    if len(weights) != len(sources) or weights.sum() <= 0:
        raise ReneeError(
            f"weights={list(config.weights)} do not fit {len(sources)} directories of predictions; "
            f"give a positive number for each"
        )
    weights = weights / weights.sum()
    models = [_opened(source) for source in sources]
    _check_labels(models)
    if config.tune:
        weights, facts = _tuned(len(sources), config)
    if config.overwrite:  # the earlier result stays unless the new one can be made
        for _ in together(models):
            pass
    output.claim()
    output.declare([part_name(first) for first in range(0, models[0].rows, PART_ROWS)])
    try:
        for first, points, scored in together(models):
            best = Pairs.of(scored).best(weights, config.k)
            _write(f"{destination}/{part_name(first)}", points, *best)
    except ReneeError:
        output.abandon()
        raise
    facts |= {"weights": weights.tolist(), "points": models[0].rows, "k": config.k}
    number, labels = models[0].labels
    told = {
        "split": models[0].split, "scores": "probabilities", "step": None, "sources": sources,
        "num_labels": number, "labels_hash": labels,
    }  # fmt: skip
    output.publish({**facts, **told})
    return facts


def _opened(path: str) -> Predicted:
    found = Predicted(path)
    if found.logits and found.objective == "softmax":
        raise ReneeError(
            f"{path} has logits of a run trained by softmax, whose sigmoids are no probabilities; "
            f"predict again with scores=calibrated"
        )
    return found


def _check_labels(models: list[Predicted]) -> None:
    """Refuses predictions of other labels; of more labels, the first ones may be the same."""
    known: dict[Any, tuple[Any, str]] = {}
    for model in models:
        number, labels = model.labels
        if labels is not None:
            before = known.setdefault(number, (labels, model.path))
            if before[0] != labels:
                raise ReneeError(
                    f"{before[1]} and {model.path} are predictions of different labels, or of the "
                    f"same in another order; fuse predictions of models of one dataset"
                )


def _write(path: str, points: pa.Array, labels: Ragged, scores: NDArray[np.float64]) -> None:
    offsets = pa.array(labels.offsets.astype(np.int32))
    lists = [
        pa.ListArray.from_arrays(offsets, pa.array(values))
        for values in (labels.values, scores.astype(np.float32))
    ]
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table([points, *lists], names=COLUMNS), buffer, compression="zstd")
    write_file(path, buffer.getvalue())


def _tuned(num_models: int, config: FuseConfig) -> tuple[NDArray[np.float64], dict[str, Any]]:
    """Chooses weights by the metric on predictions for the validation split of `config.data`."""
    if len(config.tune) != num_models or not config.data:
        raise ReneeError(
            f"tune={list(config.tune)} needs a directory of validation predictions for each of "
            f"the {num_models} models, and data= their dataset"
        )
    dataset = Dataset.open(config.data)
    validation = [_opened(absolute(each)) for each in config.tune]
    _check_labels(validation)
    blocks = [(first, ids, Pairs.of(scored)) for first, ids, scored in together(validation)]
    points = pa.chunked_array([ids for _, ids, _ in blocks], type=pa.int64())
    true = true_labels(dataset, "validation", points, config.tune[0])
    number = dataset.manifest.num_labels
    every = Propensities.read(dataset, LabelRange(0, number, number), Ranks())
    inverse = every.of(true.values)

    def quality(weights: NDArray[np.float64]) -> float:
        sums = MetricSums()
        for first, ids, pairs in blocks:
            predicted = padded(pairs.best(weights, MOST)[0], MOST)
            here = true.take(np.arange(first, first + len(ids)))
            of_here = inverse[true.offsets[first] : true.offsets[first + len(ids)]]
            sums.add(predicted, here, of_here)
        return sums.metrics()[config.metric]

    weights = tuned(num_models, quality)
    return weights, {f"validation {config.metric}": quality(weights)}
