"""Writing checkpoints beside training: what is committed is whole, whoever dies and whenever."""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest
import torch
from torch import nn

from renee_ray.checkpoint import registry
from renee_ray.checkpoint import writer as checkpoint_writer
from renee_ray.checkpoint.registry import Checkpoints
from renee_ray.checkpoint.state import MANIFEST, Checkpoint, CheckpointError, State
from renee_ray.checkpoint.writer import CheckpointWriter, Written
from renee_ray.config.schema import EncoderConfig
from renee_ray.data import storage
from renee_ray.model.encoder import adamw
from renee_ray.rank.batch import Position
from renee_ray.rank.collectives import Ranks
from renee_ray.xfc.labels import LabelRange
from renee_ray.xfc.shard import Shard
from renee_ray.xfc.weights.storages import Weights

from ..devices import DEVICES
from .gloo import on_ranks

LABELS, DIM, METRIC = 17, 6, "P@1"
CPU = torch.device("cpu")


class Worker:
    """What a rank saves: all its numbers are `step`."""

    def __init__(self, ranks: Ranks, device: torch.device = CPU) -> None:
        owned = LabelRange.of_rank(LABELS, ranks.num_ranks, ranks.rank)
        self.shard = Shard(owned, Weights("fp32", len(owned), DIM, True, device))
        self.encoder = nn.Linear(DIM, DIM, device=device)
        self.optimizer = adamw(self.encoder, EncoderConfig())  # type: ignore[arg-type]
        self.state = State(Position(), 0, facts={"num_labels": LABELS})

    def at(self, step: int) -> Worker:
        tensors = [*self.shard.weights.tensors().values(), *self.encoder.parameters()]
        with torch.no_grad():
            for tensor in tensors:
                tensor.fill_(step)
        self.state.position, self.state.step = Position(0, step), step
        return self

    def save(self, writer: CheckpointWriter, metrics: dict[str, float]) -> None:
        writer.save(self.state, self.encoder, self.optimizer, self.shard, metrics)  # type: ignore[arg-type]


def saved_step(checkpoint: Checkpoint) -> int:
    """The step that all of a checkpoint's numbers are of."""
    checkpoint.verify()
    worker = Worker(Ranks())
    checkpoint.load_shard(worker.shard)
    checkpoint.load_encoder(worker.encoder)  # type: ignore[arg-type]
    tensors = [*worker.shard.weights.tensors().values(), *worker.encoder.parameters()]
    numbers = {float(value) for tensor in tensors for value in tensor.detach().flatten()}
    assert numbers == {float(checkpoint.state.step)}
    return checkpoint.state.step


def writer_of(run: Path, ranks: Ranks | None = None, **more: Any) -> CheckpointWriter:
    return CheckpointWriter(Checkpoints(str(run)), ranks or Ranks(), 2, METRIC, **more).start()


def steps(run: Path) -> list[int]:
    return [found.step for found in Checkpoints(str(run)).found()]


def save_some(ranks: Ranks, run: str, background: bool, device: str) -> torch.Tensor:
    worker = Worker(ranks, torch.device(device))
    writer = writer_of(Path(run), ranks, background=background)
    committed = []
    for step in (1, 2, 3):
        worker.at(step).save(writer, {})
        worker.at(99)  # training goes on while it is written
        committed.append(writer.wait())
    return torch.tensor(committed)


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("device", DEVICES)
def test_all_ranks_write_one_checkpoint(
    tmp_path: Path, device: str, num_ranks: int, background: bool
) -> None:
    """What ranks write that share a GPU is read on a CPU."""
    found = on_ranks(num_ranks, save_some, str(tmp_path), background, device)
    assert all(each.all() for each in found)
    assert steps(tmp_path) == [3, 2]
    newest = Checkpoints(str(tmp_path)).newest()
    assert newest is not None and saved_step(newest) == 3
    assert len(list(newest.manifest.shards())) == num_ranks


def fail_on_rank_1(ranks: Ranks, run: str) -> torch.Tensor:
    worker, writer = Worker(ranks), writer_of(Path(run), ranks)
    committed = []
    for step, full in (1, False), (2, True), (3, False):
        writer.checkpoints.filesystem = Failing(full and ranks.rank == 1)  # type: ignore[assignment]
        worker.at(step).save(writer, {})
        committed.append(writer.wait())
    return torch.tensor(committed)


class Failing:
    """A local filesystem whose disk may be full."""

    def __init__(self, full: bool) -> None:
        self._inner, self._full = pafs.LocalFileSystem(), full

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def open_output_stream(self, path: str) -> Any:
        if self._full:
            raise OSError(28, "No space left on device")
        return self._inner.open_output_stream(path)


def test_a_rank_that_cannot_write_leaves_the_checkpoint_out(tmp_path: Path) -> None:
    for committed in on_ranks(3, fail_on_rank_1, str(tmp_path)):
        assert committed.tolist() == [True, False, True]
    assert steps(tmp_path) == [3, 1]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2, "its files take room for nothing"


