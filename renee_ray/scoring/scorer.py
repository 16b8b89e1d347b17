"""Predicting and evaluating across label shards: every rank ends with its own rows' results.

Ledger, for a global batch of B rows, of which rank r of R holds b_r, and L labels:

    everyone   [B, D]                 embeddings, gathered on every rank
    scores     [B, min(k, L / R)]     best labels of this rank's shard, by a streaming top-k
    best       [b_r, k]               own rows' lists of all ranks (all-to-all), merged

No matrix [B, L] ever exists, and no rank holds another's labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from renee_ray.data.dataset import Dataset
from renee_ray.model.encoder import Encoder
from renee_ray.rank.batch import Batch
from renee_ray.rank.collectives import (
    Ranks,
    all_sum,
    gather_rows,
    look_up,
    return_pairs,
    return_rows,
    route,
    row_counts,
)
from renee_ray.scoring.index import Classifier, Search
from renee_ray.scoring.metrics import CLASSES, MOST, MetricSums, inverse_propensity
from renee_ray.scoring.neighbours import RERANKED, Neighbours, sums_of_pairs
from renee_ray.xfc.labels import LabelRange
from renee_ray.xfc.shard import Pairs, Shard
from renee_ray.xfc.topk.select import NONE, merge_topk


class Answer(NamedTuple):
    """A batch and its k best labels, in host memory.

    scores: float32 [b, k], descending; labels: int64 [b, k], `NONE` where fewer than k remain;
    parts: what the transformer and the bag add to each score, float32 [b, k] each, where asked for.
    """

    batch: Batch
    scores: Tensor
    labels: Tensor
    parts: list[Tensor]


@dataclass(frozen=True)
class Found:
    """The best labels of own rows among those that were searched so far.

    everyone: float32 [B, D], the embeddings of all ranks' rows; counts: rows of each rank.
    scores, labels, parts: as in `Answer`, for c candidates; scores and labels on the device.
    """

    everyone: Tensor
    counts: list[int]
    scores: Tensor
    labels: Tensor
    parts: list[Tensor]


@dataclass(frozen=True)
class Scorer:
    """The trained model on one of R ranks, with all labels of the rank or a piece of them.

    offset: float32 [n], added to the scores of the labels in `shard`, or None; -inf hides a label,
    so that exactly k others are found.
    neighbours: training points that vote, or None.
    passes: pieces that every rank's labels are cut into (`scoring/passes.py`).
    explain: whether answers have parts; the encoder must have a bag.
    index: how labels of `shard` are searched; None: by scoring them all.
    """

    encoder: Encoder
    shard: Shard
    ranks: Ranks
    device: torch.device
    offset: Tensor | None = None
    neighbours: Neighbours | None = None
    passes: int = 1
    explain: bool = False
    index: Search | None = None

    @torch.inference_mode()
    def search(
        self, batch: Batch, k: int, own: Tensor | None = None, before: Found | None = None
    ) -> Found:
        """Finds the best labels of this rank's rows among those of `shard` and of `before`.

        Filter labels are removed before the cut. There are as many candidates as `finish` needs.

        Args:
            own: the rows' embeddings, float32 [b, D]; None: they are embedded.
        """
        owned = self.shard.owned
        counts = row_counts(self.ranks, len(batch))
        first = sum(counts[: self.ranks.rank])
        rows, banned = route(self.ranks, *batch.pairs(first, batch.filtered), owned.num_labels)
        here = (banned >= owned.start) & (banned < owned.stop)
        if own is None:
            own = self.encoder(*batch.tokens(self.device))[: len(batch)]
        everyone = gather_rows(self.ranks, own, counts)
        excluded = Pairs(rows[here], banned[here], owned, self.device)
        candidates = min(k if self.neighbours is None else max(k, RERANKED), owned.num_labels)
        width = min(
            candidates, _largest_shard(owned.num_labels, self.ranks.num_ranks * self.passes)
        )
        search = self.index or Classifier([self.shard], [self.offset])
        scores, labels = search.search(everyone, width, excluded)
        lists = [return_rows(self.ranks, each, counts) for each in (scores, labels)]
        if before is not None:
            lists[0].append(before.scores)
            lists[1].append(before.labels)
        scores, labels = merge_topk(lists[0], lists[1], candidates)
        parts: list[Tensor] = []
        if self.explain:
            earlier = [] if before is None else _parts_of(before, labels.cpu())
            parts = self._parts(everyone, counts, labels.cpu())
            parts = [a + b for a, b in zip(parts, earlier, strict=True)] if earlier else parts
        return Found(everyone, counts, scores, labels, parts)

    @torch.inference_mode()
    def finish(self, batch: Batch, found: Found, k: int) -> Answer:
        """Adds votes to what was found among all labels, and keeps the k best."""
        best = found.scores.cpu(), found.labels.cpu()
        if self.neighbours is None:
            return Answer(batch, *best, found.parts)
        k = min(k, self.shard.owned.num_labels)
        scores, labels = self.neighbours.add(found.everyone, found.counts, best, k)
        return Answer(batch, scores, labels, _parts_of(found, labels))

    def _parts(self, everyone: Tensor, counts: list[int], labels: Tensor) -> list[Tensor]:
        """Computes what the transformer and the bag add to the logits of own rows' labels.

        With e - constant = [t | b] the embedding of a row, and w = [w_t | w_b] the weights of a
        label, these are t . w_t and b . w_b.

        Args:
            labels: int64 [b, c], host memory; the parts of those in no rank's `shard` are 0.

        Returns:
            two matrices float32 [b, c] in host memory
        """
        everyone = everyone - self.encoder.constant
        own, places = (labels != NONE).nonzero(as_tuple=True)
        first, owned = sum(counts[: self.ranks.rank]), self.shard.owned
        rows, ids = route(self.ranks, own + first, labels[own, places], owned.num_labels)
        assert self.encoder.bag is not None, "checked before the run is loaded"
        widths = [self.encoder.dim - self.encoder.bag.dim, self.encoder.bag.dim]
        found = [torch.zeros(len(rows)) for _ in widths]
        for start, stop in self.shard.chunks(max(1, len(everyone))):
            weights = self.shard.weights.weight.read(start, stop).split(widths, 1)
            there = (ids - owned.start >= start) & (ids - owned.start < stop)
            at = rows[there].to(self.device), (ids[there] - owned.start - start).to(self.device)
            for values, part, weight in zip(found, everyone.split(widths, 1), weights, strict=True):
                values[there] = (part @ weight.T)[at].cpu()
        returned = (return_pairs(self.ranks, rows, ids, values, counts) for values in found)
        return [sums_of_pairs(labels, *each) for each in returned]

    def predict(self, batches: Iterable[Batch], k: int) -> Iterator[Answer]:
        """Yields the k best labels, or all labels; all ranks must draw equally many batches."""
        training = self.encoder.training
        self.encoder.eval()
        try:
            for batch in batches:
                yield self.finish(batch, self.search(batch, k), k)
        finally:
            self.encoder.train(training)


def _parts_of(found: Found, labels: Tensor) -> list[Tensor]:
    """Takes the parts of labels int64 [b, k], host memory; 0 for those that were not found."""
    known = found.labels.cpu()
    rows, places = (known != NONE).nonzero(as_tuple=True)
    return [sums_of_pairs(labels, rows, known[rows, places], p[rows, places]) for p in found.parts]


def _largest_shard(num_labels: int, num_ranks: int) -> int:
    return -(-num_labels // num_ranks)


def topk_bytes(rows: int, k: int, num_labels: int, num_ranks: int) -> int:
    """Estimates the bytes that a rank needs for the k best labels of a global batch of `rows`.

    A pair of score and label takes 12 bytes. Each thread collects 2 k a row and sorts them; the
    shards' lists are joined, sent, and merged.
    """
    width = min(k, _largest_shard(num_labels, num_ranks))
    return 12 * rows * width * (4 * torch.get_num_threads() + 9)


def read_counts(dataset: Dataset, owned: LabelRange) -> np.ndarray:
    """Reads the numbers of training points, int64 [n], of a range of labels, unaugmented."""
    table = dataset.read_rows("labels", owned.start, owned.stop, ["train_count"])
    return table["train_count"].to_numpy()


def prior_offset(
    counts: np.ndarray, tau: float, device: torch.device, hidden: np.ndarray | None = None
) -> Tensor | None:
    """Returns -tau * log n_l, the logit adjustment of Menon et al. (ICLR 2021), float32 [n].

    Scores then rank labels as if rare ones were more frequent. None where it changes nothing.

    hidden: bool [n], labels that must not be found, for which it is -inf; None: there are none.
    """
    if not tau and (hidden is None or not hidden.any()):
        return None
    offset = -tau * np.log(np.maximum(counts, 1))
    if hidden is not None:
        offset = np.where(hidden, -np.inf, offset)
    return torch.from_numpy(offset).float().to(device)


def without_labels(batches: Iterable[Batch], hidden: np.ndarray | None) -> Iterator[Batch]:
    """Yields the batches without the true labels that are `hidden`, bool [L], or None."""
    for batch in batches:
        if hidden is not None:
            batch = replace(batch, labels=batch.labels.only(~hidden[batch.labels.values]))
        yield batch


@dataclass(frozen=True)
class Propensities:
    """Inverse propensities of a rank's own labels, float64 [n], which other ranks look up.

    bounds: falling, float64 [len(CLASSES)], where each of CLASSES begins; None: not told apart.
    """

    own: Tensor
    owned: LabelRange
    ranks: Ranks
    bounds: np.ndarray | None = None

    @classmethod
    def read(
        cls, dataset: Dataset, owned: LabelRange, ranks: Ranks, *, augmented: bool = False
    ) -> Propensities:
        """Computes them from the counts of the labels that this rank owns.

        augmented: counts the text of each label as one more point of it, as the released code does.
        """
        manifest = dataset.manifest
        points = manifest.num_points("train") + manifest.num_points("validation")
        between = np.array([low for low, _ in CLASSES.values()]) - 0.5
        own, bounds = (
            inverse_propensity(
                counts + augmented, points + augmented * manifest.num_labels,
                manifest.propensity_a, manifest.propensity_b,
            )
            for counts in (read_counts(dataset, owned), between)
        )  # fmt: skip
        return cls(torch.from_numpy(own), owned, ranks, bounds)

    def of(self, labels: np.ndarray) -> np.ndarray:
        """Looks up labels int64 [m]; float64 [m]. Every rank must ask at the same time."""
        asked = torch.from_numpy(labels)
        answer = look_up(self.ranks, asked, self.own, self.owned.start, self.owned.num_labels)
        return answer.numpy()


def evaluate(scorer: Scorer, batches: Iterable[Batch], propensities: Propensities) -> MetricSums:
    """Returns the sums of the metrics of all ranks' rows together."""
    answers = scorer.predict(batches, MOST)
    return metric_sums(scorer.ranks, answers, [propensities])[0]


def metric_sums(
    ranks: Ranks, answers: Iterable[Answer], propensities: Sequence[Propensities]
) -> list[MetricSums]:
    """Sums up the metrics of all ranks' rows together, for each of several propensities."""
    sums = [MetricSums(bounds=each.bounds) for each in propensities]
    for answer in answers:
        true = answer.batch.labels
        for total, each in zip(sums, propensities, strict=True):
            total.add(answer.labels.numpy(), true, each.of(true.values))
    vectors = torch.from_numpy(np.stack([total.vector for total in sums]))
    return [MetricSums(vector) for vector in all_sum(ranks, vectors).numpy()]
