"""Parts of predictions, in the order of the rows, from windows in the order of their lengths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as pads
import pytest

from renee_ray.data.dataset import Dataset
from renee_ray.data.order import scoring_order
from renee_ray.data.rows import read_window
from renee_ray.errors import ReneeError
from renee_ray.rank.batch import Position, cut_batches
from renee_ray.rank.collectives import Ranks
from renee_ray.scoring.scorer import topk_bytes
from renee_ray.service.score import predictions
from renee_ray.service.score.predictions import Layout, rows_of, write_rows
from renee_ray.service.score.worker import passes_needed
from renee_ray.xfc.labels import LabelRange, split_range

from ..data.tiny import write_tiny

PARTS = (9, 0, 1, 13, 7)


class Counting(Dataset):
    """Counts how often each range of rows is read."""

    reads: ClassVar = Counter[str]()

    def read_rows(
        self, split: str, start: int, stop: int, columns: Sequence[str] | None = None
    ) -> pa.Table:
        self.reads[f"{split} from {start}"] += 1
        return super().read_rows(split, start, stop, columns)


def write(dataset: Dataset, layout: Layout, destination: Path, texts: Dataset | None) -> None:
    """What each rank would write, had it found labels that tell the row."""
    order = scoring_order(
        "test", list(PARTS), batch_size=layout.batch_size, num_ranks=layout.num_ranks,
        window=layout.window,
    )  # fmt: skip
    for rank in range(layout.num_ranks):
        tables = [
            read_window(dataset, order, order.slots_of(rank, layout.num_ranks), window)
            for window in range(order.num_windows)
        ]
        tables = [
            table.append_column("epoch", pa.array(np.zeros(len(table), int))) for table in tables
        ]
        positions = [Position(0, batch) for batch in range(order.num_batches)]
        found = []
        for batch in cut_batches(tables, positions, 0, 99):
            assert batch.rows is not None
            labels = (batch.points[:, None] + np.arange(layout.k)) % dataset.manifest.num_labels
            labels[batch.points % 3 == 0, -1] = -1
            scores = labels.astype(np.float32)
            more = [scores + 1, scores + 2, scores + 3]
            found.append(rows_of(batch, labels, scores, more))
        for first in range(0, len(found), layout.part_batches):
            write_rows(str(destination), found[first : first + layout.part_batches], texts)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 40])
@pytest.mark.parametrize(("batch_size", "pairs"), [(1, 4), (4, 16), (5, 1), (6, 64), (100, 10**6)])
def test_parts_are_in_the_order_of_the_rows(
    tmp_path: Path, num_ranks: int, batch_size: int, pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictions, "PART_PAIRS", pairs)
    write_tiny(tmp_path / "set", test=PARTS)
    dataset = Counting.open(str(tmp_path / "set"))
    layout = Layout(sum(PARTS), num_ranks, batch_size, 2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "_predictions.json").write_text("{}")
    dataset.reads.clear()
    write(dataset, layout, tmp_path / "out", dataset)
    assert layout.blocks == max(
        len(range(first, stop, layout.part_rows))
        for first, stop in (split_range(sum(PARTS), num_ranks, rank) for rank in range(num_ranks))
    )
    parts = sorted(path.name for path in (tmp_path / "out").glob("*.parquet"))
    assert parts == layout.parts()
    wanted = dataset.read_rows("test", 0, sum(PARTS))["point_id"].to_pylist()
    assert wanted != sorted(wanted)
    found = pd.read_parquet(tmp_path / "out")
    assert found["point_id"].tolist() == wanted
    assert pads.dataset(tmp_path / "out").to_table()["point_id"].to_pylist() == wanted
    for row in found.to_dict("records"):
        point = int(row["point_id"])
        labels = [
            (point + i) % dataset.manifest.num_labels for i in range(1 if point % 3 == 0 else 2)
        ]
        assert row["label_ids"].tolist() == row["scores"].tolist() == labels
        for more, name in enumerate(predictions.PARTS, 1):
            assert row[name].tolist() == [label + more for label in labels]
        assert row["label_texts"].tolist() == [f"label {label}" for label in labels]
    assert max(dataset.reads.values()) <= len(parts), "texts are read once for each part"


@pytest.mark.parametrize("k", [1, 100, 3000, 10**6, 10**9])
@pytest.mark.parametrize("num_ranks", [1, 3, 64])
def test_what_a_rank_holds_is_bounded(k: int, num_ranks: int) -> None:
    layout = Layout(10**7, num_ranks, 512, k)
    batch = -(-512 // num_ranks)
    assert layout.part_rows * k <= max(predictions.PART_PAIRS, batch * k)
    assert layout.part_rows % (layout.window * batch) == 0
    usual = Layout(10**7, 1, 512, 100)
    assert (usual.window, usual.part_rows) == (16, 16384)


def test_passes_are_as_many_as_memory_needs() -> None:
    """12 bytes a label and row are the least that the search takes."""
    free, owned = 2**30, LabelRange(0, 5000, 5000)

    def passes(rows: int, k: int, label_bytes: int) -> int:
        return passes_needed(Layout(10**6, 1, rows, k), owned, Ranks(), label_bytes, free)

    assert passes(512, 100, 1000) == 1
    left = free - topk_bytes(512, 100, 5000, 1)
    assert passes(512, 100, left // 5000) == 1
    assert passes(512, 100, left // 5000 + 1) == 2
    assert passes(512, 100, 4 * (left // 5000)) == 4
    # How much the search takes depends on the number of threads.
    with pytest.raises(ReneeError, match=r"k=5000 .* [\d.]+ GiB more than some worker has"):
        passes(10**5, 5000, 1)
    assert passes_needed(Layout(100, 1, 10**5, 5000), owned, Ranks(), 1, free) == 1
