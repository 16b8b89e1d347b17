"""How good and how fast an approximate index is, over a sweep of its search effort."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from renee_ray.rank.batch import Ragged
from renee_ray.scoring.index import Classifier, IndexSearch, Part, Search, load_faiss
from renee_ray.scoring.metrics import KS, find_hits
from renee_ray.xfc.labels import NONE

log = logging.getLogger(__name__)

RECALLS, COMPARED = (1, 10, 100), 10
"""Labels asked for where recall is measured, and where it is compared with what is wanted."""
ENOUGH = 0.999
"""Recall that ends the sweep."""
ALONE = 200
"""Most queries that are asked one by one."""
FALL = 0.02
"""A recall that is lower by this than that of less effort will not rise again."""
MORE, MOST = 4, 2000
"""Factor of the candidates where no effort suffices, and the most for each label asked for."""
Truth = tuple[Ragged, Ragged]
"""The labels and the filter labels of each point."""


def swept(
    exact: Classifier,
    parts: Sequence[Part],
    embeddings: Tensor,
    truth: Truth,
    factor: int,
    wanted: float,
) -> dict[str, Any]:
    """Compares search by an index with exact search, and chooses the least effort that suffices.

    Where codes are so coarse that more effort finds less, as more rows push the right ones out of
    the candidates, the sweep goes on from the best effort with MORE times as many.

    Args:
        embeddings: float32 [n, D]; truth: the labels and the filter labels of each.
        factor: candidates of a range for each label; wanted: recall of the 10 best, in (0, 1].

    Returns:
        "effort", "effort_name", "candidates", "reached" (whether these suffice), "recall" (what was
        wanted), "sample" (n), "exact" and "sweep": a row for each effort, with its candidates,
        recall at 1, 10 and 100 in [0, 1], the points of P@k that are lost, in percent, and queries
        a second
    """
    number = exact.stop
    ks = sorted({min(k, number) for k in RECALLS})
    found = {k: exact.search(embeddings, k)[1].numpy() for k in ks}
    at = min(COMPARED, number)
    best, key = precisions(found[at], truth), f"recall@{at}"
    baseline = {**speeds(exact, embeddings, at), **best}
    # A flat range has no effort, and may be the largest.
    name, efforts = max((efforts_of(part) for part in parts), key=lambda found: len(found[1]))
    sweep: list[dict[str, Any]] = []
    while True:
        reached: list[float] = []
        for effort in efforts:
            search = IndexSearch(exact, parts, effort, factor)
            row = {"effort": effort, "candidates": factor}
            sweep.append(row | _measured(search, embeddings, truth, found, best))
            reached.append(sweep[-1][key])
            if reached[-1] >= max(ENOUGH, wanted) or reached[-1] < max(reached) - FALL:
                break
        if max(reached) >= wanted or factor * MORE > MOST:
            break
        efforts, factor = efforts[reached.index(max(reached)) :], factor * MORE
    enough = [row for row in sweep if row[key] >= wanted]
    kept = enough[0] if enough else max(sweep, key=lambda row: float(row[key]))
    if not enough:
        log.warning(
            "no search effort reaches recall=%g, the best finds %g; give a finer factory=",
            wanted, kept[key],
        )  # fmt: skip
    return {
        "effort": kept["effort"], "effort_name": name, "candidates": kept["candidates"],
        "reached": bool(enough), "recall": wanted, "sample": len(embeddings),
        "exact": baseline, "sweep": sweep,
    }  # fmt: skip


def _measured(
    search: IndexSearch, embeddings: Tensor, truth: Truth, found: dict[int, np.ndarray],
    best: dict[str, float],
) -> dict[str, float]:  # fmt: skip
    """Compares a search with `found`, the k best labels by k, and with their precisions, `best`."""
    here = {k: search.search(embeddings, k)[1].numpy() for k in found}
    at = min(COMPARED, max(found))
    lost = {k: best[k] - value for k, value in precisions(here[at], truth).items()}
    return {
        **{f"recall@{k}": recall(here[k], found[k]) for k in found},
        **{f"{k} lost": round(value, 3) for k, value in lost.items()},
        **speeds(search, embeddings, at),
    }


def efforts_of(part: Part) -> tuple[str, list[int]]:
    """Returns the name of an index's search effort, and values from cheap to dear."""
    faiss = load_faiss()
    if isinstance(part.index, faiss.IndexHNSW):
        return "efSearch", [2**i for i in range(4, 11)]
    if isinstance(part.index, faiss.IndexIVF):
        return "nprobe", [2**i for i in range(part.index.nlist.bit_length())]
    return "none", [0]


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    """Returns the share of labels exact [n, k] that found [n, k] has too."""
    there = exact != NONE
    hits = (exact[:, :, None] == found[:, None, :]).any(2) & there
    return round(float(hits.sum() / max(1, there.sum())), 4)


def precisions(labels: np.ndarray, truth: Truth) -> dict[str, float]:
    """Returns P@1, P@3, P@5 in percent of labels [n, k] without filter labels."""
    true, filtered = truth
    banned = find_hits(labels, filtered)[0]
    order = np.argsort(banned, axis=1, kind="stable")[:, : max(KS)]
    kept = np.take_along_axis(np.where(banned, NONE, labels), order, axis=1)
    hit = find_hits(kept, true)[0]
    return {f"P@{k}": round(float(100 * hit[:, :k].sum() / (k * len(hit))), 3) for k in KS}


def speeds(search: Search, embeddings: Tensor, k: int) -> dict[str, float]:
    """Measures queries a second: one by one on one core, by its CPU time, and all on all cores."""
    threads, some = torch.get_num_threads(), embeddings[:ALONE]
    began = time.perf_counter()
    search.search(embeddings, k)
    together = len(embeddings) / (time.perf_counter() - began)
    torch.set_num_threads(1)
    try:
        search.search(some[:1], k)
        began, count = time.process_time(), 0
        while count < len(some) and (count < 5 or time.process_time() - began < 1):
            search.search(some[count : count + 1], k)
            count += 1
        alone = count / max(1e-9, time.process_time() - began)
    finally:
        torch.set_num_threads(threads)
    return {"queries/s one core": round(alone, 1), "queries/s all cores": round(together, 1)}
