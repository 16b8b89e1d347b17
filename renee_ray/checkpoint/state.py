"""Checkpoints that any number of workers can read: safetensors and JSON, no pickle.

    RUN/checkpoints/step-000000400-1b9f03c2/
        classifier-START-STOP.safetensors     the rows of labels [START, STOP): one file a writer
        encoder.safetensors                   parameters that are trained, by name
        optimizer.safetensors                 AdamW's moments and averages, by parameter name
        manifest.json                         state, metrics, sizes and checksums; written last
        manifest-0001.json                    the same after `renee-ray labels`, which adds files
                                              and changes none: its revision 1

Ledger of the tensors, for L labels, D dimensions and W writers:

    classifier rows    [L, D] in W files by label range    dtypes of the storage (xfc/weights)
    encoder            trained parameters and buffers      float32
    moments            exp_avg, exp_avg_sq and the step    float32
    averages           means of what is trained            float32

A manifest makes a directory a checkpoint; without one, it is what a killed run left. Part of a
directory's name is drawn anew by each group of workers. So a group that was given up for dead and
lives on cannot write into a checkpoint of its successor.

The classifier file of added labels has their names and texts too (`ADDED`).

A reader of any world size takes the byte ranges of the label rows that it owns, from whichever
files hold them, local or in object storage (checkpoint/tensor_file.py).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Annotated, Any, ClassVar, TypeVar

import numpy as np
import pyarrow.fs as pafs
import torch
from pydantic import AfterValidator, ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from renee_ray.checkpoint.tensor_file import FileFacts, TensorFile
from renee_ray.data.storage import is_transient, patiently
from renee_ray.data.untrusted import first_problem, parse_json
from renee_ray.errors import ReneeError, reason
from renee_ray.model.adapters import load_trained
from renee_ray.model.encoder import Encoder
from renee_ray.model.loss_scale import LossScale
from renee_ray.rank.batch import Position
from renee_ray.xfc.shard import Shard

T = TypeVar("T")

FORMAT_VERSION = 4
MANIFEST, ENCODER, OPTIMIZER = "manifest.json", "encoder.safetensors", "optimizer.safetensors"
REVISED = re.compile(r"manifest(?:-(\d{4}))?\.json")
ADDED = "added"
"""Tensor uint8: the names and texts of the labels of a file, as JSON [[name, text], ...]."""
MOMENTS = ("exp_avg", "exp_avg_sq")
SHARD_NAME = re.compile(r"classifier-(\d{12})-(\d{12})\.safetensors")


class CheckpointError(ReneeError):
    """A checkpoint that cannot be used."""


def _known_names(files: dict[str, FileFacts]) -> dict[str, FileFacts]:
    for name in files:
        if name not in (ENCODER, OPTIMIZER) and not SHARD_NAME.fullmatch(name):
            raise ValueError(f"{name!r:.80} is no file of a checkpoint")
    return files


@dataclass
class State:
    """What a run is besides its tensors.

    position: the next batch; step: optimizer steps taken or skipped so far; skipped: steps in
    which the encoder was not updated; loss_scale: of the encoder's gradient; best: the greatest
    value of each metric so far; evaluation: the last one, {"step", "epoch", "metrics"}, or None;
    facts: what a reader must know to build the model.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    position: Position = field(default_factory=Position)
    step: int = 0
    skipped: int = 0
    loss_scale: LossScale = field(default_factory=LossScale)
    best: dict[str, float] = field(default_factory=dict)
    evaluation: dict[str, Any] | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def revision(self) -> int:
        """Number of times that `renee-ray labels` has changed the run's labels."""
        return int(self.facts.get("revision", 0))

    @property
    def retired(self) -> np.ndarray:
        """Ids of retired labels, int64 [m] ascending."""
        return np.array(self.facts.get("retired", []), dtype=np.int64)

    def evaluated(
        self, epoch: float, metrics: dict[str, float], others: dict[str, Any] | None = None
    ) -> None:
        """Takes the metrics of an evaluation after `step` steps, and other figures of it.

        Those before the first step are the best only until there are others.
        """
        earlier = self.best if self.evaluation and self.evaluation["step"] else {}
        self.evaluation = {"step": self.step, "epoch": epoch, "metrics": metrics}
        self.evaluation |= others or {}
        self.best = {name: max(value, earlier.get(name, value)) for name, value in metrics.items()}


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of. metrics: those of the evaluation at this step, or none.

    time_s: seconds since 1970 at its commit.
    """

    state: State
    metrics: dict[str, float]
    files: Annotated[dict[str, FileFacts], AfterValidator(_known_names)]
    time_s: float

    @property
    def size(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(facts.bytes for facts in self.files.values())

    def shards(self) -> Iterator[tuple[str, int, int]]:
        """Yields (name, start, stop) of each classifier file, in the order of labels."""
        for name in sorted(self.files):
            if match := SHARD_NAME.fullmatch(name):
                yield name, int(match[1]), int(match[2])

    def to_json(self) -> str:
        return json.dumps({"format_version": FORMAT_VERSION, **asdict(self)})

    @classmethod
    def from_json(cls, text: bytes, where: str) -> Manifest:
        """Parses a manifest that was read from `where`, which errors name.

        Raises:
            CheckpointError: another format, or not what `to_json` writes.
        """
        try:
            raw = parse_json(text)
            version = raw.pop("format_version")
            if version != FORMAT_VERSION:
                raise CheckpointError(
                    f"{where} has format version {version!r:.40} and this renee_ray reads "
                    f"{FORMAT_VERSION}; use the renee_ray that wrote it"
                )
            if missing := {each.name for each in fields(State)} - raw["state"].keys():
                raise ValueError(f"its state lacks {min(missing)}")
            return _MANIFEST.validate_python(raw)
        except ValidationError as error:
            problem = first_problem(error)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problem = f"cannot be parsed ({reason(error)})"
        raise CheckpointError(f"{where} is damaged: it {problem}; use another checkpoint")


_MANIFEST = TypeAdapter(Manifest)


def file_sizes(filesystem: pafs.FileSystem, directory: str) -> dict[str, int]:
    """Returns the bytes of each file of a checkpoint's directory; reads none."""
    listed = patiently(
        lambda: filesystem.get_file_info(pafs.FileSelector(directory)), f"listing {directory}"
    )
    return {info.base_name: info.size for info in listed}


