"""Checkpoints that know nothing of the number of workers. Safetensors and JSON, no pickle.

    state.json                            position, counters, history, what the files below hold
    encoder.safetensors                   parameters, by name
    optimizer.safetensors                 AdamW's moments, by parameter name
    classifier-START-STOP.safetensors     the rows of labels [START, STOP): one file a writer

Each rank writes its own classifier file, rank 0 the rest; Ray Train merges the directories
and commits them. A reader of any world size takes the byte ranges of the label rows that it
owns, from whichever files hold them: a safetensors file is a JSON header and raw rows, so a
label range is one contiguous read per tensor, local or in object storage.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs as pafs
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save_file
from torch import Tensor

from renee_ray.config import ReneeError, reason
from renee_ray.data.storage import is_transient, patiently
from renee_ray.training.batch import Position
from renee_ray.training.encoder import Encoder
from renee_ray.training.loss_scale import LossScale
from renee_ray.xfc.shard import Shard

FORMAT_VERSION = 2
STATE, ENCODER, OPTIMIZER = "state.json", "encoder.safetensors", "optimizer.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")
HEADER_LIMIT = 1 << 20
DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
}
SHARD_NAME = re.compile(r"classifier-(\d+)-(\d+)\.safetensors")


class CheckpointError(ReneeError):
    """A checkpoint that cannot be used."""


@dataclass
class State:
    """What a run is besides its tensors.

    position: the next batch; step: optimizer steps taken or skipped so far; skipped: those
    left out; loss_scale: of the encoder's gradient; best: best validation score so far; history:
    as in RUN/history.json; facts: what a reader must know to build the model.
    """

    position: Position = field(default_factory=Position)
    step: int = 0
    skipped: int = 0
    loss_scale: LossScale = field(default_factory=LossScale)
    best: float | None = None
    history: dict[str, list[dict[str, Any]]] = field(
        default_factory=lambda: {"steps": [], "evals": []}
    )
    facts: dict[str, Any] = field(default_factory=dict)

    def to_json(self, shards: list[str]) -> str:
        return json.dumps({"format_version": FORMAT_VERSION, "shards": shards, **asdict(self)})

    @classmethod
    def from_json(cls, text: str, where: str) -> tuple[State, list[str]]:
        """(state, names of the classifier files).

        Raises:
            CheckpointError: another format, or not what `to_json` writes.
        """
        try:
            raw = json.loads(text)
            version, shards = raw.pop("format_version"), raw.pop("shards")
            if version != FORMAT_VERSION:
                raise CheckpointError(
                    f"{where} has format version {version!r} and this renee_ray reads "
                    f"{FORMAT_VERSION}; use the renee_ray that wrote it"
                )
            if not all(SHARD_NAME.fullmatch(name) for name in shards):
                raise ValueError("classifier file names")
            nested = {
                "position": Position(**raw["position"]),
                "loss_scale": LossScale(**raw["loss_scale"]),
            }
            return cls(**{**raw, **nested}), shards
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{where} is damaged ({reason(error)}); use another checkpoint"
            ) from None


def save(
    directory: str,
    state: State,
    encoder: Encoder,
    optimizer: torch.optim.Optimizer,
    shard: Shard,
    ranges: list[tuple[int, int]],
    rank: int,
) -> None:
    """Writes this rank's files into a local directory.

    Args:
        ranges: label ranges of all ranks.
    """
    names = [shard_name(*r) for r in ranges if r[0] < r[1]]
    if len(shard.owned):
        name = shard_name(shard.owned.start, shard.owned.stop)
        save_file(shard.weights.tensors(), f"{directory}/{name}")
    if rank == 0:
        tensors = {name: t.detach().contiguous() for name, t in encoder.state_dict().items()}
        save_file(tensors, f"{directory}/{ENCODER}")
        save_file(_moments(encoder, optimizer), f"{directory}/{OPTIMIZER}")
        Path(directory, STATE).write_text(state.to_json(names), encoding="utf-8")


class Checkpoint:
    """A committed checkpoint, read in ranges.

    Args:
        filesystem, path: its directory.
    """

    def __init__(self, filesystem: pafs.FileSystem, path: str) -> None:
        self.filesystem, self.path = filesystem, path.rstrip("/")
        text = self._bytes(STATE).decode(errors="replace")
        self.state, self._shards = State.from_json(text, f"{self.path}/{STATE}")

    def load_encoder(self, encoder: Encoder) -> None:
        """Raises CheckpointError where the parameters are not those of this encoder."""
        try:
            encoder.load_state_dict(self._tensors(ENCODER), strict=True)
        except RuntimeError as error:
            raise CheckpointError(
                f"{self.path}/{ENCODER} is of another encoder: {reason(error)}"
            ) from None

    def load_optimizer(self, encoder: Encoder, optimizer: torch.optim.Optimizer) -> None:
        """Raises CheckpointError where the file is damaged or of another encoder."""
        moments = self._tensors(OPTIMIZER)
        for name, parameter in encoder.named_parameters():
            names = [f"{name}.{key}" for key in MOMENTS]
            # Before its first step AdamW has no state, and must not find a part of one.
            if not all(each in moments for each in names):
                continue
            values = (moments[each].to(parameter.device) for each in names)
            optimizer.state[parameter] = dict(zip(MOMENTS, values, strict=True)) | {
                "step": moments["step"].clone()
            }

    def load_shard(self, shard: Shard, *, momentum: bool = True) -> None:
        """Fills a shard with the rows of the labels it owns, whoever wrote them.

        Raises:
            CheckpointError: another storage or dimension, or rows that no file holds.
        """
        wanted = {
            name: tensor
            for name, tensor in shard.weights.tensors().items()
            if momentum or not name.startswith("momentum")
        }
        filled = 0
        for file, start, stop in self._overlapping(shard.owned.start, shard.owned.stop):
            first, last = max(start, shard.owned.start), min(stop, shard.owned.stop)
            if first != shard.owned.start + filled:
                break
            rows = slice(first - shard.owned.start, last - shard.owned.start)
            read = partial(self._read_rows, file, first - start, last - start, wanted, rows)
            patiently(read, f"reading {self.path}/{file}")
            filled += last - first
        if filled != len(shard.owned):
            raise CheckpointError(
                f"{self.path} holds {filled} of the {len(shard.owned)} labels from "
                f"{shard.owned.start} on; use another checkpoint"
            )

    def _overlapping(self, start: int, stop: int) -> Iterator[tuple[str, int, int]]:
        for name in self._shards:
            match = SHARD_NAME.fullmatch(name)
            assert match is not None  # State.from_json has checked the names
            first, last = int(match[1]), int(match[2])
            if max(first, start) < min(last, stop):
                yield name, first, last

    def _read_rows(
        self, name: str, start: int, stop: int, wanted: dict[str, Tensor], rows: slice
    ) -> None:
        where = f"{self.path}/{name}"
        try:
            with self.filesystem.open_input_file(where) as file:
                length = int.from_bytes(file.read_at(8, 0), "little")
                if length > HEADER_LIMIT:
                    raise CheckpointError(f"{where} has a header of {length} bytes; it is damaged")
                header = json.loads(file.read_at(length, 8))
                for tensor_name, tensor in wanted.items():
                    entry = header[tensor_name]
                    width = tensor.shape[1] * tensor.element_size()
                    if (
                        DTYPES.get(entry["dtype"]) != tensor.dtype
                        or entry["shape"][1] != tensor.shape[1]
                    ):
                        raise KeyError(tensor_name)
                    begin = 8 + length + entry["data_offsets"][0] + start * width
                    raw = file.read_at((stop - start) * width, begin)
                    if len(raw) != (stop - start) * width:
                        raise CheckpointError(f"{where} is truncated; use another checkpoint")
                    flat = torch.from_numpy(np.frombuffer(raw, dtype=np.uint8).copy())
                    tensor[rows].copy_(flat.view(tensor.dtype).view(stop - start, -1))
        except KeyError as error:
            raise CheckpointError(
                f"{where} lacks {error.args[0]!r} as {list(wanted)} expects it; it was written "
                f"with another precision, momentum or dimension"
            ) from None
        except (OSError, ValueError, TypeError, IndexError, RuntimeError) as error:
            if is_transient(error):
                raise
            raise CheckpointError(
                f"{where} cannot be read ({reason(error)}); use another one"
            ) from error

    def _tensors(self, name: str) -> dict[str, Tensor]:
        try:
            return load_bytes(self._bytes(name))
        except SafetensorError as error:
            raise CheckpointError(f"{self.path}/{name} is damaged ({reason(error)})") from None

    def _bytes(self, name: str) -> bytes:
        return patiently(lambda: self._bytes_once(name), f"reading {self.path}/{name}")

    def _bytes_once(self, name: str) -> bytes:
        try:
            with self.filesystem.open_input_file(f"{self.path}/{name}") as file:
                return file.read()
        except OSError as error:
            if is_transient(error):
                raise
            raise CheckpointError(f"{self.path}/{name} cannot be read ({reason(error)})") from error


def shard_name(start: int, stop: int) -> str:
    return f"classifier-{start:012d}-{stop:012d}.safetensors"


def _moments(encoder: Encoder, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {"step": torch.zeros(())}
    for name, parameter in encoder.named_parameters():
        state = optimizer.state.get(parameter, {})
        for key in MOMENTS:
            if key in state:
                tensors[f"{name}.{key}"] = state[key].contiguous()
        if "step" in state:
            tensors["step"] = state["step"].detach().clone().cpu()
    return tensors
