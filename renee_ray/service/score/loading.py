"""A trained model in this process: texts in, labels out. It needs neither Ray nor a dataset.

model = renee_ray.load("exports/first")
for label in model.predict(["libjson perl"], k=3)[0]:
    print(label.id, label.text, label.score)
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from renee_ray.config.overrides import make_config
from renee_ray.config.schema import NO_TRANSFORMER, EncoderConfig
from renee_ray.config.score import Searched
from renee_ray.data import tokenizer
from renee_ray.data.models import quiet
from renee_ray.data.storage import absolute, filesystem_of
from renee_ray.data.untrusted import parse_json
from renee_ray.errors import ReneeError, reason
from renee_ray.model.encoder import Encoder, build_encoder
from renee_ray.model.initialise import embed_texts
from renee_ray.rank.batch import Ragged, ragged
from renee_ray.scoring.calibration import Calibration
from renee_ray.scoring.index import Classifier, Search, check_search, open_search
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
from renee_ray.xfc.device import current
from renee_ray.xfc.labels import NONE, LabelRange
from renee_ray.xfc.shard import Shard
from renee_ray.xfc.weights.storages import Weights

log = logging.getLogger(__name__)

BATCH = 256
"""Texts that are scored at once."""


class Label(NamedTuple):
    """A label of an answer. score: the logit, adjusted as the run says, or a probability."""

    id: int
    text: str
    score: float


class Model:
    """A trained model, made by `load`.

    num_labels: L; dim: D, the width of an embedding; step: of the checkpoint.
    """

    def __init__(
        self,
        encoder: Encoder,
        classifier: Classifier,
        texts: pa.ChunkedArray,
        vocabulary: str,
        facts: dict[str, Any],
    ) -> None:
        self.num_labels, self.dim, self.step = len(texts), encoder.dim, int(facts["step"])
        self._encoder, self._texts = encoder.eval(), texts
        self._vocabulary, self.facts = vocabulary, facts
        fitted = facts.get("calibration")
        self._calibration = Calibration.from_json(fitted, "the export") if fitted else None
        self.classifier = classifier
        self.search: Search = classifier

    def embed(self, texts: list[str]) -> NDArray[np.float32]:
        """Returns the texts' embeddings, float32 [n, D]."""
        found = [np.empty((0, self.dim), np.float32)]
        for start in range(0, len(texts), BATCH):  # a device need not hold all of them
            some = texts[start : start + BATCH]
            tokens = tokenizer.encode(self._vocabulary, some, self.facts["text_tokens"])
            found.append(self.embed_tokens(ragged(tokens)).cpu().numpy())
        return np.concatenate(found)

    @torch.inference_mode()
    def embed_tokens(self, tokens: Ragged) -> Tensor:
        """Embeds rows of tokens, as a dataset has them; float32 [n, D] on the device."""
        facts = self.facts
        with current(self._encoder.constant.device):
            return embed_texts(self._encoder, tokens, facts["max_length"], facts["pad_id"])

    @torch.inference_mode()
    def predict(
        self, texts: list[str], k: int = 5, *, calibrated: bool = False
    ) -> list[list[Label]]:
        """Returns the k best labels of each text, best first; fewer where so many are not there.

        calibrated: gives probabilities as scores. Raises ReneeError without a calibration.
        """
        k = min(k, self.num_labels)
        if calibrated and self._calibration is None:
            raise ReneeError(
                "the model has no calibration; make one by `renee-ray evaluate RUN DATASET "
                "split=validation calibrate=true`, and export the run again"
            )
        answers = []
        device = self._encoder.constant.device
        for start in range(0, len(texts), BATCH):
            embeddings = torch.from_numpy(self.embed(texts[start : start + BATCH])).to(device)
            with current(device):
                scores, labels = self.search.search(embeddings, k)
            if calibrated and self._calibration is not None:
                scores = torch.from_numpy(self._calibration(scores.cpu().numpy()))
            names = self._texts.take(pa.array(labels.flatten().clamp(min=0).tolist())).to_pylist()
            rows = zip(labels.tolist(), scores.tolist(), range(0, len(names), k), strict=True)
            answers += [
                [
                    Label(*each)
                    for each in zip(ids, names[at : at + k], row, strict=True)
                    if each[0] != NONE
                ]
                for ids, row, at in rows
            ]
        return answers


def load(
    path: str, *, checkpoint: str = "best", device: str = "cpu", search: str = "exact"
) -> Model:
    """Loads an export or a run, from a directory or a URL as s3://bucket/export.

    On a CPU the classifier of a local export is mapped into memory: what no question touches is
    not read. One behind a URL is copied to a temporary directory first. That of a run is read
    into memory, in the precision that it was trained in; its votes of neighbours are left out.

    Args:
        checkpoint: of a run: `best` on the validation split, or `last`.
        device: of torch, such as `cuda`.
        search: `exact`, or `index`: by the index that `renee-ray index` has put at PATH-index.

    Raises:
        ReneeError: there is neither an export nor a run, one that is damaged, or no index of it.
    """
    quiet()
    how = make_config(Searched, {"search": search}, where="load")
    model = _loaded(absolute(path), checkpoint, torch.device(device))
    known, tail = model.facts.get("model", ""), model.facts["tail"]
    model.search = open_search(check_search(how, path, known, tail), model.classifier)
    return model


