"""Training through the real command: an undisturbed run, workers that end, what is refused."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from renee_ray.checkpoint.state import State
from renee_ray.cli.main import main
from renee_ray.config.overrides import make_config, parse_overrides
from renee_ray.config.schema import RunConfig
from renee_ray.data.dataset import Dataset
from renee_ray.data.order import training_order
from renee_ray.errors import ReneeError
from renee_ray.report.status import STATUS_FILE
from renee_ray.service.cluster.feed import training_orders
from renee_ray.service.run.directory import RUN_FILE, RunDirectory
from renee_ray.service.train.resuming import identity, is_finished, resumed

from ..data.tiny import write_tiny
from .conftest import (
    RECIPE,
    Run,
    descendants,
    newest_commit,
)

slow = pytest.mark.slow


def planned_steps(dataset: str, *settings: str) -> int:
    given = parse_overrides([f"data={dataset}", "output=unused", *settings])
    config = make_config(RunConfig, RECIPE, given)
    return sum(order.num_batches for order in training_orders(config, Dataset.open(dataset)))


def ranges_of(run: str) -> dict[int, list[tuple[int, int]]]:
    """The label ranges of each committed checkpoint's files, by step."""
    return {
        found.step: [(start, stop) for _, start, stop in found.checkpoint.manifest.shards()]
        for found in RunDirectory(run).checkpoints().found()
        if found.checkpoint is not None
    }


def workers(process: subprocess.Popen[str]) -> set[int]:
    return {
        pid
        for pid, line in descendants(process.pid).items()
        if line.startswith("ray::RayTrainWorker")
    }


def committed_by(path: str) -> int:
    """The number of workers that wrote the newest checkpoint."""
    found = RunDirectory(path).checkpoints().newest()
    return 0 if found is None else len(list(found.manifest.shards()))


def wait_for_commit(process: subprocess.Popen[str], run: str, step: int) -> None:
    """Returns when a checkpoint of `step` or later is committed and the run has not ended."""
    limit = time.monotonic() + 300
    while newest_commit(run) < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit, f"no checkpoint of step {step} in {run}"
        time.sleep(0.02)


def assert_continuous(run: Run, total: int) -> None:
    """Every step is in the history once: no batch was left out or trained twice."""
    assert [record["step"] for record in run.history["steps"]] == list(range(1, total + 1))
    steps = [record["step"] for record in run.history["evals"]]
    assert steps == sorted(set(steps))
    assert steps[0] == 0 and steps[-1] == total
    assert run.result["step"] == total
    assert run.result["skipped"] == 0


def assert_same_course(run: Run, reference: Run, rtol: float) -> None:
    """A run that was told to end: each step once, with the reference's loss as far as both go.

    Rounding grows with the steps, and the loss falls: hence a part of the tolerance is of the
    first loss. Two batches differ by more.
    """
    steps = [record["step"] for record in run.history["steps"]]
    assert steps == list(range(1, len(steps) + 1)), "a batch was left out or trained twice"
    last = RunDirectory(run.path).checkpoint("last").state
    assert last.skipped == 0 and last.step <= len(steps)
    shared = min(len(steps), len(reference.history["steps"]))
    expected = losses(reference)[:shared]
    np.testing.assert_allclose(
        losses(run)[:shared], expected, rtol=rtol, atol=rtol * expected[0] / 3
    )


def losses(run: Run) -> np.ndarray:
    return np.array([record["loss"] for record in run.history["steps"]])


OTHER_ORDER = 2e-2
"""Relative difference of losses that other numbers of workers add up; a lost batch makes more."""


def assert_same_outcome(run: Run, reference: Run, points: float, rtol: float = 1e-3) -> None:
    """Equal losses step by step, and final metrics that differ by `points` percent at most."""
    np.testing.assert_allclose(losses(run), losses(reference), rtol=rtol)
    expected = reference.result["validation"]
    found = run.result["validation"]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert abs(found[name] - value) <= points, name


@slow
def test_undisturbed(trained: Run, dataset: str) -> None:
    assert_continuous(trained, planned_steps(dataset))
    loss = losses(trained)
    assert np.isfinite(loss).all()
    assert loss[-5:].mean() < 0.9 * loss[:5].mean()
    apart = np.abs(np.diff(loss)) / loss[1:]
    assert np.median(apart) > 2 * OTHER_ORDER, "a lost batch would be seen by no test"
    last = trained.history["evals"][-1]
    assert trained.result["validation"] == last["metrics"]
    assert last["metrics"]["P@1"] > 5
    values = [each["metrics"]["P@1"] for each in trained.history["evals"] if each["step"]]
    assert trained.result["best"] == max(values)
    record = trained.history["steps"][-1]
    assert record["epoch"] == RECIPE["epochs"]
    assert 0 <= record["padding"] < 1
    assert record["rows_per_second"] > 0


