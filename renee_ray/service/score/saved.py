"""What a training has left: a checkpoint of its run, or an export. Both give the same pieces.

Label vectors and texts are read a range of labels at a time, so that a process of a service, or a
task that builds an index, holds its own range alone. Neither Ray nor the encoder is needed for it.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from renee_ray.config.schema import NO_TRANSFORMER, EncoderConfig, EvalConfig, RunConfig
from renee_ray.data import tokenizer
from renee_ray.data.storage import filesystem_of, read_file, storage_error
from renee_ray.data.untrusted import parse_json
from renee_ray.errors import ReneeError, reason
from renee_ray.model.encoder import Encoder, build_encoder
from renee_ray.scoring.calibration import Calibration
from renee_ray.scoring.index import Classifier
from renee_ray.service.run.directory import RUN_FILE
from renee_ray.service.run.labels import hidden_labels, opened, vocabulary_of
from renee_ray.service.score.calibrate import calibration_of
from renee_ray.service.score.export import ENCODER, FILES, HEAD, MANIFEST, load_head
from renee_ray.service.score.trained import (
    TRAINED,
    adjusted,
    trained_classifier,
    trained_encoder,
)
from renee_ray.xfc.labels import LabelRange
from renee_ray.xfc.shard import Shard
from renee_ray.xfc.weights.storages import Weights

NUMBERS = ("step", "num_labels", "max_length", "text_tokens", "pad_id")
"""Facts that are integers."""


class SavedRun:
    """A checkpoint of a run, with its dataset.

    name: of the checkpoint, by which it can be opened again; facts: as those of an `Export`.

    Raises:
        ReneeError: there is no such run, checkpoint or dataset.
    """

    def __init__(self, path: str, which: str) -> None:
        self.directory, self.checkpoint, self.dataset = opened(path, which)
        self.path, self.name, self.config = path, self.checkpoint.name, self.directory.config()
        manifest = self.dataset.manifest
        self.facts: dict[str, Any] = {
            "step": self.checkpoint.state.step,
            "model": self.checkpoint.hash,
            "num_labels": manifest.num_labels,
            "tail": self.config.evaluation.tail,
            "max_length": min(self.config.encoder.max_length, manifest.max_length),
            "text_tokens": manifest.max_length,
            "pad_id": manifest.pad_id,
        }

    def vocabulary(self) -> str:
        """Returns the tokenizer, as `tokenizer.encode` takes it."""
        return vocabulary_of(self.dataset)

    def encoder(self, device: torch.device) -> Encoder:
        return trained_encoder(self.config.encoder, self.checkpoint, device)

    def classifier(self, owned: LabelRange, tail: float, device: torch.device) -> Classifier:
        hidden, chunk = hidden_labels(self.dataset, self.checkpoint), self.config.classifier.chunk
        return trained_classifier(self.checkpoint, self.dataset, owned, tail, hidden, device, chunk)

    def texts(self, owned: LabelRange) -> pa.LargeStringArray:
        return _large(self.dataset.read_rows("labels", owned.start, owned.stop, ["text"])["text"])

    def calibration(self) -> Calibration | None:
        """Returns that of scores without votes."""
        without = self.config.evaluation.model_copy(update={"neighbours": 0})
        return calibration_of(self.directory, self.name, without)


class Export:
    """An export. Of one behind a URL, files are copied to this machine when they are needed.

    facts: `export.json`: "step", "model" (SHA-256 of the checkpoint's manifest), "num_labels",
    "tail", "max_length" and "text_tokens", "pad_id", ...; config: with what of it scoring reads.

    Raises:
        ReneeError: it is damaged; `classifier` and the others raise it too.
    """

    name = "best"

    def __init__(self, path: str) -> None:
        self.path = path
        content = read_file(f"{path}/{MANIFEST}") or b""
        with self._reading():
            told = parse_json(content)
            before = {"model": "", "text_tokens": told["max_length"]}  # 0.1.0
            self.facts: dict[str, Any] = before | told
            self.facts |= {key: int(self.facts[key]) for key in NUMBERS}
            self.config = RunConfig(
                data=path, output=path, num_workers=1,
                encoder=EncoderConfig.model_validate(self.facts["encoder"]),
                evaluation=EvalConfig(tail=self.facts["tail"], neighbours=0),
            )  # fmt: skip

    def vocabulary(self) -> str:
        with self._reading():
            return tokenizer.load(str(self._local(ENCODER)), fetch=False).serialised

    def encoder(self, device: torch.device) -> Encoder:
        settings = self.config.encoder
        with self._reading():
            alone = settings.name == NO_TRANSFORMER
            name = NO_TRANSFORMER if alone else str(self._local(ENCODER))
            encoder = build_encoder(settings.model_copy(update=TRAINED | {"name": name}), device, 0)
            load_head(encoder, load_file(self._local(HEAD)))
        return encoder

    def classifier(self, owned: LabelRange, tail: float, device: torch.device) -> Classifier:
        """Opens label vectors: mapped into memory on a CPU, copied where they are for a GPU."""
        shards, counts, number = [], [], self.facts["num_labels"]
        with self._reading():
            for each, here in self._ranges(owned, "classifier"):
                with safe_open(self._local(each["classifier"]), "pt") as file:
                    rows = file.get_tensor("weight")
                if len(rows) != each["stop"] - each["start"]:
                    raise ValueError(f"{each['classifier']} has {len(rows)} rows")
                part = LabelRange(each["start"] + here.start, each["start"] + here.stop, number)
                shards.append(Shard(part, Weights.of(rows[here].to(device))))
                counts.append(self._column(each, here, "train_count").to_numpy())
            hidden = np.zeros(number, dtype=bool)
            hidden[self.facts.get("retired", [])] = True
            own = hidden[owned.start : owned.stop]
            return adjusted(shards, np.concatenate(counts), tail, own)

    def texts(self, owned: LabelRange) -> pa.LargeStringArray:
        with self._reading():
            parts = [self._column(*each, "text") for each in self._ranges(owned, "labels")]
            return _large(pa.chunked_array([chunk for part in parts for chunk in part.chunks]))

    def calibration(self) -> Calibration | None:
        fitted = self.facts.get("calibration")
        return Calibration.from_json(fitted, self.path) if fitted else None

    def _ranges(self, owned: LabelRange, kind: str) -> Iterator[tuple[dict[str, Any], slice]]:
        """Yields the export's ranges that have labels of `owned`, and their places there."""
        held = owned.start
        for each in self.facts["ranges"]:
            if not FILES.fullmatch(each[kind]):
                raise ValueError(f"{each[kind]!r:.80} is no file of an export")
            low, high = max(held, each["start"]), min(owned.stop, each["stop"])
            if low < high:
                if low != held:
                    break
                yield each, slice(low - each["start"], high - each["start"])
                held = high
        if held != owned.stop:
            raise ValueError(f"it lacks label {held}")

    def _column(self, each: dict[str, Any], here: slice, name: str) -> pa.ChunkedArray:
        column = pq.read_table(self._local(each["labels"]), columns=[name])[name]
        if len(column) != each["stop"] - each["start"]:
            raise ValueError(f"{each['labels']} has {len(column)} rows")
        return column[here]

    def _local(self, name: str) -> Path:
        """Returns a file or folder of the export, or a copy of what is behind a URL."""
        filesystem, root = filesystem_of(self.path)
        if isinstance(filesystem, pafs.LocalFileSystem):
            return Path(root, name)
        copy = self._copies / name
        if not copy.exists():
            try:
                pafs.copy_files(f"{root}/{name}", str(copy), source_filesystem=filesystem)
            except FileNotFoundError:
                raise
            except OSError as error:  # the export may be whole
                raise storage_error(error) from error
        return copy

    @cached_property
    def _copies(self) -> Path:
        made = tempfile.mkdtemp(prefix="renee-ray-export-")
        weakref.finalize(self, shutil.rmtree, made, ignore_errors=True)
        return Path(made)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
            raise ReneeError(
                f"{self.path} is damaged, or an export of an earlier renee_ray "
                f"({reason(error):.200}); export the run again"
            ) from None


Saved = SavedRun | Export


def open_saved(path: str, which: str = "best", model: str = "") -> Saved:
    """Opens a run, with the checkpoint `which` (`best`, `last` or a name), or an export.

    model: what its fact of this name must be, where another process has opened it before.

    Raises:
        ReneeError: there is neither, one that is damaged, or another model.
    """
    found = _opened(path, which)
    if model and found.facts["model"] != model:
        raise ReneeError(f"{path} holds another model than a moment ago; begin anew")
    return found


def _opened(path: str, which: str) -> Saved:
    filesystem, root = filesystem_of(path)
    files = filesystem.get_file_info([f"{root}/{MANIFEST}", f"{root}/{RUN_FILE}"])
    is_export, is_run = (info.type == pafs.FileType.File for info in files)
    if is_run:
        return SavedRun(path, which)
    if not is_export:
        raise ReneeError(
            f"{path} is neither an export nor a run: it has no {MANIFEST} and no {RUN_FILE}; "
            f"give a directory that `renee-ray export` or `renee-ray train` made"
        )
    return Export(path)


def _large(texts: pa.ChunkedArray) -> pa.LargeStringArray:
    """Joins texts, of which `take` would else copy all each time, and 2 GiB at most."""
    return texts.cast(pa.large_string()).combine_chunks()