def save_unseen(ranks: Ranks, run: str) -> torch.Tensor:
    """Rank 0 sees a file only after a while, as a client of NFS that has listed the directory."""
    storage.SEEN_S = 6.0
    worker, writer = Worker(ranks), writer_of(Path(run), ranks)
    lacking, begins = writer.checkpoints.lacking, time.monotonic()

    def late(name: str, files: Any) -> list[str]:
        return ["hidden"] if time.monotonic() < begins + 2 else lacking(name, files)

    writer.checkpoints.lacking = late  # type: ignore[method-assign]
    worker.at(1).save(writer, {})
    return torch.tensor([writer.wait()])


def test_what_is_seen_late_is_waited_for(tmp_path: Path) -> None:
    assert all(each.all() for each in on_ranks(2, save_unseen, str(tmp_path)))
    assert steps(tmp_path) == [1]


def save_elsewhere(ranks: Ranks, run: str) -> torch.Tensor:
    """Rank 1's directory is another after the first checkpoint, as where a mount is lost."""
    storage.SEEN_S = 1.0
    worker, writer = Worker(ranks), writer_of(Path(run), ranks)
    committed = []
    for step in (1, 2, 3):
        if step == 2 and ranks.rank == 1:
            writer.checkpoints = Checkpoints(f"{run}-of-rank-1")
        worker.at(step).save(writer, {})
        committed.append(writer.wait())
    return torch.tensor(committed)