class Checkpoint:
    """A committed checkpoint, read in ranges.

    Args:
        filesystem, path: its directory; revision: of its labels.

    Raises:
        CheckpointError: no manifest, or a damaged one.
    """

    def __init__(self, filesystem: pafs.FileSystem, path: str, revision: int = 0) -> None:
        self.filesystem, self.path, self.revision = filesystem, path.rstrip("/"), revision
        name = manifest_name(revision)
        text: bytes = self._patiently(name, lambda file: file.read())
        self.manifest = Manifest.from_json(text, f"{self.path}/{name}")
        self.hash = hashlib.sha256(text).hexdigest()
        """SHA-256 of the manifest, which has checksums of all files."""

    @property
    def name(self) -> str:
        """The directory's name, with @ and the revision where there is one."""
        return self.path.rpartition("/")[2] + (f"@{self.revision}" if self.revision else "")

    @property
    def state(self) -> State:
        return self.manifest.state

    def check_sizes(self) -> None:
        """Raises CheckpointError where a file is missing or has another size; reads none."""
        sizes = file_sizes(self.filesystem, self.path)
        for name, facts in self.manifest.files.items():
            if name not in sizes:
                raise CheckpointError(f"{self.path} lacks {name}; use another checkpoint")
            if sizes[name] != facts.bytes:
                raise CheckpointError(
                    f"{self.path}/{name} has {sizes[name]} bytes and the manifest says "
                    f"{facts.bytes}; use another checkpoint"
                )

    def verify(self) -> None:
        """Reads everything and compares checksums.

        Raises:
            CheckpointError: the first file that is not as it was written.
        """
        self.check_sizes()
        for name in self.manifest.files:
            self._open(name, TensorFile.verify)
        held = 0
        for _, start, stop in self.manifest.shards():
            if start != held:
                raise CheckpointError(f"{self.path} lacks label {held}; use another checkpoint")
            held = stop

    def load_encoder(self, encoder: Encoder) -> None:
        """Raises CheckpointError where the parameters are not those of this encoder."""
        try:
            load_trained(encoder, self._open(ENCODER, TensorFile.tensors))
        except RuntimeError as error:
            raise CheckpointError(
                f"{self.path}/{ENCODER} is of another encoder: {reason(error)}"
            ) from None

    def moments(self) -> dict[str, Tensor]:
        """Reads AdamW's moments, for `set_moments`, and averages (training/averages.py)."""
        return self._open(OPTIMIZER, TensorFile.tensors)

    def load_shard(self, shard: Shard, *, without: tuple[str, ...] = ()) -> None:
        """Fills a shard with the rows of the labels it owns, whoever wrote them.

        without: which of momentum and average to leave as they are, where the shard has them.

        Raises:
            CheckpointError: another storage or dimension, or rows that no file holds.
        """
        wanted = {
            name: tensor
            for name, tensor in shard.weights.tensors().items()
            if not name.startswith(without)
        }
        filled = 0
        for name, start, stop in self.manifest.shards():
            first, last = max(start, shard.owned.start), min(stop, shard.owned.stop)
            if first >= last:
                continue
            if first != shard.owned.start + filled:
                break
            rows = slice(first - shard.owned.start, last - shard.owned.start)
            parts = {each: tensor[rows] for each, tensor in wanted.items()}
            self._open(
                name, partial(_read_rows, parts=parts, first=first - start, rows=stop - start)
            )
            filled += last - first
        if filled != len(shard.owned):
            raise CheckpointError(
                f"{self.path} holds {filled} of the {len(shard.owned)} labels from "
                f"{shard.owned.start} on; use another checkpoint"
            )

    def added(self, first: int) -> list[tuple[str, str]]:
        """Reads (name, text) of the labels from `first` on, which `renee-ray labels` added.

        Raises:
            CheckpointError: no file has them, or one that is damaged.
        """
        labels: list[tuple[str, str]] = []
        for file, start, stop in self.manifest.shards():
            if start < first:
                continue
            raw = self._open(file, lambda each: each.tensors(ADDED)).get(ADDED)
            try:
                found = json.loads(raw.numpy().tobytes()) if raw is not None else []
                pairs = [(str(name), str(text)) for name, text in found]
            except (ValueError, TypeError):
                pairs = []
            if start != first + len(labels) or len(pairs) != stop - start:
                raise CheckpointError(
                    f"{self.path}/{file} does not name its labels; use a dataset that has them all"
                )
            labels += pairs
        return labels

    def _open(self, name: str, use: Callable[[TensorFile], T]) -> T:
        if name not in self.manifest.files:
            raise CheckpointError(f"{self.path} has no {name}; use another checkpoint")
        facts = self.manifest.files[name]
        return self._patiently(name, lambda file: use(TensorFile(file, facts)))

    def _patiently(self, name: str, use: Callable[[pafs.NativeFile], T]) -> T:
        where = f"{self.path}/{name}"

        def once() -> T:
            with self.filesystem.open_input_file(where) as file:
                return use(file)

        try:
            return patiently(once, f"reading {where}")
        except _DoesNotFit as error:
            raise CheckpointError(f"{where} {error}") from None
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            if is_transient(error):  # storage is away: nothing is known of the file
                raise
            raise CheckpointError(
                f"{where} cannot be read ({reason(error)}); use another checkpoint"
            ) from error


