"""The deployments of `renee-ray serve`: shards of the classifier, and the encoder that asks them.

A batch of requests takes these steps:

    texts -> embeddings E [B, D]                        in the encoder's process
    E -> (scores, labels) [B, k] of each label range    in every shard: a streaming top-k
    these lists -> the k best, with neighbours' votes   in the encoder's process
    label ids -> label texts                            in the shards that own them

The result equals `renee-ray predict` of the same texts.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray
import torch
from ray import serve
from ray.serve.handle import DeploymentHandle
from torch import Tensor

from renee_ray.config.schema import RunConfig
from renee_ray.config.score import ServeConfig
from renee_ray.data import tokenizer
from renee_ray.rank.batch import padded_tokens, ragged, truncate
from renee_ray.rank.collectives import Ranks
from renee_ray.scoring.index import check_search, open_search
from renee_ray.scoring.neighbours import RERANKED
from renee_ray.service.cluster.feed import embed_voters
from renee_ray.service.cluster.launch import quiet
from renee_ray.service.cluster.ray_compat import replica_on_loopback
from renee_ray.service.score.saved import SavedRun, open_saved
from renee_ray.xfc.labels import LabelRange, owners
from renee_ray.xfc.topk.select import NONE, merge_topk


@dataclass(frozen=True)
class ServedRun:
    """The run or export that a service answers with: Serve keeps a copy for every process.

    config: its own, changed to score with `num_workers` shards; run, checkpoint, model: as
    `open_saved` takes them; facts: the answer of `GET /info`.
    """

    config: RunConfig
    settings: ServeConfig
    run: str
    checkpoint: str
    model: str
    facts: dict[str, Any]

    @property
    def num_shards(self) -> int:
        return self.config.max_workers

    @property
    def num_labels(self) -> int:
        return int(self.facts["labels"])

    @property
    def num_processes(self) -> int:
        return self.num_shards + self.settings.num_encoders


class ShardReplica:
    """The classifier's rows of one range of labels, with their texts. One call at a time."""

    def __init__(self, served: ServedRun, rank: int) -> None:
        replica_on_loopback()
        quiet()
        self._device = _device()
        saved = open_saved(served.run, served.checkpoint, served.model)
        self._owned = LabelRange.of_rank(served.num_labels, served.num_shards, rank)
        tail = served.config.evaluation.tail
        classifier = saved.classifier(self._owned, tail, self._device)
        found = check_search(served.settings, served.run, saved.facts["model"], tail)
        self._search, self._texts = open_search(found, classifier), saved.texts(self._owned)

    @torch.inference_mode()
    def topk(self, embeddings: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns scores float32 and labels int64 [B, k], as `shard_topk`, for E float32 [B, D].

        k is at most the number of this range's labels.
        """
        rows = torch.tensor(embeddings, device=self._device)
        k = min(k, len(self._owned))
        scores, labels = self._search.search(rows, k)
        return scores.cpu().numpy(), labels.cpu().numpy()

    def texts(self, labels: np.ndarray) -> list[str]:
        """Returns the texts of labels int64 [m] of this range."""
        found: list[str] = self._texts.take(pa.array(labels - self._owned.start)).to_pylist()
        return found


class Question(NamedTuple):
    """One request."""

    texts: list[str]
    k: int


Found = tuple[list[list[dict[str, Any]]], int]
"""The labels of each text, best first (label, text, score); the texts that were scored together."""


def num_texts(questions: list[Question]) -> int:
    return sum(len(question.texts) for question in questions)


class EncoderReplica:
    """Tokeniser and encoder; batches requests, asks the shards and merges their lists."""

    def __init__(self, served: ServedRun, shards: list[DeploymentHandle]) -> None:
        replica_on_loopback()
        quiet()
        self._shards, self._device = shards, _device()
        saved, self._num_labels = (
            open_saved(served.run, served.checkpoint, served.model),
            served.num_labels,
        )
        self._facts, self._vocabulary = saved.facts, saved.vocabulary()
        self._encoder = saved.encoder(self._device).eval()
        self._neighbours = None
        if served.config.evaluation.neighbours and isinstance(saved, SavedRun):
            self._neighbours = embed_voters(
                served.config, saved.dataset, self._encoder, Ranks(), self._device
            )
        self._answers.set_max_batch_size(served.settings.max_batch_size)  # type: ignore[attr-defined]
        wait_s = served.settings.batch_wait_ms / 1000
        self._answers.set_batch_wait_timeout_s(wait_s)  # type: ignore[attr-defined]

    async def predict(self, texts: list[str], k: int) -> Found:
        """Returns the k best labels of each text, and how many texts were scored together."""
        found: Found = await self._answers(Question(texts, k))
        return found

    @serve.batch(batch_size_fn=num_texts)
    async def _answers(self, questions: list[Question]) -> list[Found]:
        texts = [text for question in questions for text in question.texts]
        most = self._num_labels
        ks = torch.tensor([min(question.k, most) for question in questions for _ in question.texts])
        embeddings = await asyncio.to_thread(self._embed, texts)
        wanted = ks if self._neighbours is None else ks.clamp(min=min(RERANKED, most))
        found = await asyncio.gather(
            *(_ask(shard, "topk", embeddings, int(wanted.max())) for shard in self._shards)
        )
        scores, labels = await asyncio.to_thread(self._merge, embeddings, found, wanted, ks)
        rows = iter(answers(scores, labels, await self._texts_of(labels)))
        return [([next(rows) for _ in question.texts], len(texts)) for question in questions]

    @torch.inference_mode()
    def _embed(self, texts: list[str]) -> np.ndarray:
        """Returns the texts' embeddings, float32 [B, D]."""
        facts = self._facts
        tokens = ragged(tokenizer.encode(self._vocabulary, texts, facts["text_tokens"]))
        padded = padded_tokens(truncate(tokens, facts["max_length"]), facts["pad_id"], self._device)
        embeddings: Tensor = self._encoder(*padded)
        if not embeddings.isfinite().all():
            raise ArithmeticError("the encoder's embeddings are not finite")
        return embeddings.cpu().numpy()

    @torch.inference_mode()
    def _merge(
        self,
        embeddings: np.ndarray,
        found: list[tuple[np.ndarray, np.ndarray]],
        wanted: Tensor,
        ks: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Merges the shards' lists to (scores, labels) [B, max k]; `NONE` beyond a row's own k."""
        lists = [[torch.tensor(each[i]) for each in found] for i in (0, 1)]
        best = only(merge_topk(lists[0], lists[1], int(wanted.max())), wanted)
        if self._neighbours is not None:
            everyone = torch.tensor(embeddings, device=self._device)
            best = self._neighbours.add(everyone, [len(everyone)], best, int(ks.max()))
        return only(best, ks)

    async def _texts_of(self, labels: Tensor) -> dict[int, str]:
        """Asks the shards for the texts of the labels that occur."""
        ids = labels.unique()
        ids = ids[ids != NONE]
        owner = owners(ids, self._num_labels, len(self._shards))
        asked = [ids[owner == rank].numpy() for rank in range(len(self._shards))]
        texts = await asyncio.gather(
            *(_ask(shard, "texts", own) for shard, own in zip(self._shards, asked, strict=True))
        )
        return {
            int(label): text
            for own, found in zip(asked, texts, strict=True)
            for label, text in zip(own, found, strict=True)
        }


def _ask(shard: DeploymentHandle, method: str, *args: Any) -> Awaitable[Any]:
    """Asks a shard in an empty context, so that the call is no request's child.

    The loop of `serve.batch` has the context of the request that started it, and Ray cancels the
    children of a cancelled request, with which all requests of the batch would be lost.
    """
    return contextvars.Context().run(lambda: getattr(shard, method).remote(*args))


def only(best: tuple[Tensor, Tensor], ks: Tensor) -> tuple[Tensor, Tensor]:
    """Keeps the first ks[i] (int64 [B]) of row i of (scores, labels) [B, k]; `NONE` beyond."""
    scores, labels = best
    beyond = torch.arange(scores.shape[1]) >= ks[:, None]
    return scores.masked_fill(beyond, -torch.inf), labels.masked_fill(beyond, NONE)


def answers(scores: Tensor, labels: Tensor, texts: dict[int, str]) -> list[list[dict[str, Any]]]:
    """Returns each row's labels, best first.

    Raises:
        ArithmeticError: a label's score is not finite.
    """
    if not scores[labels != NONE].isfinite().all():
        raise ArithmeticError("a score is not finite")
    return [
        [
            {"label": label, "text": texts[label], "score": score}
            for label, score in zip(row, of_row, strict=True)
            if label != NONE
        ]
        for row, of_row in zip(labels.tolist(), scores.tolist(), strict=True)
    ]


def _device() -> torch.device:
    """Returns the device that Ray gave this process."""
    return torch.device("cuda", 0) if ray.get_gpu_ids() else torch.device("cpu")
