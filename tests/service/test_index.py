"""`renee-ray index` of a run and of its export, and what searches by it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow.dataset as pads
import pytest

import renee_ray
from renee_ray.cli.main import main
from renee_ray.errors import ReneeError
from renee_ray.scoring.index import IndexSearch

from ..data.tiny import write_tiny
from .conftest import LABELS, TESTS, Run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]

K = 20
RANGES = 3


@pytest.fixture(scope="module")
def index(trained: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index that reads all: two ranks hold other label ranges than its three files."""
    path = tmp_path_factory.mktemp("indexed") / "index"
    arguments = [trained.path, f"output={path}", f"ranges={RANGES}", "sample=30"]
    assert main(["index", *arguments, "factory=IVF4,Flat"]) == 0
    return path


def test_the_sweep_ends_with_what_exact_search_finds(index: Path) -> None:
    facts = json.loads((index / "index.json").read_text())
    assert facts["sweep"][-1]["recall@10"] == 1 and facts["sweep"][-1]["P@1 lost"] == 0
    assert facts["effort"] in [row["effort"] for row in facts["sweep"]]
    there = {each.name for each in index.iterdir()}
    assert {*facts["files"], "index.json"} == there
    page = (index / "recall.html").read_text()
    recalls = [key for key in facts["sweep"][0] if key.startswith("recall")]
    assert page.count("<circle") == len(recalls) * len(facts["sweep"]) > 0
    assert all(f"{key} " in page for key in recalls)


def test_predictions_by_an_index_are_the_exact_ones(
    trained: Run, index: Path, dataset: str, predictions: Path, tmp_path: Path
) -> None:
    """By two workers, and the exact ones by one."""
    facts = json.loads((index / "index.json").read_text())
    facts["effort"] = 4  # all lists
    everything = tmp_path / "all"
    everything.mkdir()
    for file in index.iterdir():
        if file.name != "index.json":
            os.link(file, everything / file.name)
    (everything / "index.json").write_text(json.dumps(facts))
    arguments = ["search=index", f"index={everything}", f"k={K}", "num_workers=2"]
    assert main(["predict", trained.path, dataset, str(tmp_path / "out"), *arguments]) == 0
    most = tmp_path / "most.txt"
    most.write_text("".join(f"{label}\n" for label in range(LABELS // 2)))
    arguments = ["search=index", f"index={everything}", f"deny={most}"]
    assert main(["predict", trained.path, dataset, str(tmp_path / "few"), *arguments]) == 1
    found = pads.dataset(tmp_path / "out").to_table().to_pylist()
    wanted = pads.dataset(predictions).to_table().to_pylist()
    assert len(wanted) == TESTS
    for exact, other in zip(wanted, found, strict=True):
        assert exact["label_ids"][:K] == other["label_ids"]
        assert exact["scores"][:K] == pytest.approx(other["scores"], rel=1e-5)


def test_only_a_range_that_is_missing_is_built_again(trained: Run, index: Path) -> None:
    before = {file.name: file.stat().st_mtime_ns for file in index.glob("*.faiss")}
    lost = sorted(before)[1]
    (index / lost).write_bytes(b"damaged")
    arguments = [trained.path, f"output={index}", f"ranges={RANGES}", "factory=IVF4,Flat"]
    assert main(["index", *arguments, "sample=30"]) == 1
    assert main(["index", *arguments, "sample=30", "overwrite=true"]) == 0
    after = {file.name: file.stat().st_mtime_ns for file in index.glob("*.faiss")}
    assert {name for name in before if before[name] != after[name]} == {lost}
    facts = json.loads((index / "index.json").read_text())
    assert [each["built"] for each in facts["ranges"]] == [False, True, False]


def test_an_export_has_an_index_that_its_run_can_use(
    trained: Run, index: Path, dataset: str, source: Path, tmp_path: Path
) -> None:
    path = str(tmp_path / "model")
    assert main(["export", trained.path, path]) == 0
    foreign = write_tiny(tmp_path / "foreign", train=(30,), labels=(20,), vocabulary=100)
    for points in ([], [f"points={foreign.path}"]):
        assert main(["index", path, f"ranges={RANGES}", "sample=30", *points]) == 1
    there = Path(f"{path}-index")  # what a killed command leaves
    there.mkdir()
    (there / "_claim.json").write_text("{}")
    (there / f"{next(index.glob('*.faiss')).name}.tmp").write_bytes(b"cut")
    for file in index.glob("labels-*.json"):
        (there / file.name).write_text("{")
    assert main(["index", path, f"ranges={RANGES}", "sample=30", f"points={dataset}"]) == 0
    texts = (source / "tst_X.txt").read_text().splitlines()[:10]
    exact = renee_ray.load(path).predict(texts, K)
    model = renee_ray.load(path, search="index")
    assert isinstance(model.search, IndexSearch)
    for wanted, found in zip(exact, model.predict(texts, K), strict=True):
        assert [label.id for label in wanted] == [label.id for label in found]
    arguments = [dataset, str(tmp_path / "p"), "search=index", f"index={path}-index", "k=3"]
    assert main(["predict", trained.path, *arguments, "num_workers=1"]) == 0
    files = {each.name: each.read_bytes() for each in index.glob("*.faiss")}
    assert not [*there.glob("*.tmp")]
    assert files.keys() == {each.name for each in Path(f"{path}-index").glob("*.faiss")}


def test_an_index_of_another_run_is_refused(
    trained_longer: Run,
    index: Path,
    dataset: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [str(tmp_path / "p"), "search=index", f"index={index}"]
    assert main(["predict", trained_longer.path, dataset, *arguments]) == 1
    assert "was built for model=" in capsys.readouterr().err
    assert not (tmp_path / "p").exists()
    with pytest.raises(ReneeError, match="is no index"):
        renee_ray.load(trained_longer.path, search="index")