def test_nothing_is_committed_that_rank_0_does_not_see(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for committed in on_ranks(2, save_elsewhere, str(run)):
        assert committed.tolist() == [True, False, False]
    assert steps(run) == [1]
    assert len(list((run / "checkpoints").iterdir())) == 1


def wait_for_a_late_rank(ranks: Ranks, run: str) -> str:
    """What the next save says after a receipt came later than gloo waits for it."""
    checkpoint_writer.commit_timeout = lambda: timedelta(seconds=1)
    worker, writer = Worker(ranks), writer_of(Path(run), ranks)
    if ranks.rank == 1:
        written = writer.checkpoints.write

        def late(*given: Any) -> Any:
            time.sleep(3)
            return written(*given)

        writer.checkpoints.write = late  # type: ignore[method-assign]
    worker.at(1).save(writer, {})
    with pytest.raises(RuntimeError, match="checkpoints cannot go on"):
        worker.at(2).save(writer, {})
    return "said"


def test_after_a_broken_exchange_the_workers_start_anew(tmp_path: Path) -> None:
    assert on_ranks(2, wait_for_a_late_rank, str(tmp_path)) == ["said", "said"]
    assert steps(tmp_path) == []


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    worker, writer = Worker(Ranks()), writer_of(tmp_path)
    scores = {0: 9.5, 1: 5.0, 2: 9.0, 3: 9.0, 4: 1.0, 5: None, 6: 2.0, 7: None}
    for step, score in scores.items():
        worker.at(step).save(writer, {} if score is None else {METRIC: score})
    assert writer.wait()
    assert steps(tmp_path) == [7, 6, 2]
    found = Checkpoints(str(tmp_path))
    best, newest = found.best(METRIC), found.newest()
    assert best is not None and newest is not None
    assert (saved_step(best), saved_step(newest)) == (2, 7)
    other = found.best("P@5")
    assert other is not None and other.state.step == 7, "nothing has that score: the newest"


def test_a_later_one_that_is_damaged_does_not_cost_the_new_one(tmp_path: Path) -> None:
    """A run that went on from an earlier checkpoint keeps what it writes."""
    worker, writer = Worker(Ranks()), writer_of(tmp_path)
    for step in (9, 3, 4, 5):
        worker.at(step).save(writer, {})
    assert writer.wait()
    assert steps(tmp_path) == [9, 5, 4]


def test_the_next_checkpoint_waits_for_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write, may_go_on, order = threading.Event(), threading.Event(), []
    real = registry.write

    def slow(sink: Any, tensors: Any) -> Any:
        (may_go_on if written else may_write).wait(60)
        return real(sink, tensors)

    monkeypatch.setattr(registry, "write", slow)
    written: list[Written] = []
    worker = Worker(Ranks())
    writer = writer_of(tmp_path, on_written=lambda each: written.append(each))
    worker.at(1).save(writer, {})
    order.append("first returned")
    assert not written
    threading.Timer(0.3, may_write.set).start()
    worker.at(2).save(writer, {})
    assert [each.step for each in written] == [1]
    may_go_on.set()
    assert writer.wait()
    assert [each.step for each in written] == [1, 2]
    assert written[0].bytes == 4 * (2 * LABELS * DIM + DIM * DIM + DIM + 1)


def test_without_memory_for_a_copy_training_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(checkpoint_writer, "available_bytes", lambda: 100)
    written: list[Written] = []
    worker, writer = Worker(Ranks()), writer_of(tmp_path, on_written=written.append)
    for step in (1, 2):
        worker.at(step).save(writer, {})
        assert len(written) == step, "it returned before the checkpoint was there"
    assert caplog.text.count("no memory for a copy") == 1
    assert steps(tmp_path) == [2, 1]


def save_with_little_memory(ranks: Ranks, run: str) -> torch.Tensor:
    """[whether it was there when `save` returned, whether it was committed], on any rank."""
    if ranks.rank == 1:
        checkpoint_writer.available_bytes = lambda: 100  # type: ignore[assignment]
    written: list[Written] = []
    worker = Worker(ranks)
    writer = writer_of(Path(run), ranks, on_written=written.append)
    writer.reserve(worker.encoder, worker.shard)  # type: ignore[arg-type]
    worker.at(1).save(writer, {})
    return torch.tensor([not writer.background, len(written) == 1, writer.wait()])


def test_ranks_agree_whether_they_write_beside_training(tmp_path: Path) -> None:
    for found in on_ranks(2, save_with_little_memory, str(tmp_path)):
        assert found.tolist() == [True, True, True]


# ---------------------------------------------------------------------------------- killed writers

POINTS = 50


class Dying:
    """A local filesystem that kills this process at its n-th operation; a write is two."""

    def __init__(self, point: int) -> None:
        self.inner, self.left, self.seen = pafs.LocalFileSystem(), point, 0

    def _pass(self, half: Callable[[], Any] = lambda: None) -> None:
        self.seen += 1
        if self.left == 0:
            half()
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.inner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self._pass()
            found = method(*args, **kwargs)
            self._pass()
            return found

        return call

    def open_output_stream(self, path: str) -> Any:
        self._pass()
        dying, sink = self, self.inner.open_output_stream(path)

        class Sink:
            def __enter__(self) -> Sink:
                return self

            def __exit__(self, *_: object) -> None:
                sink.close()
                dying._pass()

            def write(self, data: Any) -> None:
                raw = bytes(data)

                def half() -> None:
                    sink.write(raw[: len(raw) // 2])
                    sink.flush()

                dying._pass(half)
                sink.write(raw)
                dying._pass(sink.flush)

        return Sink()


def write_and_die(run: Path, point: int) -> int:
    """The operations of checkpoint 3 in a process of its own, which dies at the `point`-th."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        writer = writer_of(run)
        dying = Dying(point)
        writer.checkpoints.filesystem = dying  # type: ignore[assignment]
        worker = Worker(Ranks())
        worker.at(3).save(writer, {})
        writer.wait()
        os.write(writing, str(dying.seen).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        seen = pipe.read()
    os.waitpid(child, 0)
    return int(seen or 0)


def test_a_writer_killed_at_random_points(tmp_path: Path) -> None:
    """While checkpoint 3 is written and checkpoint 1 is deleted for it."""
    before = tmp_path / "before"
    worker, writer = Worker(Ranks()), writer_of(before)
    for step in (1, 2):
        worker.at(step).save(writer, {})
    assert writer.wait()
    run = tmp_path / "run"
    shutil.copytree(before, run)
    total = write_and_die(run, 10**9)
    assert total > POINTS, "fewer points than are wanted: write more finely"
    assert steps(run) == [3, 2]
    found = set()
    for point in random.Random(0).sample(range(total), POINTS):
        shutil.rmtree(run)
        shutil.copytree(before, run)
        assert write_and_die(run, point) == 0, "it was not killed"
        newest = Checkpoints(str(run)).newest()
        assert newest is not None
        found.add(saved_step(newest))
        # What the dead one left does not hinder the next one, which clears it away.
        Worker(Ranks()).at(4).save(again := writer_of(run), {})
        assert again.wait()
        assert len(list((run / "checkpoints").iterdir())) == 2
    assert found == {2, 3}


@pytest.mark.parametrize(("patience", "seconds"), [(None, 1200.0), ("1", 1200.0), ("600", 2400.0)])
def test_the_others_files_are_waited_for_longer_than_storage(
    patience: str | None, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RENEE_RAY_STORAGE_PATIENCE_S", raising=False)
    if patience is not None:
        monkeypatch.setenv("RENEE_RAY_STORAGE_PATIENCE_S", patience)
    assert checkpoint_writer.commit_timeout().total_seconds() == seconds


def test_a_damaged_newest_is_passed_over_and_none_whole_is_an_error(tmp_path: Path) -> None:
    worker, writer = Worker(Ranks()), writer_of(tmp_path)
    assert Checkpoints(str(tmp_path)).newest() is None
    for step in (1, 2):
        worker.at(step).save(writer, {})
    assert writer.wait()
    found = Checkpoints(str(tmp_path))
    newest, older = (Path(each.checkpoint.path) for each in found.found() if each.checkpoint)
    cut = newest / "encoder.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    chosen = found.newest()
    assert chosen is not None and saved_step(chosen) == 1
    assert [each.problem is None for each in found.found()] == [False, True]
    (older / MANIFEST).write_text("{")
    with pytest.raises(CheckpointError, match=r"encoder\.safetensors has .* the manifest says"):
        found.newest()
