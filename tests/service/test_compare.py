"""`compare` on predictions: its figures, its page, what it refuses. On runs: test_bag.py."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from renee_ray.cli.main import main
from renee_ray.data.dataset import Dataset
from renee_ray.service.score.compare import Compared, _terms

from ..data.tiny import write_tiny
from .test_fuse import Rows, write


@pytest.fixture
def models(tmp_path: Path) -> tuple[str, list[str]]:
    """A dataset, and predictions of its validation points by a poor and by a good model."""
    dataset = write_tiny(tmp_path / "set", validation=(60, 41))
    drawn = np.random.default_rng(0)
    rows: list[Rows] = [[], []]
    for point in dataset.read_rows("validation", 0, 101).to_pylist():
        for found, right in zip(rows, (0.2, 0.9), strict=True):
            scores = {int(label): float(drawn.random()) for label in drawn.permutation(11)}
            for label in point["labels"]:
                scores[label] += float(drawn.random() < right)
            found.append((point["point_id"], {k: v / 2 for k, v in scores.items()}))
    paths = [write(tmp_path / name, found, 3) for name, found in zip("ab", rows, strict=True)]
    return str(tmp_path / "set"), paths


def test_a_better_model_is_told_with_examples_on_a_page(
    models: tuple[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, paths = models
    given = [f"data={data}", "split=validation", f"output={tmp_path}/out"]
    assert main(["compare", *paths, *given, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["models"] == ["a", "b"] and found["points"] == 101
    assert "P@1" in found["differ"]["b"]
    first, second = found["metrics"]["P@1"]
    assert first["value"] < second["difference_low"] + first["value"] < second["value"]
    for example in found["gained"]["b"]:
        before, after = (sum(e["right"] for e in example[side]) for side in ("before", "after"))
        assert after > before
    page = Path(found["report"]).read_text(encoding="utf-8")
    assert "b differs from a in" in page and not re.search(r"(src|href)=.?http|url\(", page)
    assert main(["compare", *paths, *given]) == 0
    assert "b differs from a in" in " ".join(capsys.readouterr().out.split())


def test_what_one_model_has_retired_no_other_answers(models: tuple[str, list[str]]) -> None:
    data, paths = models
    hidden = np.array([0, 3, 4], np.int64)
    given = [
        Compared(name, path, {}, {}, retired)
        for name, path, retired in zip("ab", paths, (hidden[:0], hidden), strict=True)
    ]
    _, best, true = _terms(given, Dataset.open(data), "validation")
    assert len(true.values) and not np.isin(true.values, hidden).any()
    for labels in best:
        assert (labels >= 0).any() and not np.isin(labels, hidden).any()


def test_the_order_of_labels_in_a_row_does_not_matter(
    models: tuple[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As another program may write them."""
    data, (_, path) = models
    (tmp_path / "turned").mkdir()
    for part in Path(path).glob("*.parquet"):
        table = pq.read_table(part)
        for i, name in enumerate(table.column_names):
            if name != "point_id":
                turned = pa.array([row[::-1] for row in table[name].to_pylist()])
                table = table.set_column(i, name, turned)
        pq.write_table(table, tmp_path / "turned" / part.name)
    given = [f"data={data}", "split=validation", f"output={tmp_path}/out", "--json"]
    assert main(["compare", path, str(tmp_path / "turned"), *given]) == 0
    found = json.loads(capsys.readouterr().out)
    for first, second in found["metrics"].values():
        assert first["value"] == second["value"] > 0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda paths: [paths[0], paths[0]], "twice"),
        (lambda paths: [paths[0]], "2 to 6"),
        (lambda paths: [*paths, "split=test"], "split=test"),
        (lambda paths: [*paths, "output=s3://bucket/page"], "local directory"),
    ],
)
def test_what_cannot_be_compared(
    models: tuple[str, list[str]], capsys: pytest.CaptureFixture[str], change, sentence: str
) -> None:
    data, paths = models
    given = [f"data={data}", "split=validation", "output=unused"]
    assert main(["compare", *given, *change(paths)]) == 1
    assert sentence in capsys.readouterr().err
