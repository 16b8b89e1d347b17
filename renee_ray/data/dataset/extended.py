"""A dataset whose labels are followed by those that `renee-ray labels add` gave a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from renee_ray.data.dataset.reader import Dataset
from renee_ray.data.dataset.schema import LABELS


def hash_of_labels(dataset: Dataset) -> str | None:
    """Returns the hash of a dataset's label texts; None where it has none, or some were added."""
    known = not isinstance(dataset, Extended) and dataset.manifest.has_label_texts
    return dataset.manifest.labels_hash if known else None


class Extended(Dataset):
    """The dataset `base` with more labels, which no point of it has.

    added: (name, text) of the labels behind those of `base`. They have no tokens.
    """

    def __init__(self, base: Dataset, added: list[tuple[str, str]]) -> None:
        first = base.manifest.num_labels
        super().__init__(base.path, replace(base.manifest, num_labels=first + len(added)))
        self.base, self.added = base, added

    def __reduce__(self) -> tuple[Any, ...]:  # type: ignore[override]
        return Extended, (self.base, self.added)

    def read_rows(
        self, split: str, start: int, stop: int, columns: Sequence[str] | None = None
    ) -> pa.Table:
        """Reads rows [start, stop) of `split`, as `Dataset.read_rows` does."""
        if split != "labels":
            return self.base.read_rows(split, start, stop, columns)
        first = self.base.manifest.num_labels
        own = self.base.read_rows(split, min(start, first), min(stop, first), columns)
        ids = range(max(start, first), max(stop, first))
        more = {
            "label_id": list(ids),
            "text": [self.added[label - first][1] for label in ids],
            "input_ids": [[]] * len(ids),
            "train_count": [0] * len(ids),
            "is_point": [False] * len(ids),
        }
        return pa.concat_tables([own, pa.table(more, schema=LABELS).select(own.column_names)])
