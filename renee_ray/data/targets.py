"""Soft targets: a teacher's predictions for the training points, read along with them.

The directory is as `renee-ray predict RUN DATASET DST split=train scores=probabilities` writes it,
by whatever model:

    part-FIRST.parquet    point_id int64, label_ids list<int64>, scores list<float> in [0, 1]; rows
                          in the order of the split, from row FIRST (12 digits) on
    _predictions.json     {"split": "train", "points": N, ...}; written last

Rows are matched by their position in the split, so a window of training points reads the row
groups of its own rows alone; nothing is joined, converted or held. Each point_id is compared.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from renee_ray.data.dataset import Dataset, hash_of_labels
from renee_ray.data.dataset.reader import overlapping_groups
from renee_ray.data.storage import (
    absolute,
    filesystem_of,
    is_transient,
    listing,
    patiently,
    read_file,
)
from renee_ray.data.untrusted import object_or_empty, read_row_groups
from renee_ray.errors import ReneeError, reason

PREDICTED, PROBABILITIES = "predicted", "probabilities"
"""Columns added to a window's rows: the labels that the teacher lists, and their probabilities."""
MANIFEST = "_predictions.json"
REMEDY = (
    "make them by `renee-ray predict RUN DATASET DST split=train scores=probabilities` for the "
    "dataset that is trained on"
)
_PART = re.compile(r"part-(\d{12})\.parquet", re.ASCII)
_COLUMNS = pa.schema(
    {
        "point_id": pa.int64(),
        "label_ids": pa.list_(pa.int64()),
        "scores": pa.list_(pa.float32()),
    }
)


def part_name(first: int) -> str:
    """Returns the name of the part that begins with this row of the split."""
    return f"part-{first:012d}.parquet"


@dataclass(frozen=True)
class Targets:
    """Predictions for rows of the split train.

    bounds: row that each part begins with, ascending, then the row after the last; labels: their
    number.
    """

    path: str
    bounds: tuple[int, ...]
    labels: int

    @classmethod
    def of(cls, path: str, dataset: Dataset) -> Targets | None:
        """Opens the predictions at `path` for the training points of a dataset; None if empty.

        Raises:
            ReneeError: they are not there, not complete, or not for these points; the first or the
                last row, which are read, is as in `read`.
        """
        if not path:
            return None
        path, rows = absolute(path), dataset.manifest.num_points("train")
        names = [match[1] for each in listing(path) if (match := _PART.fullmatch(each.base_name))]
        parts = sorted(map(int, names))
        found = object_or_empty(read_file(f"{path}/{MANIFEST}") or b"")
        told = found.get("split"), found.get("points")
        if told != ("train", rows) or parts[:1] != [0] or parts[-1] >= rows:
            raise ReneeError(
                f"feed.targets={path} are no complete predictions for the {rows} training points "
                f"of {dataset.path}: {MANIFEST} tells of split={told[0]!r:.20} with "
                f"{told[1]!r:.20} points, in {len(parts)} parts; {REMEDY}"
            )
        number, own = dataset.manifest.num_labels, hash_of_labels(dataset)
        # A teacher of fewer labels may have been trained before the others came behind its own.
        others = found.get("labels_hash") if found.get("num_labels") == number else None
        if own and others not in (None, own):
            raise ReneeError(
                f"feed.targets={path} were predicted for other labels than those of "
                f"{dataset.path}, or for the same in another order; {REMEDY}"
            )
        targets = cls(path, (*parts, rows), number)
        for row in (0, rows - 1):
            point = dataset.read_rows("train", row, row + 1, ["point_id"])["point_id"].to_numpy()
            targets.within(row, row + 1).read(row, point)
        return targets

    def within(self, start: int, stop: int) -> Targets:
        """Returns the parts of the rows [start, stop), at least one row, alone."""
        first = bisect_right(self.bounds, start) - 1
        last = bisect_left(self.bounds, stop)
        return replace(self, bounds=self.bounds[first : last + 1])

    def read(self, first: int, points: np.ndarray) -> dict[str, pa.ChunkedArray]:
        """Reads the predictions for the rows from `first` on, whose ids int64 [n] are `points`.

        Returns:
            PREDICTED list<int64>, PROBABILITIES list<float>; [n] each.

        Raises:
            ReneeError: a part cannot be read, or a row is of another point, or holds an unknown
                label or a score outside [0, 1].
        """
        stop = first + len(points)
        tables = [
            patiently(
                partial(self._read_part, begin, end - begin, first - begin, stop - begin),
                f"reading {self.path}/{part_name(begin)}",
            )
            for begin, end in pairwise(self.bounds)
        ]
        table = pa.concat_tables(tables)
        if wrong := self._wrong(table, points):
            raise ReneeError(f"{self.path} {wrong}; {REMEDY}")
        return {PREDICTED: table["label_ids"], PROBABILITIES: table["scores"]}

    def _read_part(self, begin: int, rows: int, start: int, stop: int) -> pa.Table:
        filesystem, root = filesystem_of(self.path)
        start, stop = max(start, 0), min(stop, rows)
        try:
            with filesystem.open_input_file(f"{root}/{part_name(begin)}") as source:
                file = pq.ParquetFile(source, page_checksum_verification=True)
                if file.metadata.num_rows != rows:
                    raise ValueError(f"{file.metadata.num_rows} rows in place of {rows}")
                groups, skip = overlapping_groups(file.metadata, start, stop)
                table = read_row_groups(file, groups, _COLUMNS.names)
            return table.select(_COLUMNS.names).cast(_COLUMNS).slice(skip, stop - start)
        except (OSError, ValueError, KeyError, NotImplementedError) as error:
            if is_transient(error):
                raise
            raise ReneeError(
                f"{self.path}/{part_name(begin)} cannot be read ({type(error).__name__}: "
                f"{reason(error):.200}); {REMEDY}"
            ) from error

    def _wrong(self, table: pa.Table, points: np.ndarray) -> str | None:
        """Says which value cannot be used, as the predicate of a sentence; or None."""
        lists = pc.list_value_length(table["label_ids"])
        labels, scores = (pc.list_flatten(table[name]) for name in ("label_ids", "scores"))
        nulls = sum(column.null_count for column in (*table.columns, labels, scores))
        if nulls or not lists.equals(pc.list_value_length(table["scores"])):
            return "holds a null, or lists of label_ids and scores that differ in length"
        ids = table["point_id"].to_numpy()
        if len(other := np.flatnonzero(ids != points)):
            return f"has point {ids[other[0]]} where the dataset has point {points[other[0]]}"
        labels, scores = labels.to_numpy(), scores.to_numpy()
        of_pair = np.repeat(np.arange(len(ids)), lists.to_numpy())
        if len(bad := np.flatnonzero((labels < 0) | (labels >= self.labels))):
            label, point = labels[bad[0]], ids[of_pair[bad[0]]]
            return f"has label {label} of point {point}, not in [0, {self.labels})"
        if len(bad := np.flatnonzero(~((scores >= 0) & (scores <= 1)))):
            point = ids[of_pair[bad[0]]]
            return f"has score {scores[bad[0]]:.6g} of point {point}, which is no probability"
        return None
