"""A trained run in files that need neither Ray nor renee_ray to be read.

    export.json                     what is here, and how a score comes about; written last
    encoder/                        a Hugging Face directory: AutoModel, AutoTokenizer
    head.safetensors                constant [D]; bottleneck [D, H] where the encoder has one
    classifier-NNNNN.safetensors    weight float32 [n, D] of a range of labels
    labels-NNNNN.parquet            label_id, text, train_count of the same range

The classifier passes through memory a range at a time, from wherever the checkpoint is to
wherever the export goes.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save

from renee_ray.config import ExportConfig, ReneeError, RunConfig
from renee_ray.data.dataset import Dataset
from renee_ray.data.models import quiet, resolve_model
from renee_ray.data.storage import absolute, listing, make_directory, remove, write_file
from renee_ray.service.run import RunDirectory
from renee_ray.training.checkpoint import Checkpoint
from renee_ray.training.encoder import Encoder, build_encoder
from renee_ray.xfc.labels import LabelRange
from renee_ray.xfc.shard import Shard
from renee_ray.xfc.storage import Weights

MANIFEST, FORMAT_VERSION = "export.json", 1
OURS = re.compile(
    r"export\.json|encoder|head\.safetensors|classifier-\d+\.safetensors|labels-\d+\.parquet"
)
RANGE_BYTES = 1 << 28
"""Of the classifier in a file, about."""
CPU = torch.device("cpu")
SCORE = (
    "tokens = tokenizer(text, truncation=True, max_length=max_length); "
    "e = mean of encoder(tokens).last_hidden_state over the tokens that are no padding; "
    "e = bottleneck @ e, where there is one; e = e + constant; "
    "score of label l = weight[l] @ e - tail * log(max(train_count[l], 1))"
)


def export_run(run: str, destination: str, config: ExportConfig) -> dict[str, Any]:
    """Writes encoder, classifier and label texts of a run's checkpoint; returns `export.json`.

    Raises:
        ReneeError: no run, no checkpoint, its dataset is gone, or `destination` is taken.
    """
    quiet()
    directory = RunDirectory(absolute(run))
    settings, dataset = directory.config(), directory.dataset()
    checkpoint = directory.checkpoint(config.checkpoint)
    target = _Target(absolute(destination))
    target.claim(config.overwrite)
    # The checkpoint has all weights: the file that training began with is not looked at.
    plain = settings.encoder.model_copy(update={"compile": False, "weights": ""})
    encoder = build_encoder(plain, CPU, 0)
    checkpoint.load_encoder(encoder)
    _write_encoder(target, encoder, settings)
    ranges = [
        _write_range(target, index, owned, checkpoint, dataset, encoder.dim)
        for index, owned in enumerate(_ranges(dataset.manifest.num_labels, encoder.dim))
    ]
    content = {
        "format_version": FORMAT_VERSION,
        "step": checkpoint.state.step,
        "num_labels": dataset.manifest.num_labels,
        "dim": encoder.dim,
        "max_length": min(settings.encoder.max_length, dataset.manifest.max_length),
        "tail": settings.evaluation.tail,
        "score": SCORE,
        "ranges": ranges,
    }
    target.write(MANIFEST, json.dumps(content, indent=1).encode())
    return content


@dataclass(frozen=True)
class _Target:
    """The directory that is written."""

    path: str

    def claim(self, overwrite: bool) -> None:
        """Empties the directory; the file that declares an earlier export complete goes first."""
        names = {info.base_name for info in listing(self.path)}
        if names and (MANIFEST not in names or not all(map(OURS.fullmatch, names))):
            raise ReneeError(f"{self.path} holds other files; give an empty directory")
        if names and not overwrite:
            raise ReneeError(f"{self.path} holds an export already; add overwrite=true")
        base = self.path.rstrip("/")
        for name in sorted(names, key=lambda name: name != MANIFEST):
            remove(f"{base}/{name}")
        make_directory(f"{base}/encoder")

    def write(self, name: str, content: bytes | pa.Buffer) -> None:
        write_file(f"{self.path.rstrip('/')}/{name}", content)


def _ranges(num_labels: int, dim: int) -> Iterator[LabelRange]:
    size = max(1, RANGE_BYTES // (4 * dim))
    for start in range(0, num_labels, size):
        yield LabelRange(start, min(start + size, num_labels), num_labels)


def _write_encoder(target: _Target, encoder: Encoder, settings: RunConfig) -> None:
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory(prefix="renee-ray-export-") as local:
        encoder.backbone.save_pretrained(local)
        AutoTokenizer.from_pretrained(
            resolve_model(settings.encoder.name), trust_remote_code=False, local_files_only=True
        ).save_pretrained(local)
        for file in sorted(Path(local).iterdir()):
            target.write(f"encoder/{file.name}", file.read_bytes())
    head = {"constant": encoder.constant}
    if encoder.bottleneck is not None:
        head["bottleneck"] = encoder.bottleneck.weight.detach()
    target.write("head.safetensors", save(head))


def _write_range(
    target: _Target,
    index: int,
    owned: LabelRange,
    checkpoint: Checkpoint,
    dataset: Dataset,
    dim: int,
) -> dict[str, Any]:
    weights = Weights(checkpoint.state.facts["precision"], len(owned), dim, False, CPU)
    checkpoint.load_shard(Shard(owned, weights), momentum=False)
    names = f"classifier-{index:05d}.safetensors", f"labels-{index:05d}.parquet"
    target.write(names[0], save({"weight": weights.weight.read(0, len(owned)).contiguous()}))
    table = dataset.read_rows(
        "labels", owned.start, owned.stop, ["label_id", "text", "train_count"]
    )
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd")
    target.write(names[1], buffer.getvalue())
    return {"start": owned.start, "stop": owned.stop, "classifier": names[0], "labels": names[1]}
