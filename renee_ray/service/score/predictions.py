"""Predictions as Parquet: one part after another, in the order of the split's rows.

A rank scores a contiguous range of rows in windows, whose batches come in the order of the rows'
lengths. A part is some whole windows, put into the order of the rows again, and is named by its
first row; so the parts' names sort in the order of the rows, whatever the number of ranks.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq
from numpy.typing import NDArray

from renee_ray.data.dataset import Dataset
from renee_ray.data.destination import Kind
from renee_ray.data.sources.parquet import files_below
from renee_ray.data.storage import awaited, filesystem_of, listing, read_file, write_file
from renee_ray.data.targets import part_name
from renee_ray.data.untrusted import parse_json
from renee_ray.errors import ReneeError, reason
from renee_ray.rank.batch import Batch, Ragged, ragged
from renee_ray.xfc.labels import split_range
from renee_ray.xfc.topk.select import NONE

PART_ROWS, PART_PAIRS = 1 << 14, 1 << 21
"""Most rows, and most pairs of a row and a label, of a part; one batch may exceed them."""
GROUP_ROWS = 1 << 10
"""Rows of a row group, so that training reads the few that it needs (`data.targets`)."""
PARTS = "of_transformer", "of_bag", "of_rest"
"""Columns of what a score is made of; the last has the constant, the adjustment and the votes."""
WINDOW = 16
"""Most batches of a window."""
PREDICTIONS = Kind(
    "predictions", "_predictions.json", "_claim.json", frozenset({"k", "step"}),
    re.compile(r"part-\d{12}\.parquet"), (),
)  # fmt: skip
"""Files beside Parquet begin with `_`: readers of a directory of Parquet skip them."""


@dataclass(frozen=True)
class Layout:
    """The parts that R ranks write the k best labels of a split's rows to."""

    rows: int
    num_ranks: int
    batch_size: int
    k: int

    @property
    def _batch_rows(self) -> int:
        """Rows of one rank's batch, as `data.order.scoring_order` cuts them."""
        return -(-self.batch_size // self.num_ranks)

    @property
    def window(self) -> int:
        """Batches that are ordered by length together."""
        return max(1, min(WINDOW, self._part_rows // self._batch_rows))

    @property
    def part_rows(self) -> int:
        """Rows of a part: a multiple of a window's rows."""
        rows = self.window * self._batch_rows
        return rows * max(1, self._part_rows // rows)

    @property
    def part_batches(self) -> int:
        """Batches of a part."""
        return self.part_rows // self._batch_rows

    @property
    def blocks(self) -> int:
        """Parts of the rank that has most rows."""
        return -(-self.rows // (self.num_ranks * self.part_rows))

    @property
    def _part_rows(self) -> int:
        return min(PART_ROWS, PART_PAIRS // self.k)

    def parts(self) -> list[str]:
        """Returns the names of all parts, in the order of their rows."""
        return [name for rank in range(self.num_ranks) for name in self.parts_of(rank)]

    def parts_of(self, rank: int) -> list[str]:
        """Returns the names of a rank's parts, one for each of its first blocks."""
        first, stop = split_range(self.rows, self.num_ranks, rank)
        return [part_name(row) for row in range(first, stop, self.part_rows)]


def rows_of(
    batch: Batch, labels: np.ndarray, scores: np.ndarray, parts: Sequence[np.ndarray] = ()
) -> pa.Table:
    """Makes rows of a part from labels int64 [b, k] and scores float32 [b, k], best first.

    parts: float32 [b, k] each, of the scores, for the columns `PARTS`. A column `row` besides has
    the rows' positions in the split.
    """
    kept = labels != NONE
    offsets = pa.array(np.concatenate([[0], np.cumsum(kept.sum(1))]).astype(np.int32))
    columns = {"row": pa.array(batch.rows), "point_id": pa.array(batch.points)}
    for name, each in zip(("label_ids", "scores", *PARTS), (labels, scores, *parts), strict=False):
        columns[name] = pa.ListArray.from_arrays(offsets, pa.array(each[kept]))
    return pa.table(columns)


def write_rows(destination: str, tables: Sequence[pa.Table], texts: Dataset | None) -> None:
    """Writes what `rows_of` made as a part, in the order of the rows; nothing if there are none.

    texts: the dataset whose label texts are written too, or None.
    """
    if not sum(map(len, tables)):
        return
    table = pa.concat_tables(tables).sort_by("row").combine_chunks()
    name = part_name(table["row"][0].as_py())
    table = table.drop_columns("row")
    if texts is not None:
        ids = table["label_ids"].combine_chunks()
        found = pa.ListArray.from_arrays(ids.offsets, label_texts(texts, ids.values.to_numpy()))
        table = table.append_column("label_texts", found)
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd", row_group_size=GROUP_ROWS)
    write_file(f"{destination}/{name}", buffer.getvalue())


def missing_parts(destination: str, names: Sequence[str]) -> list[str]:
    """Returns those of the parts that are not there, or are empty."""
    sizes = {info.base_name: info.size for info in listing(destination)}
    return [name for name in names if not sizes.get(name)]


def check_parts(destination: str, names: Sequence[str]) -> None:
    """Waits until this node sees all parts, which NFS may take a while for.

    Raises:
        ReneeError: it does not.
    """
    awaited(lambda: not missing_parts(destination, names))
    if missing := missing_parts(destination, names):
        raise ReneeError(
            f"{destination}/{missing[0]}, which a worker has written, is not there or empty: "
            f"either nodes do not share {destination}, or the file was removed; give a directory "
            f"that all nodes share, or the same command again, which makes what is missing"
        )


def label_texts(dataset: Dataset, labels: np.ndarray) -> pa.Array:
    """Returns the texts of labels int64 [m]; reads each part that holds one of them once."""
    ids, inverse = np.unique(labels, return_inverse=True)
    pieces = []
    starts = [part.first for part in dataset.manifest.splits["labels"]]
    added = dataset.manifest.num_points("labels")  # behind the last part, where there are any
    for start, end in itertools.pairwise([*starts, added, dataset.manifest.num_labels]):
        first, stop = np.searchsorted(ids, [start, end])
        if first < stop:
            texts = dataset.read_rows("labels", start, end, ["text"])["text"]
            texts = texts.cast(pa.large_string()).combine_chunks()
            pieces.append(texts.take(pa.array(ids[first:stop] - start)))
    texts = pa.concat_arrays(pieces) if pieces else pa.array([], type=pa.large_string())
    return texts.take(pa.array(inverse))


COLUMNS = ["point_id", "label_ids", "scores"]
Scored = tuple[Ragged, NDArray[np.float64]]
"""Labels of each point, best first, and their probabilities float64 [m]."""


class Predicted:
    """A directory of predictions, read a block of rows at a time."""

    def __init__(self, path: str) -> None:
        self.path = path
        if read_file(f"{path}/{PREDICTIONS.claim}") is not None:
            raise ReneeError(
                f"{path} is not complete: a command writes to it, or was cut off and has left "
                f"{PREDICTIONS.claim}; finish that `renee-ray predict` or `fuse` first"
            )
        files = files_below(path)
        if not files:
            raise ReneeError(f"{path} holds no Parquet files; give a directory of predictions")
        filesystem = filesystem_of(path)[0]
        names = [filesystem_of(file)[1] for file in files]
        self._data = pads.dataset(names, filesystem=filesystem, format="parquet")
        if missing := sorted({*COLUMNS} - {*self._data.schema.names}):
            raise ReneeError(f"{path} has no column {missing[0]!r}; give predictions of points")
        manifest = parse_json(read_file(f"{path}/{PREDICTIONS.manifest}") or b"{}")
        self.logits = bool(manifest) and manifest.get("scores", "logits") == "logits"
        self.split, self.objective = manifest.get("split"), manifest.get("objective", "bce")
        self.labels = manifest.get("num_labels"), manifest.get("labels_hash")
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
        points = table["point_id"].combine_chunks()
        try:
            labels = ragged(table["label_ids"].cast(pa.list_(pa.int64())))
            found = table["scores"].combine_chunks().cast(pa.list_(pa.float64()))
            scores = found.flatten().to_numpy()
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
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
        labels, scores = _best_first(labels, scores)  # before sigmoids, which round to 1
        if self.logits:
            scores = 1 / (1 + np.exp(-scores))
        if not ((scores >= 0) & (scores <= 1)).all():
            wrong = int(np.argmin((scores >= 0) & (scores <= 1)))
            point = points[int(np.searchsorted(labels.offsets, wrong, side="right")) - 1]
            raise ReneeError(
                f"{self.path} gives point {point} the score {scores[wrong]:.6g}, which is no "
                f"probability; write probabilities"
            )
        return points, labels, scores


def _best_first(labels: Ragged, scores: NDArray[np.float64]) -> Scored:
    """Sorts each row by its scores, the best first, where it is not; equal ones stay in order."""
    rows = labels.pairs()[0]
    if not ((np.diff(scores) > 0) & (np.diff(rows) == 0)).any():
        return labels, scores
    order = np.lexsort((-scores, rows))
    return Ragged(labels.values[order], labels.offsets), scores[order]


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
        ReneeError: they are other points, the same in another order, or none has a label.
    """
    number = dataset.manifest.num_points(split)
    rows = dataset.read_rows(split, 0, number, ["point_id", "labels"])
    if not points.equals(rows["point_id"]):
        raise ReneeError(
            f"{path} does not predict the {split} points of {dataset.path}; make it by "
            f"`renee-ray predict RUN {dataset.path} {path} split={split}`"
        )
    true = ragged(rows["labels"])
    if not len(true.values):
        raise ReneeError(f"no point of split={split} of {dataset.path} has a label to compare with")
    return true


def padded(labels: Ragged, k: int) -> NDArray[np.int64]:
    """Returns the first k labels of each row, int64 [n, k], with -1 where there are fewer."""
    found = np.full((len(labels), k), -1, dtype=np.int64)
    row, label = labels.pairs()
    place = np.arange(len(row)) - labels.offsets[row]
    found[row[place < k], place[place < k]] = label[place < k]
    return found
