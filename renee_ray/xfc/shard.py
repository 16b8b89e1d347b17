"""Forward, backward and update of one label shard, chunk by chunk, without autograd.

Ledger, for a global batch of B rows, dimension D and a rank that owns n labels:

    W    [n, D]    stored (`weights`)      the shard; each rank has its own labels
    E    [B, D]    fp32                    embeddings of all rows, the same on every rank
    Y    [B, n]    (row, label, value)     the positives; sparse, never a matrix
    G    [c, B]    the matmuls' dtype      sigmoid(W E') - Y of one chunk of c labels
    dE   [B, D]    fp32                    this rank's part; the gradient is the sum over ranks

A step equals (Renée, section 3):

    loss = binary_cross_entropy_with_logits(E @ W.T, Y, reduction="sum")
    dE   = (sigmoid(E @ W.T) - Y) @ W            # summed over the shard's labels
    dW   = (sigmoid(E @ W.T) - Y).T @ E          # then one SGD step

With `Reductions` the loss is the decoupled softmax (module `softmax`), which alone needs to know
other ranks' labels, and passes over the chunks twice.

Neither logits nor dW ever exist for more than one chunk of labels, and where the matmuls are
fp32 and there is no momentum, dW does not exist at all: BLAS accumulates it into the weights.
The first step allocates the buffers. Later ones allocate nothing of a chunk's size, unless their
loss is asked for. `kernels` has the operations on a chunk for each kind of device.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from renee_ray.xfc.device import chunk_bytes, upload
from renee_ray.xfc.kernels.choose import Operations, choose_operations
from renee_ray.xfc.kernels.plain import Update, add_product
from renee_ray.xfc.labels import LabelRange
from renee_ray.xfc.lanes import lane_count, run
from renee_ray.xfc.softmax import Normalised, Positives, Reductions, RowSums
from renee_ray.xfc.weights.normal import normal_rows
from renee_ray.xfc.weights.rounding import Noise, scaled_e4m3
from renee_ray.xfc.weights.storages import SGD, Weights

HOST = torch.device("cpu")
GRADIENT_BYTES = 10
"""Memory of one number of dE in a lane: its sum, and a chunk's part of it as bf16 and as fp32."""
Chunks = list[tuple[int, int]]
"""Ranges [start, stop) of local labels; those of a range are worked on at once."""
AVERAGE = 2
"""Stream of noise of the mean; 0 and 1 are those of weights and velocities."""
NUMBERS = 1 << 20
"""Numbers of the shard that are worked on at once outside of a step, of 20 to 50 bytes of working
memory each."""


class Pairs:
    """The distinct (row, label) pairs of a global batch that fall into a shard, by label.

    Args:
        rows: int64 [m], rows of the global batch, in host memory.
        labels: int64 [m], global ids inside `owned`, in host memory.
        device: where the shard computes.
        values: [m] in [0, 1], in host memory, of which a pair has its largest; None: all are 1.
    """

    def __init__(
        self,
        rows: Tensor,
        labels: Tensor,
        owned: LabelRange,
        device: torch.device = HOST,
        values: Tensor | None = None,
    ) -> None:
        width = int(rows.max()) + 1 if len(rows) else 1
        key, place = torch.unique((labels - owned.start) * width + rows, return_inverse=True)
        values = torch.ones(len(rows)) if values is None else values.float()
        largest = torch.zeros(len(key)).scatter_reduce_(0, place, values, "amax")
        self._values = upload(largest, device)
        # The host keeps a copy: where a chunk's pairs begin is then known without a device sync.
        self._host_labels = key // width
        self._labels = upload(self._host_labels, device)
        self._rows = upload(key % width, device)

    def of_rows(self, chosen: Tensor) -> Pairs:
        """Returns the pairs of the rows int64 [r], ascending, which become the rows 0 .. r - 1."""
        place = torch.searchsorted(chosen, self._rows)
        inside = chosen[place.clamp(max=len(chosen) - 1)] == self._rows
        found = copy.copy(self)
        found._rows, found._labels = place[inside], self._labels[inside]
        found._values = self._values[inside]
        found._host_labels = self._host_labels[inside.to(HOST)]
        return found

    def by_chunk(self, chunks: Chunks) -> list[Positives]:
        """Returns the pairs of each chunk of local labels [start, stop).

        chunks: ascending ranges without a gap.
        """
        ends = [start for start, _ in chunks] + [stop for _, stop in chunks[-1:]]
        bounds = torch.searchsorted(self._host_labels, torch.tensor(ends)).tolist()
        return [
            (self._rows[lo:hi], self._labels[lo:hi] - start, self._values[lo:hi])
            for (start, _), (lo, hi) in zip(chunks, itertools.pairwise(bounds), strict=True)
        ]


