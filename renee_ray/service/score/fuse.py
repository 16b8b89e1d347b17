"""`renee-ray fuse`: puts predictions of several models together, each row by a weighted sum."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq
from numpy.typing import NDArray

from renee_ray.config.fuse import FuseConfig
from renee_ray.data.dataset import Dataset
from renee_ray.data.destination import Destination, refuse_overlap
from renee_ray.data.sources.parquet import files_below
from renee_ray.data.storage import absolute, filesystem_of, read_file, write_file
from renee_ray.data.untrusted import parse_json
from renee_ray.errors import ReneeError, reason
from renee_ray.parallel.batch import Ragged, ragged
from renee_ray.parallel.collectives import Ranks
from renee_ray.scoring.fusion import Pairs, tuned
from renee_ray.scoring.metrics import KS, RECALL_KS, MetricSums
from renee_ray.scoring.scorer import Propensities
from renee_ray.service.score.predictions import PART_ROWS, PREDICTIONS, part_name
from renee_ray.xfc.labels import LabelRange

COLUMNS = ["point_id", "label_ids", "scores"]


def fuse(sources: list[str], destination: str, config: FuseConfig) -> dict[str, Any]:
    """Writes the fusion of predictions of the same points, in the format of `predict`.

    Logits, which `predict` writes unless it is told otherwise, become probabilities by a sigmoid.
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
    if config.tune:
        weights, facts = _tuned(len(sources), config)
    models = [_Predictions(source) for source in sources]
    output.claim()
    output.declare([part_name(first) for first in range(0, models[0].rows, PART_ROWS)])
    try:
        for first, points, pairs in _together(models):
            _write(f"{destination}/{part_name(first)}", points, *pairs.best(weights, config.k))
    except ReneeError:
        output.abandon()
        raise
    facts |= {"weights": weights.tolist(), "points": models[0].rows, "k": config.k}
    told = {"split": models[0].split, "scores": "probabilities", "step": None, "sources": sources}
    output.publish({**facts, **told})
    return facts


def _write(path: str, points: pa.Array, labels: Ragged, scores: NDArray[np.float64]) -> None:
    offsets = pa.array(labels.offsets.astype(np.int32))
    lists = [
        pa.ListArray.from_arrays(offsets, pa.array(values))
        for values in (labels.values, scores.astype(np.float32))
    ]
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table([points, *lists], names=COLUMNS), buffer, compression="zstd")
    write_file(path, buffer.getvalue())


class _Predictions:
    """A directory of predictions, read a block of rows at a time."""

    def __init__(self, path: str) -> None:
        self.path = path
        files = files_below(path)
        if not files:
            raise ReneeError(f"{path} holds no Parquet files; give a directory of predictions")
        filesystem = filesystem_of(path)[0]
        names = [filesystem_of(file)[1] for file in files]
        self._data = pads.dataset(names, filesystem=filesystem, format="parquet")
        if missing := sorted({*COLUMNS} - {*self._data.schema.names}):
            raise ReneeError(f"{path} has no column {missing[0]!r}; give predictions of points")
        manifest = parse_json(read_file(f"{path}/{PREDICTIONS.manifest}") or b"{}")
        self._logits = bool(manifest) and manifest.get("scores", "logits") == "logits"
        self.split = manifest.get("split")
        self.rows = self._data.count_rows()

    def blocks(self) -> Iterator[tuple[pa.Array, Ragged, NDArray[np.float64]]]:
        """Yields (point ids, labels, probabilities) of PART_ROWS points each."""
        waiting = self._data.schema.empty_table().select(COLUMNS)
        for batch in self._data.to_batches(columns=COLUMNS, batch_size=PART_ROWS):
            waiting = pa.concat_tables([waiting, pa.Table.from_batches([batch])])
            while len(waiting) >= PART_ROWS:
                yield self._block(waiting.slice(0, PART_ROWS))
                waiting = waiting.slice(PART_ROWS)
        if len(waiting):
            yield self._block(waiting)

    def _block(self, table: pa.Table) -> tuple[pa.Array, Ragged, NDArray[np.float64]]:
        points, found = table["point_id"].combine_chunks(), table["scores"].combine_chunks()
        try:
            labels, scores = ragged(table["label_ids"]), found.flatten().to_numpy().astype(float)
        except (pa.ArrowInvalid, ValueError) as error:
            raise ReneeError(
                f"{self.path} holds no lists of labels and scores ({reason(error):.80}); write "
                f"label_ids as lists of integers and scores as lists of numbers"
            ) from None
        lengths = pc.list_value_length(found).fill_null(-1).to_numpy()
        if (labels.lengths != lengths).any() or (labels.values < 0).any():
            raise ReneeError(
                f"{self.path} has a point without a score for each label, or a label below 0; "
                f"leave out what stands for no label"
            )
        if self._logits:
            scores = 1 / (1 + np.exp(-scores))
        if not ((scores >= 0) & (scores <= 1)).all():
            wrong = int(np.argmin((scores >= 0) & (scores <= 1)))
            point = points[int(np.searchsorted(labels.offsets, wrong, side="right")) - 1]
            raise ReneeError(
                f"{self.path} gives point {point} the score {scores[wrong]:.6g}, which is no "
                f"probability; write probabilities"
            )
        return points, labels, scores


