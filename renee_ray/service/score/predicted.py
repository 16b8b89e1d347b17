"""Reads predictions, of `predict` or of any model that writes the same columns."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
from numpy.typing import NDArray

from renee_ray.data.dataset import Dataset
from renee_ray.data.sources.parquet import files_below
from renee_ray.data.storage import filesystem_of, read_file
from renee_ray.data.untrusted import parse_json
from renee_ray.errors import ReneeError, reason
from renee_ray.parallel.batch import Ragged, ragged
from renee_ray.service.score.predictions import PART_ROWS, PREDICTIONS

COLUMNS = ["point_id", "label_ids", "scores"]
Scored = tuple[Ragged, NDArray[np.float64]]
"""Labels of each point, best first, and their probabilities float64 [m]."""


class Predicted:
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


def together(models: list[Predicted]) -> Iterator[tuple[int, pa.Array, list[Scored]]]:
    """Yields (first row, point ids, each model's labels and probabilities) of blocks of points."""
    for i, blocks in enumerate(itertools.zip_longest(*(model.blocks() for model in models))):
        for model, block in zip(models[1:], blocks[1:], strict=True):
            if blocks[0] is None or block is None or not blocks[0][0].equals(block[0]):
                raise ReneeError(
                    f"{model.path} predicts other points than {models[0].path}, or the same in "
                    f"another order; predict the same source by both"
                )
        yield i * PART_ROWS, blocks[0][0], [block[1:] for block in blocks]


def true_labels(dataset: Dataset, split: str, points: pa.ChunkedArray, path: str) -> Ragged:
    """Returns the true labels of a split, whose points those predicted at `path` must be.

    Raises:
        ReneeError: they are other points, or the same in another order.
    """
    number = dataset.manifest.num_points(split)
    rows = dataset.read_rows(split, 0, number, ["point_id", "labels"])
    if not points.equals(rows["point_id"]):
        raise ReneeError(
            f"{path} does not predict the {split} points of {dataset.path}; make it by "
            f"`renee-ray predict RUN {dataset.path} {path} split={split}`"
        )
    return ragged(rows["labels"])


def padded(labels: Ragged, k: int) -> NDArray[np.int64]:
    """Returns the first k labels of each row, int64 [n, k], with -1 where there are fewer."""
    found = np.full((len(labels), k), -1, dtype=np.int64)
    row, label = labels.pairs()
    place = np.arange(len(row)) - labels.offsets[row]
    found[row[place < k], place[place < k]] = label[place < k]
    return found
