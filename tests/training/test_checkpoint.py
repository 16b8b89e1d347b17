"""Checkpoints written by three shards and read by any number; what is damaged is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from renee_ray.checkpoint import tensor_file
from renee_ray.checkpoint.registry import Checkpoints
from renee_ray.checkpoint.state import (
    MANIFEST,
    Checkpoint,
    CheckpointError,
    Manifest,
    State,
    moments_of,
    set_moments,
    shard_name,
)
from renee_ray.checkpoint.tensor_file import Copy, FileFacts, TensorFile
from renee_ray.checkpoint.tensor_file import write as write_tensors
from renee_ray.config.schema import EncoderConfig
from renee_ray.model.encoder import adamw
from renee_ray.model.loss_scale import LossScale
from renee_ray.rank.batch import Position
from renee_ray.xfc.kernels.plain import Update
from renee_ray.xfc.labels import LabelRange, split_range
from renee_ray.xfc.shard import Shard
from renee_ray.xfc.weights.storages import SGD, STORAGES, Weights

CPU = torch.device("cpu")
NAME = "step-000000031-0123abcd"
LABELS, DIM = 17, 6
STATE = State(
    Position(2, 5),
    31,
    1,
    LossScale(512.0, 7, dynamic=True),
    {"P@1": 44.5},
    {"step": 30, "epoch": 1.5, "metrics": {"P@1": 43.0}},
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
    run: Path, precision: str = "bf16_split", momentum: bool = True, num_ranks: int = 3,
    steps: int = 3,
) -> Checkpoint:  # fmt: skip
    """A checkpoint as `num_ranks` ranks write it, without their processes."""
    encoder, optimizer = model()
    train(encoder, optimizer, 1, steps)
    directory = run / "checkpoints" / NAME
    directory.mkdir(parents=True, exist_ok=True)
    files: dict[str, FileFacts] = {}

    def put(name: str, tensors: dict[str, torch.Tensor]) -> None:
        with (directory / name).open("wb") as sink:
            files[name] = write_tensors(sink, tensors)

    for rank in range(num_ranks):
        shard = filled_shard(num_ranks, rank, precision, momentum)
        if len(shard.owned):
            name = shard_name(*split_range(LABELS, num_ranks, rank))
            put(name, shard.weights.tensors())
    put("encoder.safetensors", {k: t.contiguous() for k, t in encoder.state_dict().items()})
    put("optimizer.safetensors", moments_of(encoder, optimizer))  # type: ignore[arg-type]
    (directory / MANIFEST).write_text(Manifest(STATE, {"P@1": 44.5}, files, 1e9).to_json())
    return opened(run)


def opened(run: Path) -> Checkpoint:
    return Checkpoints(str(run)).at(NAME)


WRITERS, READERS = (1, 3, 20), (1, 2, 5, 20)
TRIPLES = [
    (precision, WRITERS[(i + j) % len(WRITERS)], readers)
    for i, precision in enumerate(STORAGES)
    for j, readers in enumerate(READERS)
]
"""Every pair of a storage, a number of writers and one of readers, though not every triple."""


@pytest.mark.parametrize(("precision", "writers", "readers"), TRIPLES)
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
    checkpoint.load_shard(kept, without=("momentum",))
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

            def size(self) -> int:
                return file.size()

            def read(self, nbytes: int | None = None) -> bytes:
                return self._count(file.read(nbytes))

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
    checkpoint = Checkpoint(counting, str(folder_of(tmp_path)))  # type: ignore[arg-type]
    shard = empty_shard(5, 1, "bf16_split")  # labels 3..6: of the first two files
    assert (shard.owned.start, shard.owned.stop) == (3, 6)
    checkpoint.load_shard(shard)
    names = [shard_name(0, 5), shard_name(5, 11)]
    assert set(counting.bytes) == {MANIFEST, *names}


def test_a_range_costs_its_blocks_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tensor, whole blocks around the rows that are wanted; in several strides."""
    monkeypatch.setattr(tensor_file, "BLOCK", 64)
    monkeypatch.setattr(tensor_file, "STRIDE", 192)
    rows, width = 1000, 6
    tensor = torch.arange(rows * width, dtype=torch.float32).view(rows, width)
    path = tmp_path / "t.safetensors"
    with path.open("wb") as sink:
        facts = write_tensors(sink, {"a": tensor, "b": tensor + 0.5})
    assert facts.bytes == path.stat().st_size
    counting = Counting()
    for first, last in (0, 1000), (7, 8), (100, 500), (999, 1000), (3, 3):
        counting.bytes.clear()
        with counting.open_input_file(str(path)) as file:
            opened_file = TensorFile(file, facts)
            before = counting.bytes["t.safetensors"]
            out = torch.empty(last - first, width)
            opened_file.read_into("b", out, first * width * 4)
        assert torch.equal(out, tensor[first:last] + 0.5)
        wanted = (last - first) * width * 4
        assert counting.bytes["t.safetensors"] - before <= wanted + 2 * 64


