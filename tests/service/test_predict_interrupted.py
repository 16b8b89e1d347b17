"""What `predict` leaves, publishes and goes on with, with a worker in this process and no Ray."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.dataset as pads
import pytest
import torch

from renee_ray.config.schema import RunConfig
from renee_ray.config.score import ScoreConfig
from renee_ray.data import storage
from renee_ray.data.dataset import Dataset
from renee_ray.data.destination import Destination
from renee_ray.errors import ReneeError
from renee_ray.rank.batch import Batch, Position, Ragged
from renee_ray.rank.collectives import Ranks
from renee_ray.scoring.passes import Blocks, in_passes
from renee_ray.scoring.scorer import Answer, Found
from renee_ray.service.run.directory import RunDirectory
from renee_ray.service.score import predict, predictions
from renee_ray.service.score.job import ScoringJob
from renee_ray.service.score.predictions import PREDICTIONS, Layout, part_name

from ..data.tiny import write_tiny

ROWS, K, PASSES = 8, 2, 2
PARTS = [part_name(row) for row in range(0, ROWS, 2)]
CLAIM, MANIFEST = PREDICTIONS.claim, PREDICTIONS.manifest
Act = Callable[[Path, int], None]


def nothing(out: Path, block: int) -> None:
    pass


class FakeScorer:
    """Gives row i the labels 0 and 1, and the scores i + 1 and i."""

    device = torch.device("cpu")

    def __init__(self, seen: Counter[int]) -> None:
        self.seen = seen

    def search(self, batch: Batch, k: int, own: Any = None, before: Any = None) -> Found:
        assert batch.rows is not None
        self.seen.update(batch.rows.tolist())
        scores = torch.from_numpy(batch.rows)[:, None] + torch.tensor([1.0, 0.0])
        labels = torch.tensor([[0, 1]] * len(batch))
        return Found(torch.zeros(len(batch), 1), [len(batch)], scores, labels, [])

    def finish(self, batch: Batch, found: Found, k: int) -> Answer:
        return Answer(batch, found.scores, found.labels, [])


def batches(first: int) -> Iterator[Batch]:
    for i in range(first, ROWS):
        none = Ragged.of_lists([[]])
        row = np.array([i])
        yield Batch(Position(0, i), row + 100, none, none, none, pad_id=0, rows=row)


class FakeWorker:
    """One rank, whose last pass calls `act` with the destination and each block before its part.

    seen: how often rows were scored.
    """

    ranks = Ranks()

    def __init__(self, act: Act) -> None:
        self.act, self.seen = act, Counter[int]()

    def passes(self, layout: Layout) -> int:
        return PASSES

    def answers(
        self, arguments: dict[str, Any], layout: Layout, passes: int, directory: str
    ) -> Iterator[list[Answer]]:
        blocks = Blocks(layout.blocks, layout.part_batches, self.ranks, directory)
        begun = blocks.resumed(passes)
        scorer: Any = FakeScorer(self.seen)
        for answers in in_passes(lambda *_: scorer, begun, batches, layout.k, blocks):
            first = answers[0].batch.rows
            assert first is not None
            self.act(Path(arguments["output"].path), int(first[0]) // 2)
            yield answers


@dataclass(frozen=True)
class Here(ScoringJob):
    """A job whose worker is in this process; after it, `then` may do harm."""

    then: Callable[[], object] = lambda: None

    def run(self, worker: Any, points: Dataset, split: str, *_: Any, **more: Any) -> Any:
        more.pop("source", None)
        found = worker({"job": self, "points": points, "split": split, "channel": None, **more})
        self.then()
        return {"step": self.step, "points": ROWS, **found}


@dataclass
class Command:
    """`renee-ray predict` of one run and dataset to `out`."""

    out: Path
    dataset: Dataset
    patch: pytest.MonkeyPatch

    def __call__(
        self, act: Act = nothing, then: Callable[[], object] = lambda: None, **settings: Any
    ) -> FakeWorker:
        config = RunConfig(data=self.dataset.path, output="run", num_workers=1)
        score = ScoreConfig(k=K, batch_size=1, **settings)
        job = Here(
            RunDirectory("run"), config, score, "step-3", 3, self.dataset, self.dataset, None,
            None, {}, False, then,
        )  # fmt: skip
        worker = FakeWorker(act)
        self.patch.setattr(predict, "Worker", SimpleNamespace(of=lambda job: worker))
        self.patch.setattr(predict, "ScoringJob", SimpleNamespace(checked=lambda *_: job))
        predict.predict_run("run", self.dataset.path, str(self.out), score)
        return worker


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(storage, "SEEN_S", 0.0)
    monkeypatch.setattr(predictions, "PART_PAIRS", 2 * K)
    return Command(tmp_path / "out", write_tiny(tmp_path / "set", test=(5, 3)), monkeypatch)


def names(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir())


def complete(out: Path) -> None:
    assert names(out) == sorted([MANIFEST, *PARTS])
    assert json.loads((out / MANIFEST).read_text())["files"] == PARTS
    rows = pads.dataset(out).to_table().to_pylist()
    assert [row["point_id"] for row in rows] == list(range(100, 100 + ROWS))
    assert [row["scores"] for row in rows] == [[i + 1, i] for i in range(ROWS)]


def failing(at: int) -> Act:
    def act(out: Path, block: int) -> None:
        if block == at:
            raise ReneeError("the object store refuses the credentials")

    return act


def test_an_error_keeps_the_parts_and_the_same_command_goes_on(
    command: Command, caplog: pytest.LogCaptureFixture
) -> None:
    """As with credentials that have expired after hours."""
    with pytest.raises(ReneeError, match="refuses the credentials"):
        command(failing(2))
    assert {*PARTS[:2], CLAIM, "_scratch"} == {*names(command.out)}
    assert f"stays in {command.out}; the same command goes on from there" in caplog.text
    with pytest.raises(ReneeError, match="refuses the credentials"):
        command(failing(3))
    worker = command()
    complete(command.out)
    assert worker.seen == {6: 1, 7: 1}


def test_an_error_before_any_part_leaves_nothing(
    command: Command, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: FakeWorker, layout: Layout) -> int:
        raise ReneeError("the search does not fit")

    with command.patch.context() as patch, pytest.raises(ReneeError, match="does not fit"):
        patch.setattr(FakeWorker, "passes", refuse)
        command()
    assert names(command.out) == [] and "goes on" not in caplog.text
    assert command().seen == dict.fromkeys(range(ROWS), PASSES)
    with command.patch.context() as patch, pytest.raises(ReneeError, match="does not fit"):
        patch.setattr(FakeWorker, "passes", refuse)
        command(overwrite=True)
    complete(command.out)


@pytest.mark.parametrize("harm", [lambda p: p.unlink(), lambda p: p.write_bytes(b"")])
def test_what_lacks_a_part_is_not_published(
    command: Command, harm: Callable[[Path], object]
) -> None:
    """As where a worker on another node has written to its own disk."""
    with pytest.raises(ReneeError) as refusal:
        command(then=partial(harm, command.out / PARTS[1]))
    said = str(refusal.value)
    assert f"{command.out}/{PARTS[1]}," in said and "nodes do not share" in said
    assert "\n" not in said and not (command.out / MANIFEST).exists()
    worker = command()
    complete(command.out)
    assert worker.seen == dict.fromkeys(range(2, ROWS), 1), "from the lost part on, the last pass"


def test_a_part_that_was_lost_before_the_command_goes_on_is_made_again(command: Command) -> None:
    with pytest.raises(ReneeError):
        command(failing(3))
    (command.out / PARTS[0]).unlink()
    worker = command()
    complete(command.out)
    assert worker.seen == dict.fromkeys(range(ROWS), 1)


def test_of_two_commands_the_later_one_has_the_destination(
    command: Command, caplog: pytest.LogCaptureFixture
) -> None:
    """The first stops before its next part, and removes nothing of the other's."""

    def another(out: Path, block: int) -> None:
        if block == 1:
            other = Destination(str(out), PREDICTIONS, overwrite=False)
            other.check()
            assert not other.claim("another")
            other.declare(PARTS)
            (out / PARTS[0]).write_text("another's")

    with pytest.raises(ReneeError, match="another command's"):
        command(another)
    assert names(command.out) == [CLAIM, PARTS[0]]
    assert (command.out / PARTS[0]).read_text() == "another's"
    assert "goes on" not in caplog.text


def test_blocks_of_a_pass_before_the_last_are_not_done_again(tmp_path: Path) -> None:
    blocks = Blocks(4, 1, Ranks(), str(tmp_path))
    blocks.again_from(1)
    assert blocks.resumed(2) == (2, 0)
    for done, wanted in ((3, 3), (4, 4), (5, 5), (6, 5), (8, 5)):
        blocks.mark(2, done)
        blocks.again_from(1)
        assert blocks.resumed(2) == (2, wanted)
