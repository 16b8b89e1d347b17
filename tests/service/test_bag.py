"""A bag of n-grams by the real commands: its export, a bag that it teaches, both compared."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.dataset as pads
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer

from renee_ray.cli.main import main
from renee_ray.data.dataset import Dataset
from renee_ray.scoring.metrics import best_tail

from .conftest import RECIPE, TESTS

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]
BUCKETS, NGRAMS, K = 1 << 12, 2, 20
BAG = {"dim": 48, "buckets": BUCKETS, "ngrams": NGRAMS, "dropout": 0.1, "learning_rate": 3e-3}


def signed(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63


def embed(path: Path, text: str, max_length: int) -> torch.Tensor:
    """As the sentence in export.json says."""
    sentence = json.loads((path / "export.json").read_text())["score"]
    factors = [int(part.split(";")[0]) for part in sentence.split(")) * ")[1:]]

    def mix(value: int) -> int:
        value = signed((value ^ (value >> 32)) * factors[0])
        value = signed((value ^ (value >> 29)) * factors[1])
        return value ^ (value >> 32)

    head = load_file(path / "head.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(path / "encoder")
    tokens = tokenizer(text, truncation=True, max_length=max_length)["input_ids"]
    single = [mix(token + 1) for token in tokens]
    pairs = [mix(signed(3 * a + b)) for a, b in pairwise(single)]
    times = Counter(value % BUCKETS for value in single + pairs)
    weights = {g: float(head["idf"][g]) * (1 + math.log(n)) for g, n in times.items()}
    norm = math.sqrt(sum(u * u for u in weights.values())) or 1.0
    rows = torch.stack([head["table"][g] * (u / norm) for g, u in weights.items()])
    return rows.sum(0) + head["constant"]


def trained_bag(folder: Path, dataset: str, **settings: object) -> tuple[str, list[str]]:
    """Trains a bag: (its run, the command that made it)."""
    run, encoder = str(folder / "run"), {"name": "none", "max_length": 10, "bag": BAG}
    recipe = {**RECIPE, "encoder": encoder, "data": dataset, "output": run, **settings}
    (folder / "bag.yaml").write_text(yaml.safe_dump(recipe))
    command = ["train", str(folder / "bag.yaml")]
    assert main(command) == 0
    return run, command


@pytest.fixture(scope="module")
def run(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return trained_bag(tmp_path_factory.mktemp("bag"), dataset, num_workers=1)[0]


def test_the_export_of_a_bag_scores_as_predict_does(
    run: str, dataset: str, source: Path, tmp_path: Path
) -> None:
    assert main(["export", run, str(tmp_path / "e"), "checkpoint=last"]) == 0
    arguments = ["predict", run, dataset, str(tmp_path / "p"), f"k={K}", "checkpoint=last"]
    assert main([*arguments, "num_workers=1", "explain=true"]) == 0
    parts = sorted(map(str, (tmp_path / "p").glob("part-*.parquet")))
    found = {row["point_id"]: row for row in pads.dataset(parts).to_table().to_pylist()}
    files = sorted((tmp_path / "e").glob("classifier-*"))
    weight = torch.cat([load_file(file)["weight"] for file in files])
    constant = load_file(tmp_path / "e" / "head.safetensors")["constant"]
    texts = (source / "tst_X.txt").read_text().splitlines()[:20]
    for row in Dataset.open(dataset).read_rows("test", 0, TESTS).to_pylist():
        if row["point_id"] >= len(texts):
            continue
        scores = weight @ embed(tmp_path / "e", texts[row["point_id"]], 10)
        scores[row["filter_labels"]] = -torch.inf
        row = found[row["point_id"]]
        assert row["scores"] == pytest.approx(scores.topk(K).values.tolist(), abs=1e-3)
        rest = weight[row["label_ids"]] @ constant
        assert row["of_rest"] == pytest.approx(rest.tolist(), abs=1e-3)
        assert set(row["of_transformer"]) == {0.0}
        parts = zip(row["of_bag"], row["of_rest"], strict=True)
        assert row["scores"] == pytest.approx([bag + other for bag, other in parts], abs=1e-5)


def weights_at_the_end(run: str) -> dict[str, torch.Tensor]:
    newest = max(Path(run, "checkpoints").glob("step-*"))
    files = [load_file(file) for file in sorted(newest.glob("classifier-*"))]
    table = load_file(newest / "encoder.safetensors")["bag.table"]
    return {"table": table, "weight": torch.cat([file["weight"] for file in files])}


def test_averages_outlast_a_lost_checkpoint(dataset: str, tmp_path: Path) -> None:
    """Two workers go on from the checkpoint before, which is inside the averaged share."""
    settings = {"epochs": 1, "average": 0.6, "evaluation": {"every": 0.25}}
    settings["classifier"] = {**RECIPE["classifier"], "precision": "fp32"}
    run, command = trained_bag(tmp_path, dataset, num_workers=1, **settings)
    wanted = weights_at_the_end(run)
    shutil.rmtree(max(Path(run, "checkpoints").glob("step-*")))
    assert main([*command, "num_workers=2"]) == 0
    for name, tensor in weights_at_the_end(run).items():
        assert torch.allclose(tensor, wanted[name], atol=1e-4), name


def test_a_run_is_taught_by_the_predictions_of_another(
    run: str, dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The student has normal first weights, and two workers, which share the only stream."""
    taught = str(tmp_path / "taught")
    predict = ["predict", run, dataset, taught, "split=train", "k=20", "num_workers=1"]
    assert main([*predict, "scores=probabilities"]) == 0
    rows = Dataset.open(dataset).manifest.num_points("train")
    points = Dataset.open(dataset).read_rows("train", 0, rows, ["point_id"])["point_id"]
    table = pads.dataset(sorted(map(str, Path(taught).glob("*.parquet")))).to_table()
    assert table["point_id"].to_pylist() == points.to_pylist()
    for scores in table["scores"].to_pylist():
        assert all(0 <= b <= a <= 1 for a, b in pairwise(scores))

    feed = {"streams": 1, "targets": taught, "targets_weight": 0.5, "augment": 0.5}
    classifier = {**RECIPE["classifier"], "objective": "softmax", "init": "normal"}
    evaluation = {"tails": [0, 0.4, 2], "neighbours": 5, "every": 0.5}
    settings = {"epochs": 1, "feed": feed, "classifier": classifier, "evaluation": evaluation}
    settings["average"] = 0.3
    student, command = trained_bag(tmp_path, dataset, **settings)
    steps = json.loads((Path(student) / "history.json").read_text())["steps"]
    losses = [step["loss"] for step in steps]
    assert len(losses) > 5 and min(losses[1:]) < losses[0] and np.isfinite(losses).all()
    assert len(json.loads((Path(student) / "status.json").read_text())["ranks"]) == 2

    saved = json.loads((Path(student) / "run.json").read_text())
    assert "the best for the validation points" in capsys.readouterr().err
    rows = {row["tail"]: row for row in saved["tails"]["table"]}
    chosen = best_tail(rows.values(), 0)
    assert saved["config"]["evaluation"]["tail"] == chosen != 2
    capsys.readouterr()
    evaluate = ["evaluate", student, dataset, "split=validation", "num_workers=1", "--json"]
    assert main(evaluate) == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    assert {name: rows[chosen][name] for name in metrics} == pytest.approx(metrics, abs=1e-6)

    assert main([*evaluate, "neighbours=0"]) == 0
    plain = json.loads(capsys.readouterr().out)["metrics"]
    assert plain != metrics
    assert main(["export", student, str(tmp_path / "export")]) == 0
    card = (tmp_path / "export/README.md").read_text()
    assert all(f"| {name} | {value:.2f} |" in card for name, value in plain.items())
    capsys.readouterr()

    compared = tmp_path / "compared"
    assert main(["compare", run, student, f"output={compared}", "num_workers=1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"]["classifier.objective"] == ["bce", "softmax"]
    assert len(found["metrics"]["P@1"]) == 2
    names = sorted(each.name for each in (compared / "predictions").iterdir())
    assert names == sorted(each.replace("/", "-") for each in found["models"])

    capsys.readouterr()
    assert main(["predict", student, dataset, str(tmp_path / "p"), "scores=probabilities"]) == 1
    assert "take a run trained by bce" in capsys.readouterr().err
    other = f"output={tmp_path / 'x'}", f"feed.targets={tmp_path / 'y'}"
    assert main([*command, *other]) == 1
    assert "no complete predictions" in capsys.readouterr().err
