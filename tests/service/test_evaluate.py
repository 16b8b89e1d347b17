"""What `evaluate` reads and makes of calibrations, with a worker in this process and no Ray."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from renee_ray.config.schema import EvalConfig
from renee_ray.errors import ReneeError
from renee_ray.rank.batch import Batch, Position, Ragged
from renee_ray.rank.collectives import Ranks
from renee_ray.scoring.scorer import Answer
from renee_ray.service.run.directory import RunDirectory
from renee_ray.service.score import evaluate
from renee_ray.service.score.calibrate import CALIBRATION
from renee_ray.service.score.predictions import Layout
from renee_ray.xfc.labels import LabelRange

from ..data.tiny import write_tiny

ROWS = 20


class FakeWorker:
    """One rank that finds label 0 for all rows; of every second one it is true."""

    ranks, device, owned = Ranks(), torch.device("cpu"), LabelRange(0, 11, 11)

    def passes(self, layout: Layout) -> int:
        return 1

    def answers(self, *_: Any) -> Iterator[list[Answer]]:
        rows, none = np.arange(ROWS), Ragged.of_lists([[]] * ROWS)
        true = Ragged.of_lists([[0] if row % 4 < 2 else [1] for row in rows])
        batch = Batch(Position(), rows, none, true, none, pad_id=0, rows=rows)
        yield [Answer(batch, torch.ones(ROWS, 1), torch.zeros(ROWS, 1, dtype=torch.int64), [])]


def test_a_damaged_calibration_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "Worker", SimpleNamespace(of=lambda job: FakeWorker()))
    (tmp_path / CALIBRATION).write_text("[]")

    def evaluated(*, calibrate: bool) -> dict[str, Any]:
        job = SimpleNamespace(
            labels=write_tiny(tmp_path / "set"),
            layout=lambda points, split, k: Layout(ROWS, 1, ROWS, k),
            directory=RunDirectory(str(tmp_path)), checkpoint="step-3",
            config=SimpleNamespace(evaluation=EvalConfig()),
            score=SimpleNamespace(calibrate=calibrate),
        )  # fmt: skip
        return evaluate.evaluate_worker({"job": job, "points": job.labels, "split": "validation"})

    with pytest.raises(ReneeError, match=f"{CALIBRATION} is damaged"):
        evaluated(calibrate=False)
    found = evaluated(calibrate=True)
    assert found["fitted"].keys() == {"slope", "intercept"}
    assert found["calibration"]["labels"] == ROWS // 2
