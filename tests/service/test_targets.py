"""Distillation by the real commands: a bag teaches another through `feed.targets`."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.dataset as pads
import pytest
import yaml

from renee_ray.cli.main import main
from renee_ray.data.dataset import Dataset

from .conftest import RECIPE

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]


def recipe(path: Path, dataset: str, run: str, **more: object) -> str:
    encoder = {"name": "none", "max_length": 10, "bag": {"dim": 32, "buckets": 1 << 10}}
    config = {**RECIPE, "epochs": 1, "encoder": encoder, "data": dataset, "output": run, **more}
    path.write_text(yaml.safe_dump(config))
    return str(path)


def test_a_run_is_taught_by_the_predictions_of_another(
    dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, student, taught = (str(tmp_path / name) for name in ("teacher", "student", "taught"))
    assert main(["train", recipe(tmp_path / "t.yaml", dataset, teacher)]) == 0
    predict = ["predict", teacher, dataset, taught, "split=train", "k=20", "num_workers=1"]
    assert main([*predict, "scores=probabilities"]) == 0
    rows = Dataset.open(dataset).manifest.num_points("train")
    points = Dataset.open(dataset).read_rows("train", 0, rows, ["point_id"])["point_id"]
    table = pads.dataset(sorted(map(str, Path(taught).glob("*.parquet")))).to_table()
    assert table["point_id"].to_pylist() == points.to_pylist()
    for scores in table["scores"].to_pylist():
        assert all(0 <= b <= a <= 1 for a, b in pairwise(scores))

    feed = {**RECIPE["feed"], "targets": taught, "targets_weight": 0.5, "augment": 0.5}
    classifier = {**RECIPE["classifier"], "objective": "softmax"}
    given = recipe(tmp_path / "s.yaml", dataset, student, feed=feed, classifier=classifier)
    assert main(["train", given]) == 0
    steps = json.loads((Path(student) / "history.json").read_text())["steps"]
    losses = [step["loss"] for step in steps]
    assert len(losses) > 5 and min(losses[1:]) < losses[0] and np.isfinite(losses).all()

    capsys.readouterr()
    assert main(["predict", student, dataset, str(tmp_path / "p"), "scores=probabilities"]) == 1
    assert "take a run trained by bce" in capsys.readouterr().err
    assert main(["train", given, f"output={tmp_path / 'x'}", f"feed.targets={tmp_path / 'y'}"]) == 1
    assert "no complete predictions" in capsys.readouterr().err
