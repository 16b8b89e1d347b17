"""The order of rows and batches: pure arithmetic on (seed, epoch, number of workers, position).

    sources    part files of an epoch (training points, and a share of the label texts when
               augmenting) in an order drawn from (seed, epoch): one sequence of N rows
    stream s   rows [s*N // S, (s+1)*N // S) of that sequence, for S = `streams`
    window w   the next `window` batches of a stream: the unit of reading. Its rows are ordered
               by length, cut into batches of `batch_size // S`, and the batches shuffled by a
               permutation that all streams share, so that what meets in a global batch is of
               about the same length
    batch b    of the whole: the b-th batch of every stream, in stream order, so that each row
               has a slot in [0, B) of its batch

Rank r of R takes the rows in slots [r*B // R, (r+1)*B // R) of every batch. Nothing else depends
on R, so any number of workers sees the same global batches, every row exactly once an epoch, and
a position (epoch, batch) is all that a resumed run needs. A stream is read by one worker where R
divides S, and by the R / S workers that share its slots where S divides R.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from renee_ray.xfc.labels import split_range

OTHER_TEXTS = "other_texts"
"""Split of a source or span that counts only labels that are not themselves points."""


@dataclass(frozen=True)
class Span:
    """Rows [start, stop) of a split, in stored order."""

    split: str
    start: int
    stop: int


@dataclass(frozen=True)
class Order:
    """The order of one epoch.

    sources: the rows of each part file, in the order of the epoch; total: all rows, N.
    shuffled: False keeps the stored order of sources and of batches (for scoring).
    """

    sources: tuple[Span, ...]
    batch_size: int
    streams: int
    window: int
    seed: int = 0
    epoch: int = 0
    shuffled: bool = True

    @cached_property
    def _starts(self) -> np.ndarray:
        """Rows before each source, then all rows."""
        return np.cumsum([0, *(part.stop - part.start for part in self.sources)])

    @property
    def total(self) -> int:
        return int(self._starts[-1])

    @property
    def per_stream(self) -> int:
        """Rows of a full batch that come from one stream."""
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

    def slots_of(self, rank: int, num_ranks: int) -> range:
        """Returns the slots of every global batch that are a rank's."""
        return range(*split_range(self.streams * self.per_stream, num_ranks, rank))

    def streams_of(self, slots: range) -> range:
        """Returns the streams that have rows in these slots."""
        return range(slots.start // self.per_stream, -(-slots.stop // self.per_stream))

    def spans(self, stream: int, window: int) -> list[Span]:
        """Returns the rows to read for one window of a stream."""
        first, end = split_range(self.total, self.streams, stream)
        size = self.window * self.per_stream
        start, stop = min(first + window * size, end), min(first + (window + 1) * size, end)
        cut = overlapping(self._starts, start, stop)
        parts = ((self.sources[i], low, high) for i, low, high in cut)
        return [Span(part.split, part.start + low, part.start + high) for part, low, high in parts]

    def arrange(
        self, lengths: np.ndarray, stream: int, window: int, slots: range
    ) -> tuple[np.ndarray, np.ndarray]:
        """Orders the rows of a window, and returns those in `slots` with the batch of each.

        Args:
            lengths: int [n] tokens of the window's rows, in the order of `spans`.

        Returns:
            (rows int64 [m]: distinct indices into `lengths`; batches int64 [m]: ascending numbers
            in the epoch)
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
        batch, place = np.divmod(np.arange(n), size)
        slot = stream * size + place
        own = (slot >= slots.start) & (slot < slots.stop)
        ordered = np.concatenate([cut, rows[full * size :]])
        return ordered[own], window * self.window + batch[own]


def overlapping(
    starts: Sequence[int] | np.ndarray, start: int, stop: int
) -> Iterator[tuple[int, int, int]]:
    """Yields (i, low, high) of each range [starts[i], starts[i + 1]) with some of [start, stop).

    Its elements low to high, counted from its own start, are in there.
    """
    i = int(np.searchsorted(starts, start, side="right")) - 1
    while i < len(starts) - 1 and starts[i] < stop:
        first, end = int(starts[i]), int(starts[i + 1])
        low, high = max(start - first, 0), min(stop, end) - first
        if low < high:
            yield i, low, high
        i += 1


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
    """Returns the order of a training epoch.

    Args:
        points, labels: rows of each part of `train`, and label texts of each part of `labels`.
        texts: "labels" if these are all texts, or `OTHER_TEXTS`.
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
    """Returns the order that gives each rank a contiguous range, in windows by length."""
    per_stream = -(-batch_size // num_ranks)
    return Order(
        tuple(_sources(split, parts)), per_stream * num_ranks, num_ranks, window, shuffled=False
    )


def _sources(split: str, parts: list[int]) -> list[Span]:
    firsts = np.cumsum([0, *parts])
    return [
        Span(split, int(firsts[i]), int(firsts[i]) + rows) for i, rows in enumerate(parts) if rows
    ]