def _loaded(path: str, checkpoint: str, device: torch.device) -> Model:
    filesystem, root = filesystem_of(path)
    files = filesystem.get_file_info([f"{root}/{MANIFEST}", f"{root}/{RUN_FILE}"])
    is_export, is_run = (info.type == pafs.FileType.File for info in files)
    if is_run:
        return _of_run(path, checkpoint, device)
    if not is_export:
        raise ReneeError(
            f"{path} is neither an export nor a run: it has no {MANIFEST} and no {RUN_FILE}; "
            f"give a directory that `renee-ray export` or `renee-ray train` made"
        )
    with files_of(path) as local:
        facts, classifier, texts = exported_labels(local, device)
        settings = EncoderConfig.model_validate(facts["encoder"])
        facts.setdefault("text_tokens", facts["max_length"])  # of an export before 0.1.0
        name = NO_TRANSFORMER if settings.name == NO_TRANSFORMER else str(local / ENCODER)
        settings = settings.model_copy(update=TRAINED | {"name": name})
        encoder = build_encoder(settings, device, 0)
        load_head(encoder, load_file(local / HEAD))
        vocabulary = tokenizer.load(str(local / ENCODER), fetch=False)
        return Model(encoder, classifier, texts, vocabulary.serialised, facts)


def exported_labels(
    local: Path, device: torch.device
) -> tuple[dict[str, Any], Classifier, pa.ChunkedArray]:
    """Reads an export without its encoder: `export.json`, the classifier and the label texts.

    The rows are mapped into memory, and copied where they are to be on a GPU.
    """
    facts, shards, tables = parse_json((local / MANIFEST).read_text()), [], []
    for each in facts["ranges"]:
        if not all(FILES.fullmatch(each[name]) for name in ("classifier", "labels")):
            raise ValueError("it names files that no export has")
        owned = LabelRange(each["start"], each["stop"], facts["num_labels"])
        with safe_open(local / each["classifier"], "pt") as file:
            shards.append(Shard(owned, Weights.of(file.get_tensor("weight").to(device))))
        tables.append(pq.read_table(local / each["labels"], columns=["text", "train_count"]))
        if not len(owned) == shards[-1].weights.rows == len(tables[-1]):
            raise ValueError(f"its files of labels {owned.start} on do not fit together")
    labels = pa.concat_tables(tables)
    hidden = np.zeros(len(labels), dtype=bool)
    hidden[facts.get("retired", [])] = True
    classifier = adjusted(shards, labels["train_count"].to_numpy(), facts["tail"], hidden)
    return facts, classifier, labels["text"]


@contextlib.contextmanager
def files_of(path: str) -> Iterator[Path]:
    """Yields the directory of an export, or of a copy if it is remote; errors name `path`."""
    filesystem, root = filesystem_of(path)
    with contextlib.ExitStack() as stack:
        if not isinstance(filesystem, pafs.LocalFileSystem):
            # Mapped files outlive it.
            copy = stack.enter_context(tempfile.TemporaryDirectory(prefix="renee-ray-load-"))
            pafs.copy_files(root, copy, source_filesystem=filesystem)
            root = copy
        try:
            yield Path(root)
        except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
            raise ReneeError(
                f"{path} is damaged, or an export of an earlier renee_ray ({reason(error):.200}); "
                f"export the run again"
            ) from None


def _of_run(path: str, which: str, device: torch.device) -> Model:
    directory, found, dataset = opened(path, which)
    config = directory.config()
    if config.evaluation.neighbours:
        log.warning(
            "%s has evaluation.neighbours=%d, and a loaded model leaves votes out: its scores are "
            "those of `predict` with neighbours=0", path, config.evaluation.neighbours,
        )  # fmt: skip
    manifest = dataset.manifest
    encoder = trained_encoder(config.encoder, found, device)
    owned = LabelRange(0, manifest.num_labels, manifest.num_labels)
    hidden = hidden_labels(dataset, found)
    classifier = trained_classifier(
        found, dataset, owned, config.evaluation.tail, hidden, device, config.classifier.chunk
    )
    known = calibration_of(
        directory, found.name, config.evaluation.model_copy(update={"neighbours": 0})
    )
    facts = {
        "step": found.state.step,
        "calibration": known and known.to_json(),
        "model": found.hash,
        "tail": config.evaluation.tail,
        "max_length": min(config.encoder.max_length, manifest.max_length),
        "text_tokens": manifest.max_length,
        "pad_id": manifest.pad_id,
    }
    texts = dataset.read_rows("labels", 0, manifest.num_labels, ["text"])["text"]
    return Model(encoder, classifier, texts, vocabulary_of(dataset), facts)