def test_other_readers_of_safetensors_read_it(tmp_path: Path) -> None:
    write(tmp_path)
    loaded = load_file(folder_of(tmp_path) / SECOND)
    checkpoint = opened(tmp_path)
    shard = empty_shard(3, 1, "bf16_split")
    checkpoint.load_shard(shard)
    for name, tensor in shard.weights.tensors().items():
        assert torch.equal(loaded[name], tensor)


def test_state_comes_back(tmp_path: Path) -> None:
    checkpoint = write(tmp_path)
    assert checkpoint.state == STATE
    checkpoint.verify()


@pytest.mark.parametrize("steps", [0, 3])
def test_encoder_and_optimizer_go_on_bit_for_bit(tmp_path: Path, steps: int) -> None:
    """A checkpoint from before the first step too: AdamW has no moments then."""
    checkpoint = write(tmp_path, steps=steps)
    encoder, optimizer = model()
    train(encoder, optimizer, 1, steps)
    other, other_optimizer = model(seed=9)
    checkpoint.load_encoder(other)  # type: ignore[arg-type]
    set_moments(other, other_optimizer, checkpoint.moments())  # type: ignore[arg-type]
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


def test_the_optimizers_step_lies_where_fused_adamw_wants_it(tmp_path: Path) -> None:
    """On the parameter's device, which is not the host's memory when that is a GPU."""
    moments = write(tmp_path).moments()
    encoder, optimizer = model()
    encoder.to("meta")  # which has no fused kernel, so its optimizer is told afterwards
    elsewhere = torch.optim.AdamW(encoder.parameters())
    elsewhere.param_groups[0]["fused"] = optimizer.param_groups[0]["fused"]
    set_moments(encoder, elsewhere, moments)  # type: ignore[arg-type]
    assert len(elsewhere.state) == len(list(encoder.parameters()))
    for state in elsewhere.state.values():
        assert {each.device.type for each in state.values()} == {"meta"}


