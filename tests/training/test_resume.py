"""Ranks agree on the newest checkpoint that all of them can read."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch

from renee_ray.checkpoint.registry import Checkpoints
from renee_ray.checkpoint.resume import resume
from renee_ray.checkpoint.state import Checkpoint, CheckpointError
from renee_ray.model.model import Model
from renee_ray.rank.collectives import Ranks

from .gloo import on_ranks
from .test_checkpoint_writer import Worker, writer_of


def written(run: Path, *steps: int) -> list[Path]:
    """Checkpoints of one rank, the newest first."""
    worker, writer = Worker(Ranks()), writer_of(run)
    for step in steps:
        worker.at(step).save(writer, {})
    assert writer.wait()
    return [Path(each.checkpoint.path) for each in Checkpoints(str(run)).found() if each.checkpoint]


def flip_last(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(bytes(raw))


def resumed(ranks: Ranks, run: str) -> torch.Tensor:
    """[step, a weight of the shard, a parameter of the encoder, moments] as this rank has them."""

    def build(checkpoint: Checkpoint | None) -> Model:
        worker = Worker(ranks)
        return Model(worker.encoder, worker.shard)  # type: ignore[arg-type]

    try:
        model, checkpoint, moments = resume(Checkpoints(run), ranks, build)
    except CheckpointError as error:
        assert "no checkpoint that can be read" in str(error)
        return torch.tensor([-1.0])
    if checkpoint is None:
        return torch.tensor([0.0])
    weight = model.shard.weights.read(0, 1)[0, 0]
    parameter = next(model.encoder.parameters()).flatten()[0]
    return torch.tensor([checkpoint.state.step, weight, parameter, len(moments)])


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_the_newest_that_all_can_read(tmp_path: Path, num_ranks: int) -> None:
    """The damage is in the last rank's labels alone; sizes are right, the others see nothing."""
    newest, _ = written(tmp_path, 1, 2)
    for each in on_ranks(num_ranks, resumed, str(tmp_path)):
        assert each.tolist() == [2, 2, 2, 1]
    (file,) = newest.glob("classifier-*")
    flip_last(file)
    for each in on_ranks(num_ranks, resumed, str(tmp_path)):
        assert each.tolist() == [1, 1, 1, 1]


def test_a_damaged_one_makes_room_first(tmp_path: Path) -> None:
    newest, _ = written(tmp_path, 1, 2)
    (file,) = newest.glob("classifier-*")
    flip_last(file)
    built: list[weakref.ref[torch.Tensor]] = []

    def build(checkpoint: Checkpoint | None) -> Model:
        assert all(each() is None for each in built), "two models are in memory"
        worker = Worker(Ranks())
        tensors = [*worker.shard.weights.tensors().values(), *worker.encoder.parameters()]
        built.extend(map(weakref.ref, tensors))
        return Model(worker.encoder, worker.shard)  # type: ignore[arg-type]

    _, checkpoint, _ = resume(Checkpoints(str(tmp_path)), Ranks(), build)
    assert checkpoint is not None and checkpoint.state.step == 1


def test_nothing_and_nothing_readable(tmp_path: Path) -> None:
    assert resumed(Ranks(), str(tmp_path)).tolist() == [0]
    for directory in written(tmp_path, 1, 2):
        flip_last(directory / "encoder.safetensors")
    for each in on_ranks(2, resumed, str(tmp_path)):
        assert each.tolist() == [-1]
