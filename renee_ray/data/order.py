"""Which rows come in which batch: pure arithmetic on (seed, epoch, number of workers, position).

    sources    part files of an epoch (training points, and a share of the label texts when
               augmenting) in an order drawn from (seed, epoch): one sequence of N rows
    stream s   rows [s*N // S, (s+1)*N // S) of that sequence, for S = `streams`
    window w   the next `window` batches of a stream: the unit of reading. Its rows are ordered
               by length, cut into batches of `batch_size // S`, and the batches shuffled by a
               permutation that all streams share, so that what meets in a global batch is of
               about the same length
    batch b    of the whole: the b-th batch of every stream, in stream order

A worker reads whole streams: rank r of R those in [r*S // R, (r+1)*S // R). Nothing else
depends on R, so any number of workers sees the same global batches, every row exactly once
an epoch, and a position (epoch, batch) is all that a resumed run needs. No part is read by
two workers but those in which a stream begins or ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from renee_ray.xfc.labels import split_range

OTHER_TEXTS = "other_texts"
"""Split of a source or a span that counts only the labels that are not themselves points."""


@dataclass(frozen=True)
class Source:
    """A part file: its split, its rows, and the split's row that it begins with."""

    split: str
    first: int
    rows: int


@dataclass(frozen=True)
class Span:
    """Rows [start, stop) of a split, in stored order."""

    split: str
    start: int
    stop: int


@dataclass(frozen=True)
class Order:
    """The order of one epoch.

    sources: in the order of the epoch; total: their rows, N.
    shuffled: False keeps the stored order of sources and of batches (for scoring).
    """

    sources: tuple[Source, ...]
    batch_size: int
    streams: int
    window: int
    seed: int = 0
    epoch: int = 0
    shuffled: bool = True

    @property
    def total(self) -> int:
        return sum(source.rows for source in self.sources)

    @property
    def per_stream(self) -> int:
        """Rows that a stream gives to a full batch."""
        return self.batch_size // self.streams

    @property
    def num_batches(self) -> int:
        return -(-max(self.stream_rows(s) for s in range(self.streams)) // self.per_stream)

    @property
    def num_windows(self) -> int:
        return -(-self.num_batches // self.window)

    def stream_rows(self, stream: int) -> int:
        start, stop = split_range(self.total, self.streams, stream)
        return stop - start

    def streams_of(self, rank: int, num_ranks: int) -> range:
        """Streams that a rank reads."""
        return range(*split_range(self.streams, num_ranks, rank))

    def spans(self, stream: int, window: int) -> list[Span]:
        """What to read for one window of a stream."""
        first, end = split_range(self.total, self.streams, stream)
        size = self.window * self.per_stream
        start, stop = min(first + window * size, end), min(first + (window + 1) * size, end)
        return list(_cut(self.sources, start, stop))

    def arrange(
        self, lengths: np.ndarray, stream: int, window: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Order of a window's rows, and the batch that each belongs to.

        Args:
            lengths: int [n] tokens of the rows, in the order of `spans`.

        Returns:
            (rows int64 [n]: a permutation; batches int64 [n]: ascending numbers in the epoch)
        """
        n, size = len(lengths), self.per_stream
        key = [self.seed, self.epoch, window]
        rows = np.arange(n)
        if self.shuffled:
            rows = np.random.default_rng([*key, 1 + stream]).permutation(n)
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        full = n // size
        places = np.arange(full)
        if self.shuffled:
            places = np.random.default_rng([*key, 0]).permutation(full)
        cut = rows[: full * size].reshape(full, size)[places].reshape(-1)
        batches = window * self.window + np.arange(n) // size
        return np.concatenate([cut, rows[full * size :]]), batches


def training_order(
    points: list[int],
    labels: list[int],
    *,
    augment: float,
    texts: str = "labels",
    seed: int,
    epoch: int,
    batch_size: int,
    streams: int,
    window: int,
) -> Order:
    """The order of a training epoch.

    Args:
        points, labels: rows of each part of `train`, and label texts of each part of `labels`.
        texts: which these are, "labels" for all or `OTHER_TEXTS`.
        augment: share of the label parts that the epoch streams; successive epochs take
            successive shares of one seeded permutation, wrapping around.
    """
    sources = _sources("train", points)
    extra = _sources(texts, labels)
    if augment and extra:
        take = max(1, round(augment * len(extra)))
        permuted = np.random.default_rng([seed, len(extra)]).permutation(len(extra))
        sources += [extra[permuted[(epoch * take + i) % len(extra)]] for i in range(take)]
    shuffle = np.random.default_rng([seed, epoch]).permutation(len(sources))
    return Order(tuple(sources[i] for i in shuffle), batch_size, streams, window, seed, epoch)


def scoring_order(
    split: str, parts: list[int], *, batch_size: int, num_ranks: int, window: int = 16
) -> Order:
    """Every row of a split once, each rank a contiguous range, in windows ordered by length."""
    per_stream = -(-batch_size // num_ranks)
    return Order(
        tuple(_sources(split, parts)), per_stream * num_ranks, num_ranks, window, shuffled=False
    )


def _sources(split: str, parts: list[int]) -> list[Source]:
    firsts = np.concatenate([[0], np.cumsum(parts)])
    return [Source(split, int(firsts[i]), rows) for i, rows in enumerate(parts) if rows]


def _cut(sources: tuple[Source, ...], start: int, stop: int) -> Iterator[Span]:
    offset = 0
    for source in sources:
        lo, hi = max(start, offset), min(stop, offset + source.rows)
        if lo < hi:
            yield Span(source.split, source.first + lo - offset, source.first + hi - offset)
        offset += source.rows
