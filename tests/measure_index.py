"""Measures an index of planted labels beside exact search; no test.

    python -m tests.measure_index LABELS [FACTORY] [--spread]

Prints one JSON object: index.json's sweep, and the time and memory of building by one thread.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

import psutil
import torch
from torch import Tensor

from renee_ray.rank.batch import Ragged
from renee_ray.scoring.index import Classifier, Part, load_faiss
from renee_ray.scoring.index_building import (
    Survey,
    build,
    default_candidates,
    default_factory,
    empty_index,
    training_rows,
    width_of,
)
from renee_ray.scoring.index_quality import swept
from renee_ray.xfc.labels import LabelRange
from renee_ray.xfc.shard import Shard
from renee_ray.xfc.weights.storages import Weights

from .planted import BLOCK, near, planted

DIM, POINTS, RECALL = 64, 100, 0.95


def measure(labels: int, factory: str, spread: bool) -> dict[str, Any]:
    weights, offsets = planted(labels, DIM, spread)
    embeddings = near(weights, POINTS)
    factory = factory or default_factory(labels, width_of(DIM))
    index, process = empty_index(factory, DIM), psutil.Process()
    load_faiss().omp_set_num_threads(1)
    before = process.memory_info().rss
    began, cpu = time.perf_counter(), time.process_time()

    def rows() -> Iterator[Tensor]:
        for w, b in zip(weights.split(BLOCK), offsets.split(BLOCK), strict=True):
            yield torch.cat([w, b[:, None]], dim=1)

    survey = Survey.of(rows, labels, training_rows(index))
    build(index, rows, survey)
    facts: dict[str, Any] = {
        "factory": factory, "labels": labels, "dim": DIM, "spread": spread,
        "build_seconds": time.perf_counter() - began,
        "build_cpu_seconds": time.process_time() - cpu,
        "weights_gib": weights.nbytes / 2**30, "before_gib": before / 2**30,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }  # fmt: skip
    owned = LabelRange(0, labels, labels)
    classifier = Classifier([Shard(owned, Weights.of(weights))], [offsets if spread else None])
    part = Part(0, labels, survey.greatest, index)
    candidates = default_candidates(factory)
    none = Ragged.of_lists([[]] * POINTS)
    return facts | swept(classifier, [part], embeddings, (none, none), candidates, RECALL)


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--spread"]
    factory = words[1] if len(words) > 1 else ""
    print(json.dumps(measure(int(words[0]), factory, "--spread" in sys.argv)))
