"""The logit adjustment's tau, chosen on validation points once a model is trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from renee_ray.parallel.batch import Batch
from renee_ray.scoring.metrics import KS, RECALL_KS
from renee_ray.scoring.scorer import Answer, Propensities, Scorer, metric_sums

CRITERION = ("P@1", "PSP@5", "recall@100")
"""What tau is chosen by: the sum of the first place, the rare labels and the whole list.

P@1 alone is flat near its maximum. PSP@5 alone still grows where tau costs the others, and
recall@100 falls once frequent labels leave the list.
"""


@torch.inference_mode()
def by_tail(
    scorer: Scorer,
    offsets: Mapping[float, Tensor | None],
    batches: Iterable[Batch],
    propensities: Propensities,
) -> list[dict[str, float]]:
    """Scores points under each adjustment, as `evaluate` does, but embeds them once.

    Args:
        offsets: by tau, the `offset` of a scorer, float32 [n].

    Returns:
        for each tau: "tail", and the metrics of all ranks' rows together, in percent
    """
    scorer.encoder.eval()
    rows = [(each, scorer.encoder(*each.tokens(scorer.device))[: len(each)]) for each in batches]
    k = max(*KS, *RECALL_KS)

    def answers(adjusted: Scorer) -> Iterator[Answer]:
        for batch, own in rows:
            yield adjusted.finish(batch, adjusted.search(batch, k, own), k)

    found = []
    for tail, offset in offsets.items():
        sums = metric_sums(scorer.ranks, answers(replace(scorer, offset=offset)), [propensities])
        found.append({"tail": tail, **sums[0].metrics()})
    return found


def best_tail(table: Iterable[Mapping[str, Any]]) -> float:
    """Returns the "tail" of the largest sum of CRITERION; of equal ones the least."""
    best = max(table, key=lambda row: (sum(row[name] for name in CRITERION), -row["tail"]))
    return float(best["tail"])