def _together(models: list[_Predictions]) -> Iterator[tuple[int, pa.Array, Pairs]]:
    """Yields (first row, point ids, pairs) of blocks of points, the same of all models."""
    for i, blocks in enumerate(itertools.zip_longest(*(model.blocks() for model in models))):
        for model, block in zip(models[1:], blocks[1:], strict=True):
            if blocks[0] is None or block is None or not blocks[0][0].equals(block[0]):
                raise ReneeError(
                    f"{model.path} predicts other points than {models[0].path}, or the same in "
                    f"another order; predict the same source by both"
                )
        yield i * PART_ROWS, blocks[0][0], Pairs.of([block[1:] for block in blocks])


def _tuned(num_models: int, config: FuseConfig) -> tuple[NDArray[np.float64], dict[str, Any]]:
    """Chooses weights by the metric on predictions for the validation split of `config.data`."""
    if len(config.tune) != num_models or not config.data:
        raise ReneeError(
            f"tune={list(config.tune)} needs a directory of validation predictions for each of "
            f"the {num_models} models, and data= their dataset"
        )
    dataset = Dataset.open(config.data)
    rows = dataset.read_rows(
        "validation", 0, dataset.manifest.num_points("validation"), ["point_id", "labels"]
    )
    blocks = list(_together([_Predictions(absolute(each)) for each in config.tune]))
    points = pa.chunked_array([points for _, points, _ in blocks], type=pa.int64())
    if not points.equals(rows["point_id"]):
        raise ReneeError(
            f"{config.tune[0]} does not predict the validation points of {config.data}; make it "
            f"by `renee-ray predict RUN {config.data} {config.tune[0]} split=validation`"
        )
    true = ragged(rows["labels"])
    number = dataset.manifest.num_labels
    every = Propensities.read(dataset, LabelRange(0, number, number), Ranks())
    inverse = every.of(true.values)

    def quality(weights: NDArray[np.float64]) -> float:
        sums, most = MetricSums.zeros(), max(*KS, *RECALL_KS)
        for first, ids, pairs in blocks:
            found, _ = pairs.best(weights, most)
            predicted = np.full((len(ids), most), -1, dtype=np.int64)
            row, label = found.pairs()
            predicted[row, np.arange(len(row)) - found.offsets[row]] = label
            here = true.take(np.arange(first, first + len(ids)))
            of_here = inverse[true.offsets[first] : true.offsets[first + len(ids)]]
            sums.add(predicted, here.values, here.offsets, None, of_here)
        return sums.metrics()[config.metric]

    weights = tuned(num_models, quality)
    return weights, {f"validation {config.metric}": quality(weights)}
