"""The quickstart: its pieces, and the whole of it with a small random encoder."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.dataset as pads
import pytest

from renee_ray.cli.main import main
from renee_ray.data.dataset import Dataset
from renee_ray.errors import ReneeError
from renee_ray.rank.batch import Ragged
from renee_ray.service import quickstart
from renee_ray.service.run.directory import RunDirectory
from tests.data.tiny import write_tiny
from tests.service.conftest import Command, renee_ray
from tests.service.test_predict import brute_force

MINILM = "sentence-transformers/all-MiniLM-L6-v2"


def test_everything_goes_below_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    root, config = quickstart.configuration({"epochs": 7, "encoder": {"dropout": 0.5}})
    assert root == tmp_path / "quickstart"
    assert (config.data, config.output) == (str(root / "dataset"), str(root / "run"))
    assert (config.epochs, config.encoder.dropout, config.encoder.name) == (7, 0.5, MINILM)
    assert quickstart.configuration({"output": "here"})[0] == tmp_path / "here"
    _, alone = quickstart.configuration({"encoder": {"name": "none"}})
    assert (alone.encoder.name, alone.classifier.init_scale) == ("none", 15), "as in perl-bag"


def test_archives_that_cannot_be_unpacked(tmp_path: Path) -> None:
    with pytest.raises(ReneeError, match="is missing"):
        quickstart.unpack(tmp_path / "none.tar.gz", tmp_path / "raw")
    damaged = tmp_path / "damaged.tar.gz"
    damaged.write_bytes(quickstart.ARCHIVE.read_bytes()[:5000])
    with pytest.raises(ReneeError, match="damaged"):
        quickstart.unpack(damaged, tmp_path / "raw")
    leaving = tmp_path / "leaving.tar.gz"
    with tarfile.open(leaving, "w:gz") as tar:
        tar.add(damaged, arcname="../escaped")
    with pytest.raises(ReneeError, match="damaged"):
        quickstart.unpack(leaving, tmp_path / "deep" / "raw")
    assert not (tmp_path / "deep" / "escaped").exists()
    with pytest.raises(ReneeError, match="give a directory that can be written"):
        quickstart.unpack(quickstart.ARCHIVE, damaged / "raw")


def test_unpacking_twice_is_fine(tmp_path: Path) -> None:
    assert quickstart.unpack(quickstart.ARCHIVE, tmp_path) == tmp_path / quickstart.NAME
    folder = quickstart.unpack(quickstart.ARCHIVE, tmp_path)
    assert len((folder / "tst_X.txt").read_bytes().splitlines()) == 769


def test_another_dataset_at_its_place_is_not_touched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny(tmp_path / "dataset")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "dataset").rglob("*")}
    assert main(["quickstart", f"output={tmp_path}"]) == 1
    assert "dataset is another dataset; give another output" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "dataset").rglob("*")} == before


def test_examples_show_what_is_right(tmp_path: Path) -> None:
    (tmp_path / "tst_X.txt").write_text("first\nsecond\nthird\n")
    none = Ragged.of_lists([[], []])
    truth = quickstart.Truth(
        points=np.array([0, 2]),
        tokens=none,
        labels=Ragged.of_lists([[1], []]),
        filters=none,
        train_count=np.ones(3, dtype=np.int64),
        inverse_propensity=np.ones(3),
        label_texts=["a", "b", "c"],
        label_tokens=none,
    )
    labels = Ragged.of_lists([[2, 1], [0]])
    found = quickstart.pick_examples(tmp_path, truth, labels, np.array([0.5, 0.1, 0.9]))
    assert [(e["text"], e["true"]) for e in found] == [("first", ["b"]), ("third", [])]
    assert found[0]["predicted"][0] == {"label": "c", "score": 0.5, "right": False}
    assert found[0]["predicted"][1]["right"] and len(found[1]["predicted"]) == 1


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quickstart") / "out"


def settings(output: Path, encoder: str) -> list[str]:
    encoders = f"encoder.name={encoder}", "encoder.bag.dim=64", "encoder.bag.buckets=8192"
    return [f"output={output}", *encoders, "epochs=1", "num_workers=1"]


@pytest.fixture(scope="module")
def first(tiny_encoder: str, output: Path) -> Command:
    done = renee_ray("quickstart", *settings(output, tiny_encoder))
    assert done.status == 0, done.stderr
    return done


@pytest.mark.slow
def test_it_prints_figures_and_examples_and_writes_a_report(first: Command, output: Path) -> None:
    for text in (
        "renee_ray",
        "linear",
        "zero-shot",
        "most frequent labels",
        "P@1",
        "recall@100",
        "✓",
    ):
        assert text in first.stdout
    assert f"report: {output}/report.html" in first.stdout
    assert "Traceback" not in first.stderr and "validation after step 0" in first.stderr
    page = (output / "report.html").read_text(encoding="utf-8")
    assert page.count("<article>") == quickstart.EXAMPLES
    for title in ("Training loss", "Precision on validation", "Throughput", "Peak memory"):
        assert title in page
    assert page.count("<script") == 1 and 'src="http' not in page


@pytest.mark.slow
def test_a_second_call_gives_the_same_figures(
    first: Command,
    tiny_encoder: str,
    output: Path,
    local_ray: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["quickstart", *settings(output, tiny_encoder), "--json"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert "parts written" not in said.err  # the dataset was there already
    shown = {row["model"]: row for row in found["comparison"]}
    assert f"{shown['renee_ray']['P@1']:.1f}" in first.stdout
    assert len(found["examples"]) == quickstart.EXAMPLES
    facts = json.loads((output / "predictions" / "_predictions.json").read_text())
    assert facts["step"] == RunDirectory(f"{output}/run").checkpoint("last").state.step
    predicted = pads.dataset(output / "predictions").to_table().to_pylist()
    dataset = Dataset.open(f"{output}/dataset")
    tests = dataset.read_rows("test", 0, dataset.manifest.num_points("test")).to_pylist()
    assert len(predicted) == len(tests)
    rows = {row["point_id"]: row for row in tests}
    metrics = brute_force(predicted, rows, output / "raw" / quickstart.NAME)
    for name in quickstart.COMPARED:
        assert shown["renee_ray"][name] == pytest.approx(metrics[name], abs=1e-6)
