"""A trained model in this process: texts in, labels out. It needs neither Ray nor a dataset.

model = renee_ray.load("exports/first")
for label in model.predict(["libjson perl"], k=3)[0]:
    print(label.id, label.text, label.score)
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from renee_ray.config.overrides import make_config
from renee_ray.config.score import Searched
from renee_ray.data import tokenizer
from renee_ray.data.models import quiet
from renee_ray.data.storage import absolute
from renee_ray.errors import ReneeError
from renee_ray.model.initialise import embed_texts
from renee_ray.rank.batch import Ragged, ragged
from renee_ray.scoring.index import Search, check_search, open_search
from renee_ray.service.score.saved import Saved, open_saved
from renee_ray.xfc.device import current
from renee_ray.xfc.labels import NONE, LabelRange

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

    def __init__(self, saved: Saved, device: torch.device) -> None:
        facts = saved.facts
        self.num_labels, self.step, self.facts = facts["num_labels"], int(facts["step"]), facts
        self._vocabulary = saved.vocabulary()
        self._encoder = saved.encoder(device).eval()
        self.dim = self._encoder.dim
        every = LabelRange(0, self.num_labels, self.num_labels)
        self.classifier = saved.classifier(every, facts["tail"], device)
        self.search: Search = self.classifier
        self._texts, self._calibration = saved.texts(every), saved.calibration()

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

        calibrated: gives probabilities as scores.

        Raises:
            ReneeError: k is not positive, or `calibrated` without a calibration.
        """
        if k < 1:
            raise ReneeError(f"k={k} asks for no label; give 1 or more")
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
    path = absolute(path)
    saved = open_saved(path, checkpoint)
    if votes := saved.config.evaluation.neighbours:
        log.warning(
            "%s has evaluation.neighbours=%d, and a loaded model leaves votes out: its scores are "
            "those of `predict` with neighbours=0", path, votes,
        )  # fmt: skip
    model = Model(saved, torch.device(device))
    known = check_search(how, path, saved.facts["model"], saved.facts["tail"])
    model.search = open_search(known, model.classifier)
    return model