def test_a_copy_in_pieces_is_written_as_the_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As pinned memory of a GiB at most is taken for it, not the next power of two of all of it."""
    monkeypatch.setattr(tensor_file, "BLOCK", 8)
    monkeypatch.setattr(tensor_file, "STRIDE", 16)
    monkeypatch.setattr(tensor_file, "PIECE", 64)
    tensors = {
        "of pieces": torch.randn(8, 8), "odd": torch.randn(11, 9).bfloat16(),
        "one number": torch.tensor(3.0), "nothing": torch.zeros(0, 4),
    }  # fmt: skip
    copies = {name: Copy.like(tensor).take(tensor) for name, tensor in tensors.items()}
    assert [len(copy.pieces) for copy in copies.values()] == [4, 4, 1, 0]
    for name, copy in copies.items():
        assert copy.nbytes == tensors[name].nbytes == Copy.bytes_like(tensors[name])
        assert max((len(piece) for piece in copy.pieces), default=0) <= 64
    facts = []
    for path, each in (tmp_path / "tensors", tensors), (tmp_path / "copies", copies):
        with path.open("wb") as sink:
            facts.append(write_tensors(sink, each))
    assert facts[0] == facts[1]
    assert (tmp_path / "tensors").read_bytes() == (tmp_path / "copies").read_bytes()


SECOND = shard_name(5, 11)


def folder_of(run: Path) -> Path:
    return run / "checkpoints" / NAME


def edit(run: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder_of(run) / MANIFEST
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def cut(run: Path, name: str, size: int) -> None:
    path = folder_of(run) / name
    path.write_bytes(path.read_bytes()[:size])


def flip(run: Path, name: str, at: int) -> None:
    path = folder_of(run) / name
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(bytes(raw))


def file(run: Path, name: str = SECOND) -> Path:
    return folder_of(run) / name


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "truncated": lambda d: cut(d, SECOND, file(d).stat().st_size - 1),
    "header cut": lambda d: cut(d, SECOND, 20),
    "empty file": lambda d: cut(d, SECOND, 0),
    "huge header": lambda d: file(d).write_bytes(b"\xff" * 400),
    "a bit of the header": lambda d: flip(d, SECOND, 12),
    "a bit of the weights": lambda d: flip(d, SECOND, file(d).stat().st_size - 1),
    "a bit of the encoder": lambda d: flip(d, "encoder.safetensors", -1),
    "a bit of the optimizer": lambda d: flip(d, "optimizer.safetensors", -1),
    "missing file": lambda d: file(d).unlink(),
    "rows missing": lambda d: edit(d, lambda m: m["files"].pop(SECOND)),
    "another file's content": lambda d: file(d).write_bytes(file(d, shard_name(0, 5)).read_bytes()),
    "format version": lambda d: edit(d, lambda m: m.update(format_version=2)),
    "no version": lambda d: edit(d, lambda m: m.pop("format_version")),
    "another directory": lambda d: edit(
        d, lambda m: m["files"].update({"../x.safetensors": m["files"][SECOND]})
    ),
    "another directory, well named": lambda d: edit(
        d, lambda m: m["files"].update({"../" + SECOND: m["files"].pop(SECOND)})
    ),
    "no mapping": lambda d: edit(d, lambda m: m.update(files=3)),
    "a negative size": lambda d: edit(d, lambda m: m["files"][SECOND].update(bytes=-7)),
    "unknown field": lambda d: edit(d, lambda m: m["state"].update(more=3)),
    "no position": lambda d: edit(d, lambda m: m["state"].pop("position")),
    "manifest is no JSON": lambda d: file(d, MANIFEST).write_text("{"),
    "manifest is deep": lambda d: file(d, MANIFEST).write_text("[" * 100_000),
    "manifest is a list": lambda d: file(d, MANIFEST).write_text("[]"),
    "manifest is binary": lambda d: file(d, MANIFEST).write_bytes(b"\xff\xfe\x00"),
    "no manifest": lambda d: file(d, MANIFEST).unlink(),
    "encoder cut": lambda d: cut(d, "encoder.safetensors", 100),
    "no encoder": lambda d: file(d, "encoder.safetensors").unlink(),
    "optimizer cut": lambda d: cut(d, "optimizer.safetensors", 100),
    "no optimizer": lambda d: file(d, "optimizer.safetensors").unlink(),
}


def load_all(run: Path, precision: str = "bf16_split", dim: int = DIM) -> None:
    checkpoint = opened(run)
    encoder, optimizer = model()
    checkpoint.load_encoder(encoder)  # type: ignore[arg-type]
    set_moments(encoder, optimizer, checkpoint.moments())  # type: ignore[arg-type]
    checkpoint.load_shard(empty_shard(1, 0, precision, dim=dim))


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_refused_in_one_sentence(tmp_path: Path, damage: str) -> None:
    write(tmp_path)
    load_all(tmp_path)
    DAMAGES[damage](tmp_path)
    for look in load_all, lambda run: opened(run).verify():
        with pytest.raises(CheckpointError) as caught:
            look(tmp_path)
        assert "\n" not in str(caught.value)
        assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("precision", "dim"), [("fp32", DIM), ("bf16_split", DIM + 1), ("bf16_split", DIM - 1)]
)
def test_another_precision_or_dimension_is_refused(
    tmp_path: Path, precision: str, dim: int
) -> None:
    write(tmp_path)
    with pytest.raises(CheckpointError, match="another precision, momentum, average or dimension"):
        load_all(tmp_path, precision, dim)


def test_momentum_that_was_not_saved_is_refused(tmp_path: Path) -> None:
    write(tmp_path, momentum=False)
    with pytest.raises(CheckpointError, match="momentum"):
        load_all(tmp_path)


def test_another_encoder_is_refused(tmp_path: Path) -> None:
    checkpoint = write(tmp_path)
    with pytest.raises(CheckpointError, match="is of another encoder"):
        checkpoint.load_encoder(nn.Linear(3, 3))  # type: ignore[arg-type]