@slow
def test_a_profile_is_a_trace_of_ten_steps_of_each_rank(trained: Run) -> None:
    directory = Path(trained.path, "profile")
    assert sorted(path.name for path in directory.iterdir()) == ["rank-0.json.gz", "rank-1.json.gz"]
    for path in directory.iterdir():
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        names = {event["name"] for event in events if str(event["name"]).startswith("ProfilerStep")}
        assert names == {f"ProfilerStep#{step}" for step in range(6, 16)}
        assert any(event["name"] == "aten::addmm" for event in events)


@slow
def test_the_newest_checkpoints_and_the_best_are_kept(trained: Run, dataset: str) -> None:
    total, every = planned_steps(dataset), RECIPE["checkpoint"]["every_steps"]
    steps = {*range(0, total, every), *(record["step"] for record in trained.history["evals"])}
    run = RunDirectory(trained.path)
    newest = set(sorted(steps)[-run.config().checkpoint.keep :])
    later = [record for record in trained.history["evals"] if record["step"]]
    first = max(later, key=lambda record: record["metrics"]["P@1"])
    found = [each.step for each in run.checkpoints().found()]
    assert found == sorted(newest | {first["step"]}, reverse=True)
    assert len(list(Path(trained.path, "checkpoints").iterdir())) == len(found)
    best, last = run.checkpoint("best"), run.checkpoint("last")
    assert (best.state.step, best.manifest.metrics) == (first["step"], first["metrics"])
    assert last.state.step == total
    last.verify()


@slow
def test_output_is_for_machines_and_progress_for_people(trained: Run) -> None:
    assert trained.command.stdout.count("\n") == 1
    assert set(json.loads(trained.command.stdout)) >= {"step", "best", "validation"}
    assert "training on" in trained.command.stderr
    assert "rows/s" in trained.command.stderr
    assert "validation after step" in trained.command.stderr
    assert "Traceback" not in trained.command.stderr


@slow
def test_it_leaves_a_report(trained: Run, tmp_path: Path) -> None:
    page = Path(trained.path, "report.html").read_text()
    later = [each for each in trained.history["evals"] if each["step"]]
    evaluation = max(later, key=lambda each: float(each["metrics"]["P@1"]))
    pairs = sum(each["labels"] for each in evaluation["by_frequency"].values())
    dataset = RunDirectory(trained.path).dataset()
    rows = dataset.read_rows("validation", 0, dataset.manifest.num_points("validation"))
    assert pairs == sum(map(len, rows["labels"].to_pylist()))
    assert evaluation["points"] == len(rows)
    for text in (
        f"after step {evaluation['step']:,}", f"{evaluation['metrics']['P@1']:.1f}", "finished",
        "By label frequency", "Over time", "Plan and measurement", "batch_size", "torch",
        "renee-ray train ", "labels_max".replace("_", " "),
    ):  # fmt: skip
        assert text in page, text
    assert main(["report", trained.path, f"{tmp_path}/again.html"]) == 0
    assert (tmp_path / "again.html").read_text() == page


