"""`bench train`: a run through Ray and the bare loop train the same model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from renee_ray.cli import main as cli
from renee_ray.config.overrides import parse_overrides, read_yaml
from renee_ray.errors import ReneeError
from renee_ray.service.bench.train import bench_train
from tests.service.conftest import LABELS, RECIPE


@pytest.fixture
def empty(tmp_path: Path) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text("{}")
    return str(path)


def test_an_output_is_refused(empty: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "train", empty, "data=d", "output=o"]) == 1
    assert "leave out output" in capsys.readouterr().err


def test_a_cluster_is_refused(
    empty: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert cli.main(["bench", "train", empty, "data=d"]) == 1
    assert "unset RAY_ADDRESS" in capsys.readouterr().err


def test_wrong_flags_and_keys_are_wrong(empty: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "train", empty, "data=d", "--steps", "0"]) == 2
    assert cli.main(["bench", "train", empty, "data=d", "feed.windw=3"]) == 1
    assert "feed.window" in capsys.readouterr().err


@pytest.mark.slow
def test_too_few_steps_are_refused(dataset: str, recipe: str) -> None:
    given = parse_overrides([f"data={dataset}", "epochs=1"])
    with pytest.raises(ReneeError, match="raise epochs"):
        bench_train(read_yaml(recipe), given, 16, 1)


@pytest.mark.slow
def test_a_run_and_the_bare_loop_train_the_same_model(
    dataset: str, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    command = [
        "bench", "train", recipe, f"data={dataset}", "epochs=3", "feed.prefetch=2",
        "encoder.internal_dropout=0.1", "feed.token_dropout=0.2", "checkpoint.every_steps=0",
        "--steps", "5", "--repeats", "1",
    ]  # fmt: skip
    assert cli.main(command) == 0
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found["weights_apart"] < 1e-6
    assert found["steps"] == 2 * RECIPE["feed"]["window"]
    assert found["ratio_to_bare"] == pytest.approx(
        found["rows_per_second"] / found["bare_rows_per_second"]
    )
    assert found["threads"] == found["bare_threads"] == 1
    assert 0 <= found["padding"] < 0.9  # lengths are grouped, and here each group has one
    assert 0 < found["matmul_share"] < 1
    assert 0 < found["feed_wait_s"] < found["batch_size"] / found["rows_per_second"]
    assert found["classifier_s"] < found["batch_size"] / found["bare_rows_per_second"]
    assert found["labels"] == LABELS
