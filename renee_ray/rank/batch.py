"""A rank's rows of one global batch, as arrays that the step consumes.

Ledger, for the b rows of one rank, m values in all, T the length of the longest padded row:

    points              [b]               int64  ids
    rows                [b]               int64  positions in the split
    ragged .values      [m]               int64  tokens, positives or filter labels of all rows
    ragged .offsets     [b + 1]           int64  row i is values[offsets[i] : offsets[i + 1]]
    ids, mask of tokens [max(b, 1), T]    int64  padded, on the device
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from renee_ray.data.dataset import POINTS
from renee_ray.data.split import splitmix64
from renee_ray.data.targets import PREDICTED, PROBABILITIES
from renee_ray.xfc.device import upload

GROUP_CELLS = 64
"""Cells of padding that one more group of rows costs: measured on a CPU, docs/log.md."""


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths: row i is values[offsets[i]:offsets[i + 1]].

    values: int64 [m]; offsets: int64 [n + 1], starting at 0.
    """

    values: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @classmethod
    def of_lists(cls, rows: list[list[int]]) -> Ragged:
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)])
        flat = [value for row in rows for value in row]
        return cls(np.array(flat, dtype=np.int64), offsets.astype(np.int64))

    def take(self, rows: np.ndarray) -> Ragged:
        """Takes the rows of these numbers, in this order."""
        lengths = self.lengths[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        places = np.arange(offsets[-1]) + np.repeat(self.offsets[rows] - offsets[:-1], lengths)
        return Ragged(self.values[places], offsets)

    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns (row, value) of every value."""
        return np.repeat(np.arange(len(self)), self.lengths), self.values

    def followed_by(self, other: Ragged) -> Ragged:
        """Appends to each row the row of `other` at the same place."""
        rows = np.concatenate([self.pairs()[0], other.pairs()[0]])
        values = np.concatenate([self.values, other.values])
        return Ragged(values[np.argsort(rows, kind="stable")], self.offsets + other.offsets)

    def only(self, kept: np.ndarray) -> Ragged:
        """Keeps the values for which `kept`, bool [m], is true."""
        before = np.concatenate([[0], np.cumsum(kept)])
        return Ragged(self.values[kept], before[self.offsets])


@dataclass(frozen=True)
class Position:
    """A place in the run: batches of `epoch` before `batch` are done."""

    epoch: int = 0
    batch: int = 0


@dataclass(frozen=True)
class Batch:
    """This rank's rows of the global batch at `position`; possibly none.

    labels: all positives of each row; filtered: labels never to be predicted for it.
    rows: positions in the split; None: they are in none. keys: what the dropout of n-grams depends
    on, or None. predicted: labels that a teacher lists for each row, with probabilities float64
    [t], or None. values: float64 [m] of the positives; None: all are 1.
    """

    position: Position
    points: np.ndarray
    input_ids: Ragged
    labels: Ragged
    filtered: Ragged
    pad_id: int
    pad_multiple: int = 1
    rows: np.ndarray | None = None
    keys: np.ndarray | None = None
    predicted: tuple[Ragged, np.ndarray] | None = None
    values: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.points)

    def pairs(self, first: int, of: Ragged | None = None) -> tuple[Tensor, Tensor]:
        """Returns (row of the global batch, label) of every positive, or of other labels.

        first: row of the global batch that this rank's rows begin with; of: labels of each row.
        """
        rows, labels = (self.labels if of is None else of).pairs()
        return torch.from_numpy(rows + first), torch.from_numpy(labels)

    def value_bits(self) -> list[Tensor]:
        """Returns the values of `pairs` as int64 of the same bits, in a list; none if all are 1."""
        return [] if self.values is None else [torch.from_numpy(self.values).view(torch.int64)]

    def for_training(
        self,
        seed: int,
        *,
        token_dropout: float,
        filter_labels_positive: bool,
        with_keys: bool = False,
        targets_weight: float | None = None,
    ) -> Batch:
        """Drops some tokens, and adds filter labels to the positives and keys to rows if asked.

        targets_weight: share of the teacher's word in the positives' values; None: no teacher.
        """
        labels, input_ids, values = self.labels, self.input_ids, None
        if filter_labels_positive:
            labels = labels.followed_by(self.filtered)
        if targets_weight is not None:
            none = Ragged.of_lists([[]] * len(self)), np.zeros(0)
            predicted, probabilities = self.predicted or none
            labels, values = mix_targets(
                labels, self.filtered, predicted, probabilities, targets_weight
            )
        if token_dropout:
            input_ids = drop_tokens(input_ids, self.points, token_dropout, seed, self.position)
        keys = row_keys(self.points, seed, self.position).view(np.int64) if with_keys else None
        return replace(self, labels=labels, input_ids=input_ids, keys=keys, values=values)

    def micro_batches(self, limit: int) -> list[np.ndarray]:
        """Groups rows (int64) of similar length, at most `limit` in each, the longest last.

        There is one group, in stored order, where there are no more rows or `limit` is 0.
        """
        if not limit or len(self) <= limit:
            return [np.arange(len(self))]
        order = np.argsort(self.input_ids.lengths, kind="stable")
        return [order[i : i + limit] for i in range(0, len(order), limit)]

    def tokens(self, device: torch.device, rows: np.ndarray | None = None) -> tuple[Tensor, ...]:
        """Returns (input_ids, attention_mask) as `padded_tokens` of these rows, in this order.

        The rows' keys, int64 [max(b, 1)], follow if there are any.

        rows: None: all.
        """
        chosen = self.input_ids if rows is None else self.input_ids.take(rows)
        found = padded_tokens(chosen, self.pad_id, device, self.pad_multiple)
        if self.keys is None:
            return found
        keys = self.keys if rows is None else self.keys[rows]
        return *found, upload(torch.from_numpy(np.resize(keys, len(found[0]))), device)

    def distinct_tokens(self) -> Tensor:
        """Returns the ids of all tokens, the padding's too: int64, ascending, each once."""
        there = np.bincount(self.input_ids.values, minlength=self.pad_id + 1)
        there[self.pad_id] += 1
        return torch.from_numpy(np.flatnonzero(there))

    def padding(self, micro_batch: int = 0, *, grouped: bool = False) -> tuple[int, int]:
        """Returns (tokens, cells of the padded matrices of its micro-batches).

        grouped: the encoder pads rows in the groups of `length_groups`.
        """
        parts = [self.input_ids.take(rows) for rows in self.micro_batches(micro_batch)]
        if grouped:
            parts = [each.take(rows) for each in parts for rows in length_groups(each.lengths)]
        cells = sum(len(part) * _width(part, self.pad_multiple) for part in parts)
        return len(self.input_ids.values), cells


def length_groups(lengths: np.ndarray, cost: int = GROUP_CELLS) -> list[np.ndarray]:
    """Cuts rows into groups of similar length, each to be padded to its longest row.

    Of all ways to cut the rows in order of length, it is the one with the least sum of cells plus
    `cost` for each group, found by dynamic programming over the different lengths.

    Args:
        lengths: int [b]

    Returns:
        The numbers of the rows of each group, int64, from the shortest row to the longest.
    """
    order = np.argsort(lengths, kind="stable")
    widths, firsts = np.unique(lengths[order], return_index=True)
    bounds = np.append(firsts, len(order))
    best, begins = np.zeros(len(bounds), dtype=np.int64), np.zeros(len(bounds), dtype=np.int64)
    for stop, width in enumerate(widths, 1):
        sums = best[:stop] + (bounds[stop] - bounds[:stop]) * width + cost
        begins[stop] = sums.argmin()
        best[stop] = sums[begins[stop]]
    groups, stop = [], len(widths)
    while stop:
        groups.append(order[bounds[begins[stop]] : bounds[stop]])
        stop = int(begins[stop])
    return groups[::-1]


def ragged(column: pa.ChunkedArray | pa.Array) -> Ragged:
    """Converts a column of lists to int64 arrays."""
    lists = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(lists, pa.ChunkedArray):  # a column without chunks stays chunked
        return Ragged(np.zeros(0, dtype=np.int64), np.zeros(1, dtype=np.int64))
    offsets = lists.offsets.to_numpy().astype(np.int64)
    return Ragged(lists.flatten().to_numpy().astype(np.int64), offsets - offsets[0])


def truncate(rows: Ragged, limit: int) -> Ragged:
    """Cuts rows to at most `limit` tokens; the last one, the end-of-text token, is kept."""
    kept = np.minimum(rows.lengths, limit)
    offsets = np.concatenate([[0], np.cumsum(kept)])
    places = np.arange(offsets[-1]) - np.repeat(offsets[:-1] - rows.offsets[:-1], kept)
    cut = (kept > 0) & (kept < rows.lengths)
    places[offsets[1:][cut] - 1] = rows.offsets[1:][cut] - 1
    return Ragged(rows.values[places], offsets)


def drop_tokens(
    rows: Ragged, points: np.ndarray, share: float, seed: int, position: Position
) -> Ragged:
    """Drops a share of each row's tokens, never the first or the last.

    Their number depends on the row's length alone, so that rows of one length need no padding
    afterwards. The choice depends on (seed, epoch, point, place in the row), not on the rank.
    """
    row, _ = rows.pairs()
    point = row_keys(points, seed, position)
    place = np.arange(len(row)) - rows.offsets[row]
    drawn = splitmix64(point[row] + place.astype(np.uint64))
    ends = (place == 0) | (place == rows.lengths[row] - 1)
    dropped = np.round(share * np.maximum(rows.lengths - 2, 0)).astype(np.int64)
    # Of each row the tokens with the lowest draws are dropped; its ends are sorted behind them.
    order = np.lexsort((drawn, ends, row))
    kept = np.empty(len(row), dtype=bool)
    kept[order] = place >= dropped[row]
    return rows.only(kept)


def mix_targets(
    given: Ragged, filtered: Ragged, predicted: Ragged, probabilities: np.ndarray, weight: float
) -> tuple[Ragged, np.ndarray]:
    """Mixes the given labels of each row with those that a teacher lists for it.

    Args:
        filtered: labels that the teacher is not heard on.
        probabilities: [t], of the labels in `predicted`; of one that is listed twice, the last.
        weight: of the teacher; labels that it does not list keep their value of 1.

    Returns:
        (labels of each row, ascending; values float64 [m] in (0, 1])
    """
    width = 1 + max(int(each.values.max(initial=0)) for each in (given, filtered, predicted))
    own, hidden, listed = (
        rows * width + labels for rows, labels in (r.pairs() for r in (given, filtered, predicted))
    )
    heard = ~np.isin(listed, hidden)
    listed, probabilities = listed[heard], probabilities[heard]
    keys = np.union1d(own, listed)
    values = np.isin(keys, own).astype(np.float64)
    places = np.searchsorted(keys, listed)
    values[places] = (1 - weight) * values[places] + weight * probabilities
    keys, values = keys[values > 0], values[values > 0]
    offsets = np.searchsorted(keys, np.arange(len(given) + 1) * width)
    return Ragged(keys % width, offsets), values


def row_keys(points: np.ndarray, seed: int, position: Position) -> np.ndarray:
    """Returns a hash uint64 [b] of seed, epoch and each point."""
    epoch = splitmix64(np.array([seed, position.epoch], dtype=np.uint64))
    return splitmix64(points.astype(np.uint64) ^ epoch[0] ^ (epoch[1] << np.uint64(1)))


def cut_batches(
    tables: Iterable[pa.Table],
    positions: Iterable[Position],
    pad_id: int,
    max_length: int,
    pad_multiple: int = 1,
) -> Iterator[Batch]:
    """Yields batches at exactly these positions, from tables whose rows come in that order.

    Args:
        tables: as `data.rows.read_window` makes them, with a column `epoch`; a batch may
            begin in one table and end in a later one, and may have no row at all.
    """
    source = iter(tables)
    rest: pa.Table | None = None
    for position in positions:
        pieces = []
        while True:
            rest = next(source, None) if rest is None or not len(rest) else rest
            if rest is None:
                break
            same = (rest["batch"].to_numpy() == position.batch) & (
                rest["epoch"].to_numpy() == position.epoch
            )
            n = len(same) if same.all() else int(same.argmin())
            pieces.append(rest.slice(0, n))
            if n < len(same):
                rest = rest.slice(n)
                break
            rest = None
        yield _batch(position, pieces, pad_id, max_length, pad_multiple)


def _batch(
    position: Position, pieces: list[pa.Table], pad_id: int, max_length: int, pad_multiple: int
) -> Batch:
    # Label texts, and batches of them alone, have no column of a teacher.
    table = pa.concat_tables(pieces, promote_options="default") if pieces else POINTS.empty_table()
    predicted = None
    if PREDICTED in table.column_names:
        probabilities = pc.list_flatten(table[PROBABILITIES]).to_numpy()
        predicted = ragged(table[PREDICTED]), probabilities.astype(np.float64)
    rows = table["row"].to_numpy() if pieces else np.zeros(0, dtype=np.int64)
    return Batch(
        position,
        table["point_id"].to_numpy(),
        truncate(ragged(table["input_ids"]), max_length),
        ragged(table["labels"]),
        ragged(table["filter_labels"]),
        pad_id,
        pad_multiple,
        rows,
        predicted=predicted,
    )


def padded_tokens(
    rows: Ragged, pad_id: int, device: torch.device, multiple: int = 1
) -> tuple[Tensor, Tensor]:
    """Uploads rows as (input_ids, attention_mask) int64 [max(n, 1), T], padded to the longest.

    Where no row is padded the mask is a single 1, expanded. Its stride of 0 tells the encoder so
    without a look into the memory of a GPU.
    """
    ids, mask = map(torch.from_numpy, pad(rows, pad_id, multiple))
    given = mask[:1, :1] if mask.all() else mask
    return upload(ids, device), upload(given, device).expand(ids.shape)


def pad(rows: Ragged, pad_id: int, multiple: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Pads rows to (ids, mask) int64 [max(n, 1), T], T the longest rounded up to `multiple`."""
    width = _width(rows, multiple)
    ids = np.full((max(len(rows), 1), width), pad_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    mask[: len(rows)] = np.arange(width) < rows.lengths[:, None]
    ids[mask == 1] = rows.values
    # Attention over nothing is NaN, and NaN times a zero gradient is NaN still.
    mask[:, 0] = 1
    return ids, mask


def _width(rows: Ragged, multiple: int) -> int:
    longest = max(1, int(rows.lengths.max(initial=1)))
    return -(-longest // multiple) * multiple
