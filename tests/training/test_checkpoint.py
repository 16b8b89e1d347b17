"""Checkpoints written by three shards and read by any number; what is damaged is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest
import torch
from torch import nn

from renee_ray.config import EncoderConfig
from renee_ray.training.batch import Position
from renee_ray.training.checkpoint import Checkpoint, CheckpointError, State, save, shard_name
from renee_ray.training.encoder import adamw
from renee_ray.training.loss_scale import LossScale
from renee_ray.xfc.labels import LabelRange, split_range
from renee_ray.xfc.shard import Shard
from renee_ray.xfc.storage import SGD, STORAGES, Update, Weights

CPU = torch.device("cpu")
LABELS, DIM = 17, 6
STATE = State(
    Position(2, 5),
    31,
    1,
    LossScale(512.0, 7, dynamic=True),
    44.5,
    {"steps": [{"step": 20}], "evals": []},
    {"num_labels": LABELS},
)


def model(seed: int = 0) -> tuple[nn.Module, torch.optim.AdamW]:
    torch.manual_seed(seed)
    encoder = nn.Sequential(nn.Linear(DIM, 4), nn.LayerNorm(4), nn.Linear(4, DIM))
    encoder.register_buffer("constant", torch.randn(DIM))
    return encoder, adamw(encoder, EncoderConfig(learning_rate=1e-2))  # type: ignore[arg-type]


def train(encoder: nn.Module, optimizer: torch.optim.Optimizer, seed: int, steps: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        encoder(torch.randn(5, DIM, generator=generator)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def empty_shard(
    num_ranks: int, rank: int, precision: str, momentum: bool = True, dim: int = DIM
) -> Shard:
    owned = LabelRange.of_rank(LABELS, num_ranks, rank)
    return Shard(owned, Weights(precision, len(owned), dim, momentum, CPU))


def filled_shard(num_ranks: int, rank: int, precision: str, momentum: bool = True) -> Shard:
    """Weights and velocities that depend on the label only."""
    shard = empty_shard(num_ranks, rank, precision, momentum)
    rows = slice(shard.owned.start, shard.owned.stop)
    generator = torch.Generator().manual_seed(0)
    first, gradient = (torch.randn(LABELS, DIM, generator=generator) for _ in range(2))
    shard.write(shard.owned.start, first[rows])
    n, weights = len(shard.owned), shard.weights
    update = Update(weights, SGD(0.1, 0.9), shard.owned.start)
    one = torch.eye(n, dtype=weights.compute_dtype)
    update(0, n, weights.operand(0, n), one, gradient[rows].to(weights.compute_dtype))
    return shard


def write(
    directory: Path, precision: str = "bf16_split", momentum: bool = True, num_ranks: int = 3,
    steps: int = 3,
) -> Checkpoint:  # fmt: skip
    directory.mkdir(exist_ok=True)
    encoder, optimizer = model()
    train(encoder, optimizer, 1, steps)
    ranges = [split_range(LABELS, num_ranks, rank) for rank in range(num_ranks)]
    for rank in range(num_ranks):
        shard = filled_shard(num_ranks, rank, precision, momentum)
        save(str(directory), STATE, encoder, optimizer, shard, ranges, rank)  # type: ignore[arg-type]
    return opened(directory)


def opened(directory: Path) -> Checkpoint:
    return Checkpoint(pafs.LocalFileSystem(), str(directory))


@pytest.mark.parametrize("precision", STORAGES)
@pytest.mark.parametrize("writers", [1, 3, 20])
@pytest.mark.parametrize("readers", [1, 2, 5, 20])
def test_any_number_of_ranks_reads_what_any_number_wrote(
    tmp_path: Path, precision: str, writers: int, readers: int
) -> None:
    """20 ranks: some own no label."""
    checkpoint = write(tmp_path, precision, num_ranks=writers)
    for rank in range(readers):
        shard = empty_shard(readers, rank, precision)
        checkpoint.load_shard(shard)
        wanted = filled_shard(readers, rank, precision).weights.tensors()
        for name, tensor in shard.weights.tensors().items():
            assert torch.equal(tensor, wanted[name]), name


def test_without_momentum_only_the_weights_are_read(tmp_path: Path) -> None:
    checkpoint = write(tmp_path)
    shard = empty_shard(2, 1, "bf16_split", momentum=False)
    checkpoint.load_shard(shard)
    wanted = filled_shard(2, 1, "bf16_split").weights.weight.read(0, len(shard.owned))
    assert torch.equal(shard.weights.weight.read(0, len(shard.owned)), wanted)
    kept = empty_shard(2, 1, "bf16_split")
    checkpoint.load_shard(kept, momentum=False)
    assert kept.weights.velocity is not None
    assert not kept.weights.velocity.read(0, len(kept.owned)).any()


class Counting:
    """A filesystem that counts the bytes that are read of each file."""

    def __init__(self) -> None:
        self.inner = pafs.LocalFileSystem()
        self.bytes: dict[str, int] = {}

    def open_input_file(self, path: str) -> Any:
        counting, file = self, self.inner.open_input_file(path)

        class File:
            def __enter__(self) -> File:
                return self

            def __exit__(self, *_: object) -> None:
                file.close()

            def read(self) -> bytes:
                return self._count(file.read())

            def read_at(self, nbytes: int, offset: int) -> bytes:
                return self._count(file.read_at(nbytes, offset))

            def _count(self, raw: bytes) -> bytes:
                name = Path(path).name
                counting.bytes[name] = counting.bytes.get(name, 0) + len(raw)
                return raw

        return File()


def test_only_the_bytes_of_the_own_labels_are_read(tmp_path: Path) -> None:
    write(tmp_path, "bf16_split")
    counting = Counting()
    checkpoint = Checkpoint(counting, str(tmp_path))  # type: ignore[arg-type]
    shard = empty_shard(5, 1, "bf16_split")  # labels 3..6: of the first two files
    assert (shard.owned.start, shard.owned.stop) == (3, 6)
    checkpoint.load_shard(shard)
    names = [shard_name(0, 5), shard_name(5, 11)]
    assert set(counting.bytes) == {"state.json", *names}
    headers = 0
    for name in names:
        headers += 8 + int.from_bytes((tmp_path / name).read_bytes()[:8], "little")
    assert sum(counting.bytes[name] for name in names) == headers + shard.weights.nbytes()


def test_state_comes_back(tmp_path: Path) -> None:
    assert write(tmp_path).state == STATE


@pytest.mark.parametrize("steps", [0, 3])
def test_encoder_and_optimizer_go_on_bit_for_bit(tmp_path: Path, steps: int) -> None:
    """A checkpoint from before the first step too: AdamW has no moments then."""
    checkpoint = write(tmp_path, steps=steps)
    encoder, optimizer = model()
    train(encoder, optimizer, 1, steps)
    other, other_optimizer = model(seed=9)
    checkpoint.load_encoder(other)  # type: ignore[arg-type]
    checkpoint.load_optimizer(other, other_optimizer)  # type: ignore[arg-type]
    train(encoder, optimizer, 2)
    train(other, other_optimizer, 2)
    for (name, found), wanted in zip(
        other.state_dict().items(), encoder.state_dict().values(), strict=True
    ):
        assert torch.equal(found, wanted), name
    fresh, fresh_optimizer = model(seed=9)
    checkpoint.load_encoder(fresh)  # type: ignore[arg-type]
    train(fresh, fresh_optimizer, 2)
    if steps:
        assert not torch.equal(fresh[0].weight, encoder[0].weight), "moments matter"  # type: ignore[index]


SECOND = shard_name(5, 11)


def edit_state(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    state = json.loads((directory / "state.json").read_text())
    change(state)
    (directory / "state.json").write_text(json.dumps(state))


def cut(directory: Path, name: str, size: int) -> None:
    path = directory / name
    path.write_bytes(path.read_bytes()[:size])


def edit_header(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    raw = (directory / SECOND).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    (directory / SECOND).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "truncated": lambda d: cut(d, SECOND, (d / SECOND).stat().st_size - 1),
    "header cut": lambda d: cut(d, SECOND, 20),
    "empty file": lambda d: cut(d, SECOND, 0),
    "huge header": lambda d: (d / SECOND).write_bytes(b"\xff" * 400),
    "missing file": lambda d: (d / SECOND).unlink(),
    "rows missing": lambda d: edit_state(d, lambda s: s["shards"].remove(SECOND)),
    "rows twice": lambda d: edit_state(
        d, lambda s: s.update(shards=[shard_name(0, 5), shard_name(11, 17), shard_name(11, 17)])
    ),
    "fewer rows than the name says": lambda d: (d / SECOND).write_bytes(
        (d / shard_name(0, 5)).read_bytes()
    ),
    "header of another kind": lambda d: edit_header(d, lambda h: h.update({"weight.high": [1, 2]})),
    "format version": lambda d: edit_state(d, lambda s: s.update(format_version=1)),
    "no version": lambda d: edit_state(d, lambda s: s.pop("format_version")),
    "another directory": lambda d: edit_state(d, lambda s: s["shards"].append("../x.safetensors")),
    "another directory, well named": lambda d: edit_state(
        d, lambda s: s["shards"].append("../" + SECOND)
    ),
    "not a list": lambda d: edit_state(d, lambda s: s.update(shards=3)),
    "unknown field": lambda d: edit_state(d, lambda s: s.update(more=3)),
    "no position": lambda d: edit_state(d, lambda s: s.pop("position")),
    "state is no JSON": lambda d: (d / "state.json").write_text("{"),
    "state is a list": lambda d: (d / "state.json").write_text("[]"),
    "state is binary": lambda d: (d / "state.json").write_bytes(b"\xff\xfe\x00"),
    "no state": lambda d: (d / "state.json").unlink(),
    "encoder cut": lambda d: cut(d, "encoder.safetensors", 100),
    "no encoder": lambda d: (d / "encoder.safetensors").unlink(),
    "optimizer cut": lambda d: cut(d, "optimizer.safetensors", 100),
    "no optimizer": lambda d: (d / "optimizer.safetensors").unlink(),
}


def load_all(directory: Path, precision: str = "bf16_split", dim: int = DIM) -> None:
    checkpoint = opened(directory)
    encoder, optimizer = model()
    checkpoint.load_encoder(encoder)  # type: ignore[arg-type]
    checkpoint.load_optimizer(encoder, optimizer)  # type: ignore[arg-type]
    checkpoint.load_shard(empty_shard(1, 0, precision, dim=dim))


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_refused_in_one_sentence(tmp_path: Path, damage: str) -> None:
    write(tmp_path)
    load_all(tmp_path)
    DAMAGES[damage](tmp_path)
    with pytest.raises(CheckpointError) as caught:
        load_all(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("precision", "dim"), [("fp32", DIM), ("bf16_split", DIM + 1), ("bf16_split", DIM - 1)]
)
def test_another_precision_or_dimension_is_refused(
    tmp_path: Path, precision: str, dim: int
) -> None:
    write(tmp_path)
    with pytest.raises(CheckpointError, match="another precision, momentum or dimension"):
        load_all(tmp_path, precision, dim)


def test_momentum_that_was_not_saved_is_refused(tmp_path: Path) -> None:
    write(tmp_path, momentum=False)
    with pytest.raises(CheckpointError, match="momentum"):
        load_all(tmp_path)


def test_another_encoder_is_refused(tmp_path: Path) -> None:
    checkpoint = write(tmp_path)
    with pytest.raises(CheckpointError, match="is of another encoder"):
        checkpoint.load_encoder(nn.Linear(3, 3))  # type: ignore[arg-type]
