"""Votes of the nearest training points for their labels, added to the classifier's scores.

With u the embedding without the encoder's constant, scaled to norm 1, and S(x) the `count`
training points whose cosine u_i . u_x is largest, with all that equal the last of them but for
rounding (texts repeat, and any number of ranks shall find the same):

    c_i     = max(u_i . u_x, 0) ** POWER
    v_l(x)  = sum over i in S(x) of c_i y_il / sum over i in S(x) of c_i
    score   = z_l(x) + weight * v_l(x)

The interpolation of Khandelwal et al. (ICLR 2020) with logits instead of probabilities: the
classifier is a mean over a label's points, a vote is not, and they err differently. A rank's
training points are a shard like that of the classifier, with their embeddings in place of W,
so the streaming top-k of `xfc/topk/select.py` finds them; their labels stay with them, and only the
votes travel. A rank needs 4 D bytes for each of its points.

Ledger, for a global batch of B rows, of which rank r of R holds b_r, and n_r voters of rank r:

    points       [n_r, D]         float32  unit embeddings of this rank's training points
    cosines      [B, w]           float32  of the w nearest points of this rank
    nearest      [b_r, R w]       float32  of the nearest points of every rank, for own rows
    last, total  [B, 1]           float32  the cut that makes S(x), and the sum of c_i over it
    cut          [B]              bool     whether a rank may have more points of S(x) than w

Rows start with w = 2 count. Those that are cut, by many equal texts, are searched again with 2 w.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from renee_ray.model.encoder import Encoder
from renee_ray.model.initialise import unit
from renee_ray.rank.batch import Batch, Ragged
from renee_ray.rank.collectives import (
    Ranks,
    all_max,
    gather_rows,
    return_pairs,
    return_rows,
    row_counts,
)
from renee_ray.rank.rounds import Rounds
from renee_ray.xfc.labels import LabelRange
from renee_ray.xfc.shard import Shard
from renee_ray.xfc.topk.select import NONE, merge_topk, shard_topk
from renee_ray.xfc.weights.storages import Weights

POWER = 8
"""Exponent of the cosine: a nearer point counts for more."""
TIE = 1e-5
"""Cosines that are no further apart count as equal."""
RERANKED = 200
"""Best labels of the classifier that votes can lift, or k if that is more."""


@dataclass(frozen=True)
class Neighbours:
    """One rank's share of the training points, as voters.

    points: a shard whose rows are their unit embeddings; labels: theirs, in the same order.
    constant: float32 [D], the encoder's constant, which all embeddings contain.
    """

    points: Shard
    labels: Ragged
    constant: Tensor
    ranks: Ranks
    count: int
    weight: float

    @classmethod
    @torch.inference_mode()
    def embed(
        cls,
        encoder: Encoder,
        batches: Iterable[Batch],
        ranks: Ranks,
        device: torch.device,
        count: int,
        weight: float,
    ) -> Neighbours:
        """Embeds this rank's training points. Ranks may have different numbers of batches."""
        encoder.eval()
        rows, labels = [torch.zeros(0, encoder.dim, device=device)], [Ragged.of_lists([])]
        rounds = Rounds(ranks, "training points")
        for batch in batches:
            own = encoder(*batch.tokens(device))[: len(batch)]
            rows.append(unit(own - encoder.constant))
            labels.append(batch.labels)
            rounds.add(len(batch))
        rounds.finish()
        values = torch.cat(rows)
        rows.clear()
        counts = row_counts(ranks, len(values))
        first = sum(counts[: ranks.rank])
        owned = LabelRange(first, first + len(values), sum(counts))
        shard = Shard(owned, Weights("fp32", len(owned), encoder.dim, False, device))
        shard.write(first, values)
        del values
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what embedding took, others on this GPU may use
        count = max(1, min(count, owned.num_labels))
        return cls(shard, _joined(labels), encoder.constant, ranks, count, weight)

    def add(
        self,
        embeddings: Tensor,
        counts: list[int],
        best: tuple[Tensor, Tensor],
        k: int,
    ) -> tuple[Tensor, Tensor]:
        """Adds the votes to each own row's candidates and keeps the k best.

        Args:
            embeddings: [B, D] float32 of the global batch; counts: rows of each rank in it.
            best: (scores float32 [b_r, k'], labels int64 [b_r, k']), `NONE` where there is none.

        Returns:
            (scores float32 [b_r, k] descending, labels int64 [b_r, k]) in host memory
        """
        scores, labels = best[0].cpu(), best[1].cpu()
        rows, voted, votes = self._votes(embeddings, counts)
        return merge_topk(
            [scores + self.weight * sums_of_pairs(labels, rows, voted, votes)], [labels], k
        )

    def _votes(self, embeddings: Tensor, counts: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (own row, label, vote) [m] in host memory; a pair may come repeatedly."""
        queries = unit(embeddings - self.constant)
        rows, places, share = self._voters(queries, counts, 2 * self.count)
        of_point = self.labels.take(places.cpu().numpy())
        lengths = torch.from_numpy(of_point.lengths)
        return return_pairs(
            self.ranks,
            rows.cpu().repeat_interleave(lengths),
            torch.from_numpy(of_point.values),
            share.cpu().repeat_interleave(lengths),
            counts,
        )

    def _voters(
        self, queries: Tensor, counts: list[int], width: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Finds this rank's points in S(x), for x in unit `queries` [B, D]; all ranks call it.

        A list of `width` points holds all of them if its last one is not in S(x), or there are no
        more. What any rank lacks is searched again by all, so that they meet equally often; the
        width doubles, so it ends at the number of points.

        Returns:
            (row of the query, place of the point in the shard, c_i over the sum of c_i) [m]
        """
        cosines, ids = shard_topk(self.points, queries, width)
        nearest = torch.cat(return_rows(self.ranks, cosines, counts), dim=1)
        last = nearest.topk(self.count, dim=1).values[:, -1:] - TIE
        total = (_strength(nearest) * (nearest >= last)).sum(1, keepdim=True)
        last, total = gather_rows(self.ranks, torch.cat([last, total], 1), counts).split(1, 1)
        near = (cosines >= last) & (
            cosines > 0
        )  # others, of a text of no known word say, have c_i 0
        own_cut = near[:, -1] & (width < len(self.points.owned))
        cut = all_max(self.ranks, own_cut.float()) > 0
        voting = near & (ids != NONE) & ~cut[:, None]
        rows, places = voting.nonzero(as_tuple=True)
        share = _strength(cosines)[rows, places] / total[rows, 0].clamp(min=1e-30)
        points = ids[rows, places] - self.points.owned.start
        again = cut.nonzero().squeeze(1)
        if not len(again):
            return rows, points, share
        left = [int(each.sum()) for each in cut.split(counts)]
        more_rows, more_points, more_share = self._voters(queries[again], left, 2 * width)
        return (
            torch.cat([rows, again[more_rows]]),
            torch.cat([points, more_points]),
            torch.cat([share, more_share]),
        )


def sums_of_pairs(labels: Tensor, rows: Tensor, voted: Tensor, votes: Tensor) -> Tensor:
    """Sums the votes for each of labels int64 [b, k]; float32 [b, k], 0 for those without.

    rows, voted: int64 [m], (row, label) of each of `votes`, float32 [m].
    """
    if not len(rows):
        return torch.zeros(labels.shape)
    width = int(torch.maximum(labels.max(), voted.max())) + 1
    keys, place = (rows * width + voted).unique(return_inverse=True)
    sums = torch.zeros(len(keys)).index_add_(0, place, votes)
    queries = torch.arange(len(labels))[:, None] * width + labels
    at = torch.searchsorted(keys, queries).clamp(max=len(keys) - 1)
    return sums[at] * ((keys[at] == queries) & (labels != NONE))


def _strength(cosines: Tensor) -> Tensor:
    """Returns c_i; 0 for the cosine -inf of a place that no point fills."""
    return cosines.clamp(min=0) ** POWER


def _joined(rows: list[Ragged]) -> Ragged:
    lengths = np.concatenate([each.lengths for each in rows])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Ragged(np.concatenate([each.values for each in rows]), offsets)
