"""Predictions as Parquet: one part after another, in the order of the split's rows.

A rank scores a contiguous range of rows in windows, whose batches come in the order of the rows'
lengths. A part is some whole windows, put into the order of the rows again, and is named by its
first row; so the parts' names sort in the order of the rows, whatever the number of ranks.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from renee_ray.data.dataset import Dataset
from renee_ray.data.destination import Kind, listed_files
from renee_ray.data.storage import write_file
from renee_ray.data.targets import part_name
from renee_ray.parallel.batch import Batch
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
    re.compile(r"part-\d{12}\.parquet"), (), listed_files,
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
        ranges = (split_range(self.rows, self.num_ranks, r) for r in range(self.num_ranks))
        return [
            part_name(row) for first, stop in ranges for row in range(first, stop, self.part_rows)
        ]


class Writer:
    """One rank's parts, in the directory `destination`.

    texts: the dataset whose label texts are written too, or None.
    """

    def __init__(self, destination: str, part_rows: int, texts: Dataset | None) -> None:
        self._destination, self._part_rows = destination.rstrip("/"), part_rows
        self._texts = texts
        self._found: list[tuple[np.ndarray, pa.Table]] = []
        self._rows = 0

    def add(
        self,
        batch: Batch,
        labels: np.ndarray,
        scores: np.ndarray,
        parts: Sequence[np.ndarray] = (),
    ) -> None:
        """Takes labels int64 [b, k] and scores float32 [b, k] of a batch's rows, best first.

        parts: float32 [b, k] each, of the scores, for the columns `PARTS`.
        """
        assert batch.rows is not None
        kept = labels != NONE
        offsets = pa.array(np.concatenate([[0], np.cumsum(kept.sum(1))]).astype(np.int32))
        columns = {
            "point_id": pa.array(batch.points),
            "label_ids": pa.ListArray.from_arrays(offsets, pa.array(labels[kept])),
            "scores": pa.ListArray.from_arrays(offsets, pa.array(scores[kept])),
        }
        for name, part in zip(PARTS, parts, strict=False):
            columns[name] = pa.ListArray.from_arrays(offsets, pa.array(part[kept]))
        self._found.append((batch.rows, pa.table(columns)))
        self._rows += len(batch)
        if self._rows >= self._part_rows:
            self.close()

    def close(self) -> None:
        """Writes the rows that were added since the last part."""
        if not self._rows:
            return
        rows = np.concatenate([rows for rows, _ in self._found])
        table = pa.concat_tables([table for _, table in self._found])
        table = table.take(pa.array(np.argsort(rows))).combine_chunks()
        if self._texts is not None:
            ids = table["label_ids"].combine_chunks()
            texts = label_texts(self._texts, ids.values.to_numpy())
            texts = pa.ListArray.from_arrays(ids.offsets, texts)
            table = table.append_column("label_texts", texts)
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer, compression="zstd", row_group_size=GROUP_ROWS)
        write_file(f"{self._destination}/{part_name(int(rows.min()))}", buffer.getvalue())
        self._found, self._rows = [], 0


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