class _DoesNotFit(Exception):
    """A file that is whole, but of another model."""


def _read_rows(file: TensorFile, parts: dict[str, Tensor], first: int, rows: int) -> None:
    """Fills `parts`, which begin with the row `first` of a file of `rows` rows."""
    shapes = file.shapes()
    for name, out in parts.items():
        if shapes.get(name) != (out.dtype, [rows, out.shape[1]]):
            raise _DoesNotFit(
                f"has no {name} of {rows} x {out.shape[1]} {out.dtype}; it was written with "
                f"another precision, momentum, average or dimension"
            )
        file.read_into(name, out, first * out.shape[1] * out.element_size())


def manifest_name(revision: int) -> str:
    return f"manifest-{revision:04d}.json" if revision else MANIFEST


def shard_name(start: int, stop: int) -> str:
    return f"classifier-{start:012d}-{stop:012d}.safetensors"


def moments_of(encoder: Encoder, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns AdamW's moments and step by parameter name; before its first step the step alone."""
    tensors: dict[str, Tensor] = {"step": torch.zeros(())}
    for name, parameter in encoder.named_parameters():
        state = optimizer.state.get(parameter, {})
        for key in MOMENTS:
            if key in state:
                tensors[f"{name}.{key}"] = state[key].contiguous()
        if "step" in state:
            tensors["step"] = state["step"].detach().clone().cpu()
    return tensors


def set_moments(
    encoder: Encoder, optimizer: torch.optim.Optimizer, moments: dict[str, Tensor]
) -> None:
    """Puts the optimizer into the state from which `moments_of` made `moments`.

    torch's own loading knows on which device each kind of AdamW keeps its `step`.
    """
    names = {parameter: name for name, parameter in encoder.named_parameters()}
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    state = {}
    for index, parameter in enumerate(parameters):
        own = {key: f"{names[parameter]}.{key}" for key in MOMENTS}
        # Before its first step AdamW has no state, and must not find a part of one.
        if all(name in moments for name in own.values()):
            # Loading shares tensors that are on the right device, and AdamW counts in place.
            state[index] = {key: moments[name] for key, name in own.items()} | {
                "step": moments["step"].clone()
            }
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
