"""An export, read with transformers and safetensors alone, scores as `predict` does."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

import renee_ray
from renee_ray.cli.main import main
from renee_ray.data.dataset import Dataset
from renee_ray.errors import ReneeError
from renee_ray.service.score import export

from .conftest import TESTS, TINY_DIM, Run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]
K, RANGES = 40, 3
TAIL = 0.3


@pytest.fixture(scope="module")
def exported(
    trained: Run, tmp_path_factory: pytest.TempPathFactory, dataset: str
) -> tuple[Path, dict[str, object]]:
    path = tmp_path_factory.mktemp("export") / "model"
    labels = Dataset.open(dataset).manifest.num_labels
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "RANGE_BYTES", -(-labels // RANGES) * 4 * TINY_DIM)
        assert main(["export", trained.path, str(path)]) == 0
    return path, json.loads((path / "export.json").read_text())


def embed(path: Path, texts: list[str], max_length: int) -> torch.Tensor:
    """As the sentence in export.json says."""
    tokenizer = AutoTokenizer.from_pretrained(path / "encoder")
    encoder = AutoModel.from_pretrained(path / "encoder").eval()
    head = load_file(path / "head.safetensors")
    rows = []
    for text in texts:
        tokens = tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")
        with torch.inference_mode():
            rows.append(encoder(**tokens).last_hidden_state[0].mean(0) + head["constant"])
    return torch.stack(rows)


def test_the_ranges_cover_all_labels_with_their_texts(
    exported: tuple[Path, dict[str, object]], dataset: str
) -> None:
    path, content = exported
    opened = Dataset.open(dataset)
    ranges = content["ranges"]
    assert isinstance(ranges, list) and len(ranges) == RANGES
    tables = [pq.read_table(path / each["labels"]) for each in ranges]
    wanted = opened.read_rows("labels", 0, opened.manifest.num_labels)
    table = pa.concat_tables(tables)
    assert table["label_id"].to_pylist() == list(range(opened.manifest.num_labels))
    assert table["text"].to_pylist() == wanted["text"].to_pylist()
    assert table["train_count"].to_pylist() == wanted["train_count"].to_pylist()
    for each in ranges:
        rows = load_file(path / each["classifier"])["weight"]
        assert rows.shape == (each["stop"] - each["start"], content["dim"])


def test_scores_are_those_of_predict(
    exported: tuple[Path, dict[str, object]],
    trained: Run,
    source: Path,
    dataset: str,
    tmp_path: Path,
) -> None:
    path, content = exported
    arguments = [trained.path, dataset, str(tmp_path / "p"), f"k={K}", f"tail={TAIL}"]
    assert main(["predict", *arguments, "num_workers=1"]) == 0
    parts = sorted(map(str, (tmp_path / "p").glob("part-*.parquet")))
    found = {row["point_id"]: row for row in pads.dataset(parts).to_table().to_pylist()}
    filters = {
        row["point_id"]: row["filter_labels"]
        for row in Dataset.open(dataset).read_rows("test", 0, TESTS).to_pylist()
    }
    ranges = content["ranges"]
    assert isinstance(ranges, list)
    weight = torch.cat([load_file(path / each["classifier"])["weight"] for each in ranges])
    counts = pa.concat_tables([pq.read_table(path / each["labels"]) for each in ranges])
    offset = -TAIL * np.log(np.maximum(counts["train_count"].to_numpy(), 1))
    texts = (source / "tst_X.txt").read_text().splitlines()[:30]
    length = content["max_length"]
    assert isinstance(length, int)
    scores = embed(path, texts, length) @ weight.T + torch.from_numpy(offset).float()
    for point, row in enumerate(scores):
        row[filters[point]] = -torch.inf
        best = row.topk(K).values.tolist()
        assert found[point]["scores"] == pytest.approx(best, abs=2e-3)
        assert row[found[point]["label_ids"]].tolist() == pytest.approx(best, abs=2e-3)


LOADING = """
import json, sys
import renee_ray
models, k, texts = sys.argv[1:3], int(sys.argv[3]), sys.argv[4:]
for model in map(renee_ray.load, models):
    print(json.dumps([model.embed(texts).tolist(), model.predict(texts, k)]))
assert "ray" not in sys.modules
"""


def test_a_loaded_model_answers_without_ray(
    exported: tuple[Path, dict[str, object]], trained: Run, source: Path
) -> None:
    """An export, and its run."""
    path, content = exported
    texts = ["", *(source / "tst_X.txt").read_text().splitlines()[:300]]
    arguments = [str(path), trained.path, str(K), *texts]
    done = subprocess.run(
        [sys.executable, "-c", LOADING, *arguments], capture_output=True, text=True, check=True
    )
    ranges, length = content["ranges"], content["max_length"]
    assert isinstance(ranges, list) and isinstance(length, int)
    expected = embed(path, texts, length)
    weight = torch.cat([load_file(path / each["classifier"])["weight"] for each in ranges])
    names = pa.concat_tables([pq.read_table(path / each["labels"]) for each in ranges])["text"]
    by_export, by_run = map(json.loads, done.stdout.splitlines())
    for embeddings, found in (by_export, by_run):
        np.testing.assert_allclose(embeddings, expected, atol=2e-4)
        for row, answer in zip(expected @ weight.T, found, strict=True):
            best = row.topk(K).values.tolist()
            assert [score for *_, score in answer] == pytest.approx(best, abs=2e-3)
            assert row[[label for label, *_ in answer]].tolist() == pytest.approx(best, abs=2e-3)
            texts_of = [names[label].as_py() for label, *_ in answer]
            assert [text for _, text, _ in answer] == texts_of


def test_a_damaged_export_is_not_loaded(
    exported: tuple[Path, dict[str, object]], tmp_path: Path
) -> None:
    path, content = exported
    with pytest.raises(ReneeError, match="neither an export nor a run"):
        renee_ray.load(str(tmp_path))
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    ranges = content["ranges"]
    assert isinstance(ranges, list)
    shorter = [ranges[0] | {"stop": ranges[0]["stop"] - 1}, *ranges[1:]]
    outside = [ranges[0] | {"labels": "../labels-00000.parquet"}, *ranges[1:]]
    for wrong in (
        {"ranges": shorter},
        {"ranges": outside},
        {"encoder": {"name": ""}},
        {"step": None},
    ):
        (copy / "export.json").write_text(json.dumps(content | wrong))
        with pytest.raises(ReneeError, match="export the run again"):
            renee_ray.load(str(copy))


def test_what_is_there_is_not_overwritten(
    exported: tuple[Path, dict[str, object]],
    trained: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, _ = exported
    assert main(["export", trained.path, str(path)]) == 1
    assert "overwrite=true" in capsys.readouterr().err
    (tmp_path / "precious").write_text("mine")
    assert main(["export", trained.path, str(tmp_path), "overwrite=true"]) == 1
    assert "holds other files" in capsys.readouterr().err
    assert (tmp_path / "precious").read_text() == "mine"
    before = (path / "export.json").read_text()
    (path / "added").write_text("by somebody")
    assert main(["export", trained.path, str(path), "overwrite=true"]) == 1
    assert "holds other files" in capsys.readouterr().err
    (path / "added").unlink()
    # As an export leaves it that is killed on its way: the next one begins anew.
    (path / "export.json").rename(path / "_claim.json")
    (path / "head.safetensors").unlink()
    assert main(["export", trained.path, str(path)]) == 0
    assert not (path / "_claim.json").exists()
    assert main(["export", trained.path, str(path), "overwrite=true"]) == 0
    assert json.loads(before)["step"] == json.loads((path / "export.json").read_text())["step"]
