"""`renee-ray bench feed`: an epoch streamed through R workers, and whether each pair came once.

The order is that of training, without label texts. The workers only read: the time is that of
Ray Data, decoding, shuffling and cutting into batches. Each (point, label) pair is hashed. The
sum of the hashes, modulo 2^64, does not depend on the order. Tasks compute it again from the
part files, so that a pair lost or repeated shows.
"""

from __future__ import annotations

import resource
import time
from typing import Any

import numpy as np
import torch

from renee_ray.config.overrides import make_config
from renee_ray.config.schema import RunConfig
from renee_ray.data.dataset import Dataset
from renee_ray.data.split import splitmix64
from renee_ray.parallel.batch import Position, Ragged, ragged
from renee_ray.parallel.collectives import Ranks, all_sum, gather_numbers
from renee_ray.service.cluster import ensure_ray
from renee_ray.service.feed import feed, training_orders
from renee_ray.service.launch import launch
from renee_ray.service.tasks import stream

WINDOW = 16
MASK = (1 << 64) - 1


def bench_feed(dataset: str, workers: int, batch: int) -> dict[str, Any]:
    """Streams the training points of `dataset` once.

    Returns:
        rows, pairs, rows_per_second (of the slowest worker, from its first batch asked for),
        first_batch_s, checksum in hexadecimal, exactly_once, start_rss_gib and peak_rss_gib of
        the worker that took most.
    """
    opened = Dataset.open(dataset)
    config = make_config(
        RunConfig,
        {"data": opened.path, "output": "unused", "num_workers": workers, "batch_size": batch},
        {"feed": {"window": WINDOW, "augment": 0}},
    )
    ensure_ray(workers + 1)
    arguments = {"config": config.model_dump(), "dataset": opened}
    found = launch(feed_worker, arguments, config, use_gpu=False)
    parts = opened.manifest.splits["train"]
    wanted = [0, 0, 0]
    for each in stream(_part_sums, opened, len(parts)):
        wanted = [a + b for a, b in zip(wanted, each["sums"], strict=True)]
    streamed = [found["rows"], found["pairs"], int(found["checksum"], 16)]
    exactly_once = streamed == [wanted[0], wanted[1], wanted[2] & MASK]
    return {**found, "exactly_once": exactly_once, "workers": workers, "batch": batch}


def feed_worker(arguments: dict[str, Any]) -> dict[str, Any]:
    """Streams this worker's rows; rank 0's result counts those of all."""
    config = RunConfig.model_validate(arguments["config"])
    dataset: Dataset = arguments["dataset"]
    ranks = Ranks.of_process_group()
    order = training_orders(config, dataset)[0]
    batches = feed(
        dataset, [order], ranks.rank, ranks.num_ranks, start=Position(),
        max_length=dataset.manifest.max_length, prefetch=config.feed.prefetch,
    )  # fmt: skip
    before, start = _peak_rss(), time.perf_counter()
    rows = pairs = checksum = 0
    first = 0.0
    for each in batches:
        first = first or time.perf_counter() - start
        rows += len(each)
        pairs += len(each.labels.values)
        checksum += pair_checksum(each.points, each.labels)
    seconds = time.perf_counter() - start
    # Halves of 32 bits, since a sum of int64 over ranks would overflow.
    halves = torch.tensor([rows, pairs, checksum & 0xFFFFFFFF, checksum >> 32 & 0xFFFFFFFF])
    total = [int(value) for value in all_sum(ranks, halves)]
    everyone = gather_numbers(ranks, [seconds, first, before, _peak_rss()])
    most = [max(values) for values in zip(*everyone, strict=True)]
    return {
        "rows": total[0],
        "pairs": total[1],
        "checksum": f"{total[2] + (total[3] << 32) & MASK:016x}",
        "rows_per_second": total[0] / most[0],
        "first_batch_s": most[1],
        "start_rss_gib": most[2],
        "peak_rss_gib": most[3],
    }


def pair_checksum(points: np.ndarray, labels: Ragged) -> int:
    """Returns the sum modulo 2^64 of splitmix64(splitmix64(point) ^ label) over all pairs."""
    hashed = splitmix64(points.astype(np.uint64))[labels.pairs()[0]]
    return int(splitmix64(hashed ^ labels.values.astype(np.uint64)).sum(dtype=np.uint64))


def _part_sums(dataset: Dataset, i: int) -> dict[str, Any]:
    part = dataset.manifest.splits["train"][i]
    table = dataset.read_part(part, ["point_id", "labels"])
    labels = ragged(table["labels"])
    checksum = pair_checksum(table["point_id"].to_numpy(), labels)
    return {"sums": [len(table), len(labels.values), checksum]}


def _peak_rss() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