@slow
def test_a_finished_run_stays_as_it_is(
    trained: Run, dataset: str, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def times() -> dict[Path, int]:
        files = [path for path in Path(trained.path).rglob("*") if path.is_file()]
        return {path: path.stat().st_mtime_ns for path in files}

    before = times()
    capsys.readouterr()
    assert main(["train", recipe, f"data={dataset}", f"output={trained.path}", "--json"]) == 0
    said = capsys.readouterr()
    assert f"is finished, after step {trained.result['step']}" in said.err
    assert json.loads(said.out) == trained.result
    assert times() == before


@pytest.mark.parametrize(
    ("step", "status", "finished"),
    [
        (4, '{"state": "finished"}', True),
        (3, '{"state": "finished"}', False),  # the newest checkpoint was damaged since
        (4, '{"state": "running"}', False),  # the workers were killed after the last checkpoint
        (4, "{", False),
        (4, None, False),
    ],
)
def test_what_is_finished(tmp_path: Path, step: int, status: str | None, finished: bool) -> None:
    epoch = training_order([20], [], augment=0, seed=0, epoch=0, batch_size=10, streams=1, window=1)
    if status is not None:
        (tmp_path / STATUS_FILE).write_text(status)
    found = is_finished(RunDirectory(str(tmp_path)), State(step=step), [epoch, epoch])
    assert found == finished


def test_what_is_not_given_is_as_the_run_has_it(tmp_path: Path) -> None:
    """A run of an earlier version: another default then, keys that it does not have yet."""
    dataset = write_tiny(tmp_path / "set")
    directory, said = RunDirectory(str(tmp_path / "run")), list[str]()

    def resume(**given: Any) -> RunConfig:
        config = make_config(RunConfig, {"data": dataset.path, "output": directory.path}, given)
        return resumed(config, directory, dataset, said.append)

    assert resume(epochs=3).epochs == 3, "nothing is there yet"
    saved: dict[str, Any] = resume(epochs=3, classifier={"precision": "bf16_split"}).model_dump()
    del saved["feed"]["token_dropout"], saved["encoder"]["micro_batch"], saved["regroup_s"]
    saved |= {"num_workers": 4, "seed": 7}
    directory.write(RUN_FILE, {"config": saved, "dataset": identity(dataset)})

    config = resume(num_workers=3, feed={"window": 64}, encoder={"micro_batch": 0})
    assert (config.epochs, config.seed, config.classifier.precision) == (3, 7, "bf16_split")
    assert (config.num_workers, config.regroup_s) == (3, 60.0)
    assert resume().num_workers == 2, "as every key that may change"
    assert any("classifier.precision='bf16_split', not 'auto'" in line for line in said)
    for given, words in (
        ({"seed": 0}, "seed=7 and not 0"),
        ({"classifier": {"precision": "auto"}}, "classifier.precision='bf16_split' and not 'auto'"),
        ({"feed": {"token_dropout": 0.1}}, "feed.token_dropout=0.0 and not 0.1"),
    ):
        with pytest.raises(ReneeError, match=re.escape(words)):
            resume(**given)
    directory.write(RUN_FILE, {"config": saved | {"undo": 1}, "dataset": identity(dataset)})
    with pytest.raises(ReneeError, match=r"no key 'undo'.* needs the renee_ray that made the run"):
        resume()


@slow
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("batch_size=64", ["batch_size=24", "64"]),
        ("seed=3", ["seed=0", "3"]),
        ("encoder.max_length=16", ["max_length", "10", "16"]),
    ],
)
def test_another_configuration_does_not_resume(
    trained: Run,
    dataset: str,
    recipe: str,
    capsys: pytest.CaptureFixture[str],
    change: str,
    words: list[str],
) -> None:
    status = main(["train", recipe, f"data={dataset}", f"output={trained.path}", change])
    sentence = one_line(status, capsys)
    assert all(word in sentence for word in [*words, trained.path])


@slow
def test_another_dataset_does_not_resume(
    trained: Run, dataset: str, recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Even one with as many points and labels, whose parts are cut in other places."""
    other = tmp_path / "other"
    (other / "train").mkdir(parents=True)
    manifest = json.loads(Path(dataset, "dataset.json").read_text())
    parts = manifest["splits"]["train"]
    parts[0]["rows"] -= 1
    parts[1]["rows"] += 1
    parts[1]["first"] -= 1
    (other / "dataset.json").write_text(json.dumps(manifest))
    status = main(["train", recipe, f"data={other}", f"output={trained.path}"])
    assert "dataset" in one_line(status, capsys)


def one_line(status: int, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a user's error writes."""
    out, err = capsys.readouterr()
    assert (status, out) == (1, "")
    assert err.count("\n") == 1 and err.startswith("renee-ray: "), err
    return err


def test_errors_before_anything_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("batch_size: 32\n")
    data, output = f"data={tmp_path}/none", f"output={tmp_path}/run"
    cases = [
        ([str(recipe), data, output], "renee-ray convert"),
        ([str(recipe), data, output, "batchsize=3"], "'batch_size'"),
        ([str(recipe), data, output, "num_workers=33"], "raise batch_size"),
        ([str(recipe), data, output, "batch_size=many"], "batch_size='many'"),
        ([str(recipe), data, output, "evaluation.metric=P@2"], "evaluation.metric"),
        ([str(recipe), output], "data=VALUE"),
        ([f"{tmp_path}/no.yaml", data, output], "no.yaml"),
    ]
    for arguments, words in cases:
        assert words in one_line(main(["train", *arguments]), capsys)
    assert not (tmp_path / "run").exists()
