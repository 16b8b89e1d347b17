"""One worker of `evaluate` and `predict`: the encoder, and one piece of its labels at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from typing import Any

import ray.train
import torch

from renee_ray.checkpoint.state import Checkpoint
from renee_ray.errors import ReneeError
from renee_ray.machine import available_bytes
from renee_ray.model.encoder import Encoder, build_encoder
from renee_ray.rank.batch import Batch
from renee_ray.rank.collectives import Ranks, gather_numbers
from renee_ray.scoring.index import open_search
from renee_ray.scoring.neighbours import RERANKED, Neighbours
from renee_ray.scoring.passes import Blocks, in_passes
from renee_ray.scoring.scorer import Answer, Scorer, topk_bytes, without_labels
from renee_ray.service.cluster.driver_channel import DriverChannel
from renee_ray.service.cluster.feed import embed_voters, scoring_feed
from renee_ray.service.cluster.launch import quiet, worker_device
from renee_ray.service.score.job import ScoringJob
from renee_ray.service.score.predictions import Layout
from renee_ray.service.score.trained import trained_classifier
from renee_ray.xfc.labels import LabelRange, split_range
from renee_ray.xfc.weights.storages import stored_bytes

GIB = 2**30
MAX_PASSES = 1000
SHARE_OF_MEMORY = 0.8
"""Share of what is free that labels and their search may take; the rest is for batches."""


@dataclass(frozen=True)
class Worker:
    """What a rank has in memory all the time; `owned` are its labels, which come in pieces."""

    job: ScoringJob
    checkpoint: Checkpoint
    ranks: Ranks
    device: torch.device
    encoder: Encoder
    neighbours: Neighbours | None

    @classmethod
    def of(cls, job: ScoringJob) -> Worker:
        """Loads the encoder and the voters; a collective of all ranks."""
        quiet()
        ranks, device = Ranks.of_process_group(job.config.timeout_s), worker_device()
        checkpoint = job.directory.checkpoints().at(job.checkpoint)
        encoder = build_encoder(job.config.encoder, device, job.config.seed).eval()
        checkpoint.load_encoder(encoder)
        neighbours = None
        if job.voters is not None:
            neighbours = embed_voters(job.config, job.voters, encoder, ranks, device)
        return cls(job, checkpoint, ranks, device, encoder, neighbours)

    @property
    def owned(self) -> LabelRange:
        number = self.job.labels.manifest.num_labels
        return LabelRange.of_rank(number, self.ranks.num_ranks, self.ranks.rank)

    def passes(self, layout: Layout) -> int:
        """Returns the fewest passes that the memory of every rank allows; a collective.

        Raises:
            ReneeError: it does not allow any number of passes, or more than one with an index.
        """
        limit = self.job.score.memory_gib_per_worker
        bytes_each = (
            stored_bytes(self.checkpoint.state.facts["precision"])[0] * self.encoder.dim + 4
        )
        free = int(limit * GIB) if limit else int(SHARE_OF_MEMORY * _free_bytes(self.device))
        k = layout.k if self.neighbours is None else max(layout.k, RERANKED)
        passes = passes_needed(replace(layout, k=k), self.owned, self.ranks, bytes_each, free)
        if passes > 1 and self.job.index:
            raise ReneeError(
                f"{self.ranks.num_ranks} workers have the memory for a part of the labels, and "
                f"search=index needs all of them; raise num_workers, or leave search=index out"
            )
        return passes

    def answers(
        self, arguments: dict[str, Any], layout: Layout, passes: int, directory: str = ""
    ) -> Iterator[list[Answer]]:
        """Yields the answers of own rows, a part of `layout` at a time, as `in_passes` does.

        Args:
            arguments: as `ScoringJob.run` makes them; the driver is told of passes.
            directory: keeps what is needed to go on; without one, files go with the process.
        """
        points, split = arguments["points"], arguments["split"]
        with tempfile.TemporaryDirectory(prefix="renee-ray-passes-") as local:
            place = directory or (local if passes > 1 else "")
            blocks = Blocks(layout.blocks, layout.part_batches, self.ranks, place)
            passes, done = blocks.resumed(passes)
            channel: DriverChannel | None = arguments["channel"]
            if passes > 1 and self.ranks.rank == 0 and channel is not None:
                channel.say(
                    f"the memory of {self.ranks.num_ranks} workers holds a part of the labels: "
                    f"{passes} passes, from pass {min(done // blocks.count + 1, passes)} on"
                )

            feed = partial(
                scoring_feed, points, split, layout.batch_size, self.job.config.encoder.max_length,
                self.ranks, window=layout.window,
            )  # fmt: skip

            def batches(first: int) -> Iterator[Batch]:
                return without_labels(feed(first), self.job.hidden)

            yield from in_passes(self._open, (passes, done), batches, layout.k, blocks)

    def _open(self, number: int, passes: int) -> Scorer:
        """Loads piece `number` of the own labels."""
        job, owned = self.job, self.owned
        first, stop = split_range(len(owned), passes, number)
        piece = LabelRange(owned.start + first, owned.start + stop, owned.num_labels)
        tail, chunk = job.config.evaluation.tail, job.config.classifier.chunk
        classifier = trained_classifier(
            self.checkpoint, job.counted, piece, tail, job.hidden, self.device, chunk
        )
        return Scorer(
            self.encoder, classifier.shards[0], self.ranks, self.device, classifier.offsets[0],
            self.neighbours, passes, job.score.explain, open_search(job.index, classifier),
        )  # fmt: skip


def _free_bytes(device: torch.device) -> int:
    """Returns the bytes that this worker may count on."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_bytes() // ray.train.get_context().get_local_world_size()


def passes_needed(
    layout: Layout, owned: LabelRange, ranks: Ranks, label_bytes: int, free: int
) -> int:
    """Returns the fewest passes with which labels and their search fit into `free` bytes.

    All ranks return the same, though they have different numbers of labels, threads and bytes.

    Args:
        layout: with the k of the candidates that the search is for.
        label_bytes: of one label's weights.

    Raises:
        ReneeError: the search does not fit beside a MAX_PASSES-th of the labels.
    """
    rows, k = min(layout.batch_size, layout.rows), layout.k
    search = topk_bytes(rows, k, owned.num_labels, ranks.num_ranks)
    needs = gather_numbers(ranks, [free - search, len(owned) * label_bytes])
    left = min(room - weights / MAX_PASSES for room, weights in needs)
    if left <= 0:
        raise ReneeError(
            f"k={k} for batches of {rows} points takes about {search / GIB:.3g} GiB beside the "
            f"labels, {-left / GIB:.3g} GiB more than some worker has; lower k or batch_size"
        )
    return max(1, *(ceil(weights / room) for room, weights in needs))
