"""Predicting and evaluating across label shards: every rank ends with its own rows' results.

Ledger, for a global batch of B rows, of which rank r of R holds b_r, and L labels:

    everyone   [B, D]                 embeddings, gathered on every rank
    scores     [B, min(k, L / R)]     best labels of this rank's shard, by a streaming top-k
    best       [b_r, k]               own rows' lists of all ranks (all-to-all), merged

No matrix [B, L] ever exists, and no rank holds another's labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from renee_ray.data.dataset import Dataset
from renee_ray.model.encoder import Encoder
from renee_ray.parallel.batch import Batch
from renee_ray.parallel.collectives import (
    Ranks,
    all_sum,
    gather_rows,
    look_up,
    return_pairs,
    return_rows,
    route,
    row_counts,
)
from renee_ray.scoring.index import Search
from renee_ray.scoring.metrics import KS, RECALL_KS, MetricSums, inverse_propensity
from renee_ray.scoring.neighbours import RERANKED, Neighbours, sums_of_pairs
from renee_ray.xfc.labels import LabelRange
from renee_ray.xfc.shard import Pairs, Shard
from renee_ray.xfc.topk.select import NONE, merge_topk, shard_topk


@dataclass(frozen=True)
class Scorer:
    """The trained model on one of R ranks.

    offset: float32 [n], added to the scores of the rank's own labels, or None.
    neighbours: training points that vote, or None.
    index: how labels of `shard` are searched; None: all are scored.
    """

    encoder: Encoder
    shard: Shard
    ranks: Ranks
    device: torch.device
    offset: Tensor | None = None
    neighbours: Neighbours | None = None
    index: Search | None = None

    @torch.inference_mode()
    def topk(self, batch: Batch, k: int) -> tuple[Tensor, Tensor]:
        """Finds the k best labels of this rank's rows; filter labels are removed before the cut.

        Returns:
            (scores float32 [b, k] descending, labels int64 [b, k]) in host memory; label -1
            where fewer than k labels remain. k is the number of labels where it is greater.
        """
        owned = self.shard.owned
        counts = row_counts(self.ranks, len(batch))
        first = sum(counts[: self.ranks.rank])
        rows, banned = route(self.ranks, *batch.filter_pairs(first), owned.num_labels)
        everyone = self._embed(batch, counts)
        excluded = Pairs(rows, banned, owned, self.device)
        k = min(k, owned.num_labels)
        candidates = k if self.neighbours is None else min(max(k, RERANKED), owned.num_labels)
        width = min(candidates, _largest_shard(owned.num_labels, self.ranks.num_ranks))
        if self.index is None:
            scores, labels = shard_topk(self.shard, everyone, width, excluded, self.offset)
        else:
            scores, labels = self.index.search(everyone, width, excluded)
        best = merge_topk(
            return_rows(self.ranks, scores, counts),
            return_rows(self.ranks, labels, counts),
            candidates,
        )
        if self.neighbours is not None:
            return self.neighbours.add(everyone, counts, best, k)
        return best[0].cpu(), best[1].cpu()

    @torch.inference_mode()
    def parts(self, batch: Batch, labels: Tensor) -> list[Tensor]:
        """Computes what the transformer and the bag add to the logits of own rows' labels.

        With e - constant = [t | b] the embedding of a row, and w = [w_t | w_b] the weights of a
        label, these are t . w_t and b . w_b. The rows are embedded anew.

        Args:
            labels: int64 [b, k], host memory; `NONE` where there is none, whose parts are 0.

        Returns:
            two matrices float32 [b, k] in host memory
        """
        counts = row_counts(self.ranks, len(batch))
        everyone = self._embed(batch, counts) - self.encoder.constant
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

    def _embed(self, batch: Batch, counts: list[int]) -> Tensor:
        """Embeds own rows; returns the embeddings of all ranks' rows, float32 [B, D]."""
        own = self.encoder(*batch.tokens(self.device))[: len(batch)]
        return gather_rows(self.ranks, own, counts)

    def predict(self, batches: Iterable[Batch], k: int) -> Iterator[tuple[Batch, Tensor, Tensor]]:
        """Yields (batch, scores, labels). All ranks must draw equally many batches."""
        training = self.encoder.training
        self.encoder.eval()
        try:
            for batch in batches:
                yield batch, *self.topk(batch, k)
        finally:
            self.encoder.train(training)


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


def prior_offset(counts: np.ndarray, tau: float, device: torch.device) -> Tensor | None:
    """Returns -tau * log n_l, the logit adjustment of Menon et al. (ICLR 2021), float32 [n].

    Scores then rank labels as if rare ones were more frequent. None for tau 0.
    """
    if not tau:
        return None
    return torch.from_numpy(-tau * np.log(np.maximum(counts, 1))).float().to(device)


@dataclass(frozen=True)
class Propensities:
    """Inverse propensities of a rank's own labels, float64 [n], which other ranks look up."""

    own: Tensor
    owned: LabelRange
    ranks: Ranks

    @classmethod
    def read(
        cls, dataset: Dataset, owned: LabelRange, ranks: Ranks, *, augmented: bool = False
    ) -> Propensities:
        """Computes them from the counts of the labels that this rank owns.

        augmented: counts the text of each label as one more point of it, as the released code does.
        """
        manifest = dataset.manifest
        points = manifest.num_points("train") + manifest.num_points("validation")
        own = inverse_propensity(
            read_counts(dataset, owned) + augmented, points + augmented * manifest.num_labels,
            manifest.propensity_a, manifest.propensity_b,
        )  # fmt: skip
        return cls(torch.from_numpy(own), owned, ranks)

    def of(self, labels: np.ndarray) -> np.ndarray:
        """Looks up labels int64 [m]; float64 [m]. Every rank must ask at the same time."""
        asked = torch.from_numpy(labels)
        answer = look_up(self.ranks, asked, self.own, self.owned.start, self.owned.num_labels)
        return answer.numpy()


def evaluate(
    scorer: Scorer,
    batches: Iterable[Batch],
    propensities: Propensities,
    ks: tuple[int, ...] = KS,
    recall_ks: tuple[int, ...] = RECALL_KS,
) -> dict[str, float]:
    """Returns the metrics of all ranks' rows together, in percent."""
    return metric_sums(scorer, batches, [propensities], ks, recall_ks)[0].metrics()


def metric_sums(
    scorer: Scorer,
    batches: Iterable[Batch],
    propensities: Sequence[Propensities],
    ks: tuple[int, ...] = KS,
    recall_ks: tuple[int, ...] = RECALL_KS,
) -> list[MetricSums]:
    """Sums up the metrics of all ranks' rows together, for each of several propensities."""
    sums = [MetricSums.zeros(ks, recall_ks) for _ in propensities]
    for batch, _, labels in scorer.predict(batches, max(*ks, *recall_ks)):
        true = batch.labels
        for total, each in zip(sums, propensities, strict=True):
            total.add(labels.numpy(), true.values, true.offsets, None, each.of(true.values))
    vectors = torch.from_numpy(np.stack([total.vector() for total in sums]))
    everyone = all_sum(scorer.ranks, vectors).numpy()
    return [MetricSums.from_vector(vector, ks, recall_ks) for vector in everyone]