class Shard:
    """The labels `owned` of the classifier, with their weights.

    Args:
        chunk: number of labels worked on at once; 0: as many as keep a chunk in the cache.
        operations: how a chunk is computed; None: the fastest that the device has.
    """

    def __init__(
        self,
        owned: LabelRange,
        weights: Weights,
        chunk: int = 0,
        operations: Operations | None = None,
    ) -> None:
        self.owned, self.weights, self.chunk = owned, weights, chunk
        self.operations = operations or choose_operations(weights)

    def lanes(self, batch: int, each: int = 0, *, gradient: bool = True) -> list[Chunks]:
        """Returns the chunks of each lane (module `lanes`) for a global batch of `batch` rows.

        each: bytes of working memory for one label; 0: what a training step takes.
        gradient: whether each lane has a dE of its own.
        """
        each = each or buffer_bytes(batch, self.weights, self.operations)
        size = self.chunk or default_chunk(each, self.weights.device.type)
        n = len(self.owned)
        own = GRADIENT_BYTES * batch * self.weights.dim * gradient
        count = lane_count(n, own, self.weights.device)
        bounds = itertools.pairwise(n * i // count for i in range(count + 1))
        return [
            [(start, min(start + size, last)) for start in range(first, last, size)]
            for first, last in bounds
        ]

    def chunks(self, batch: int) -> Chunks:
        """Returns the chunks of all `lanes` of a training step, in the order of the labels."""
        return [chunk for lane in self.lanes(batch) for chunk in lane]

    def prepared(self, sgd: SGD) -> Update:
        """Draws the noise of a step, which needs neither embeddings nor gradients.

        A caller that waits for the GPU prepares the update first, while the GPU is busy.
        """
        return self.operations.update(self.weights, sgd, self.owned.start)

    def step(
        self,
        embeddings: Tensor,
        positives: Pairs,
        update: Update | SGD,
        *,
        with_loss: bool = False,
        on_gradient: Callable[[Tensor], None] = lambda gradient: None,
        softmax: Reductions | None = None,
    ) -> Tensor:
        """Trains the shard on one global batch.

        Args:
            embeddings: [B, D] float32, finite, also in the compute dtype.
            update: what `prepared` gave, or what it is called with now.
            on_gradient: called with dE [B, D] float32 once it is complete, before the last chunk
                of each lane is updated: what it starts (a reduce-scatter) overlaps that update.
            softmax: trains by the decoupled softmax, reduced so over the ranks; None: by BCE.

        Returns:
            this shard's part of the summed loss, float64 scalar (0 without `with_loss`).
        """
        narrow = self.operations.scaled and softmax is None
        scaled = scaled_e4m3(embeddings) if narrow else None
        inputs = embeddings.to(self.weights.compute_dtype)
        update = self.prepared(update) if isinstance(update, SGD) else update
        each = buffer_bytes(len(embeddings), self.weights, self.operations, softmax is not None)
        lanes = [
            _Lane(self, inputs, scaled, chunks, positives.by_chunk(chunks), update, with_loss)
            for chunks in self.lanes(len(embeddings), each)
        ]
        if softmax is not None:
            sums = run([lane.row_sums for lane in lanes])
            normalised, loss = Normalised.of(sums, softmax)
            for lane in lanes:
                lane.normalised = normalised
            lanes[0].loss += loss * with_loss
        run([lane.forward for lane in lanes])
        gradient, loss = lanes[0].gradient, lanes[0].loss
        for lane in lanes[1:]:
            gradient += lane.gradient
            loss += lane.loss
        on_gradient(gradient)
        run([lane.finish for lane in lanes])
        return loss

    def initialise_normal(self, std: float, seed: int) -> None:
        """W ~ N(0, std); the row of a label depends on (seed, label) only, not on the shards."""
        dim, device, first = self.weights.dim, self.weights.device, self.owned.start
        for start, stop in self._parts():
            self.write(
                first + start, normal_rows(seed, first + start, first + stop, dim, device) * std
            )

    def add_to_average(self, number: int, seed: int, step: int) -> None:
        """Makes the mean of `number` - 1 steps' weights that of `number`, with those of `step`."""
        weights, mean = self.weights, self.weights.average
        assert mean is not None
        noise = None
        if mean.dropped:
            given = mean.dropped, weights.dim, self.owned.start, weights.scratch
            noise = Noise(seed, step, AVERAGE, *given)
        for start, stop in self._parts():
            rows = weights.averages(start, stop).lerp_(weights.read(start, stop), 1 / number)
            mean.store(start, stop, rows, noise)

    def take_average(self) -> None:
        """Sets the weights to their mean, rounded to the nearest that the storage has."""
        for start, stop in self._parts():
            self.weights.weight.write(start, stop, self.weights.averages(start, stop))

    def _parts(self) -> Chunks:
        size, rows = max(1, NUMBERS // self.weights.dim), len(self.owned)
        return [(start, min(start + size, rows)) for start in range(0, rows, size)]

    def write(self, first: int, rows: Tensor) -> None:
        """Sets the weights of labels [first, first + len(rows)), given as float32."""
        start = first - self.owned.start
        self.weights.weight.write(start, start + len(rows), rows.to(self.weights.device))


@dataclass
class _Lane:
    """A step's work on the chunks of one lane, each with its positives.

    inputs: E [B, D] in the compute dtype.
    scaled: what `rounding.scaled_e4m3` gives, for the logits alone; None: these take `inputs`.
    normalised: what the first pass of a softmax has found, or None.
    gradient: dE [B, D] float32; loss: float64 scalar; both of these chunks alone.
    """

    shard: Shard
    inputs: Tensor
    scaled: tuple[Tensor, Tensor] | None
    chunks: Chunks
    positives: list[Positives]
    update: Update
    with_loss: bool
    normalised: Normalised | None = None
    finish: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.gradient = torch.zeros_like(self.inputs, dtype=torch.float32)
        self.loss = torch.zeros((), dtype=torch.float64, device=self.inputs.device)

    def row_sums(self) -> RowSums:
        """Makes the first pass of a softmax."""
        sums, weights = RowSums(len(self.inputs), self.inputs.device), self.shard.weights
        for chunk, positives in zip(self.chunks, self.positives, strict=True):
            sums.add(weights.operand(*chunk), self.inputs, positives, weights.scratch)
        return sums

    def forward(self) -> None:
        """Does all but the last chunk's update, which `finish` then makes."""
        weights = self.shard.weights
        for chunk, positives in zip(self.chunks, self.positives, strict=True):
            self.finish()
            operand = weights.operand(*chunk)
            residual = self._residual(operand, chunk, positives)
            add_product(self.gradient, residual.T, operand, 1, 1, weights.scratch)
            self.finish = functools.partial(self.update, *chunk, operand, residual, self.inputs)

    def _residual(self, operand: Tensor, chunk: tuple[int, int], positives: Positives) -> Tensor:
        """Returns G [stop - start, B] of a chunk, valid until the next call."""
        inputs, loss = self.inputs, self.loss if self.with_loss else None
        weights, operations = self.shard.weights, self.shard.operations
        shape = len(operand), operations.padded(len(inputs))
        # Labels first: BLAS then reads every operand of the three products as it lies.
        padded = weights.scratch("logits", *shape, dtype=inputs.dtype)
        if self.normalised is not None:
            return self.normalised.residual(operand, inputs, positives, padded, weights.scratch)
        out, scales = padded[:, : len(inputs)], list[Tensor]()
        if self.scaled is not None:
            operand = weights.operand(*chunk, torch.float8_e4m3fn)
            inputs, *scales = self.scaled
        rows, columns, values = positives
        return operations.residual(
            operand, inputs, columns, rows, out, loss, *scales, values=values
        )


def default_chunk(each: int, device_type: str) -> int:
    """Returns how many labels of `each` bytes of buffers make a chunk on the device."""
    return max(64, chunk_bytes(device_type) // each // 64 * 64)


def buffer_bytes(
    batch: int, weights: Weights, operations: Operations, softmax: bool = False
) -> int:
    """Returns the bytes of working memory that one label of a chunk takes, at most.

    Kernels on a GPU have a residual for each row, for a softmax an fp32 logit besides, and an
    operand for each dimension. All others have residuals too and, for the loss or a softmax, two
    fp32 copies of them; and for each dimension the operand and the gradient, each at most fp32.
    Plain torch, where the weights are not in memory as fp32, has for each dimension the operand,
    value, velocity and noise, the gradient as bf16 and as fp32, and four numbers while it rounds.
    """
    plain = operations.update is Update
    kernels = weights.device.type == "cuda" and not plain
    rows = operations.padded(batch) if kernels else max(batch, 1)
    item, expanded = weights.compute_dtype.itemsize, plain and not weights.weight.aliased
    return label_bytes(rows, weights.dim, item, kernels, expanded, softmax)


def label_bytes(
    batch: int, dim: int, item: int, kernels: bool, expanded: bool, softmax: bool = False
) -> int:
    """Returns what `buffer_bytes` does, without a shard.

    item: bytes of the matmuls' dtype; kernels: of a GPU; expanded: plain torch, weights not fp32.
    """
    if kernels:
        return (item + 4 * softmax) * batch + item * dim
    return (item + 8) * batch + (item + 36 if expanded else 8) * dim
