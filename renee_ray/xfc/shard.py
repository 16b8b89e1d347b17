"""Forward, backward and update of one label shard, chunk by chunk, without autograd.

What it equals, for E [B, D], W [n, D] and Y [B, n] in {0, 1} (Renée, section 3):

    loss = binary_cross_entropy_with_logits(E @ W.T, Y, reduction="sum")
    dE   = (sigmoid(E @ W.T) - Y) @ W            # summed over the shard's labels
    dW   = (sigmoid(E @ W.T) - Y).T @ E          # then one SGD step

Neither logits nor dW ever exist for more than one chunk of labels, and where the matmuls are
fp32 and there is no momentum, dW does not exist at all: BLAS accumulates it into the weights.
Buffers are those of the first step; the loop over chunks allocates nothing of a chunk's size,
but in steps whose loss is asked for.
Fewer passes over memory do the same on a CPU (`cpu_loops`) and, where triton is there, on a
GPU (`kernels`).
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from renee_ray.xfc.kernels.device import chunk_bytes, has_kernels, native_e4m3, upload
from renee_ray.xfc.labels import LabelRange
from renee_ray.xfc.lanes import lane_count, run
from renee_ray.xfc.weights.buffers import E4M3
from renee_ray.xfc.weights.rounding import scaled_e4m3
from renee_ray.xfc.weights.storages import SGD, Update, Weights, add_product

HOST = torch.device("cpu")
GRADIENT_BYTES = 10
"""Of a number of dE in a lane: its sum, and a chunk's part of it as bf16 and as fp32."""
Chunks = list[tuple[int, int]]
"""Local [start, stop) of labels that are worked on at once, one after the other."""
INIT_BLOCK = 1024
"""Labels whose first weights come from one random stream, whoever owns them."""


class Pairs:
    """The distinct (row, label) pairs of a global batch that fall into a shard, by label.

    Args:
        rows: int64 [m], rows of the global batch, in host memory.
        labels: int64 [m], global ids inside `owned`, in host memory.
        device: where the shard computes.
    """

    def __init__(
        self, rows: Tensor, labels: Tensor, owned: LabelRange, device: torch.device = HOST
    ) -> None:
        width = int(rows.max()) + 1 if len(rows) else 1
        key = torch.unique((labels - owned.start) * width + rows)
        # The host keeps a copy: where a chunk's pairs begin is then known without a device sync.
        self._host_labels = key // width
        self._labels = upload(self._host_labels, device)
        self._rows = upload(key % width, device)

    def of_rows(self, chosen: Tensor) -> Pairs:
        """Those of the rows int64 [r], ascending, which become the rows 0 .. r - 1."""
        place = torch.searchsorted(chosen, self._rows)
        inside = chosen[place.clamp(max=len(chosen) - 1)] == self._rows
        found = copy.copy(self)
        found._rows, found._labels = place[inside], self._labels[inside]
        found._host_labels = self._host_labels[inside.to(HOST)]
        return found

    def by_chunk(self, chunks: Chunks) -> list[tuple[Tensor, Tensor]]:
        """(rows, columns inside the chunk) of each chunk of local labels [start, stop).

        chunks: one after the other, without a gap.
        """
        ends = [start for start, _ in chunks] + [stop for _, stop in chunks[-1:]]
        bounds = torch.searchsorted(self._host_labels, torch.tensor(ends)).tolist()
        return [
            (self._rows[lo:hi], self._labels[lo:hi] - start)
            for (start, _), lo, hi in zip(chunks, bounds, bounds[1:], strict=False)
        ]


@dataclass(frozen=True)
class Operations:
    """How a chunk is computed: `residual`, and `update` as `storage.Update`.

    padding: the rows of G are padded to a multiple of it.
    scaled: whether logits come from e4m3 numbers, whose scales `residual` then takes as well.
    """

    residual: Callable[..., Tensor]
    update: type[Update]
    padding: int = 1
    scaled: bool = False

    def padded(self, batch: int) -> int:
        """Numbers that a row of G takes in memory for a batch of so many rows, at least 1."""
        return -(-max(batch, 1) // self.padding) * self.padding


@dataclass(frozen=True)
class Inputs:
    """E of a global batch, as it is multiplied.

    wide: [B, D] in the compute dtype; scaled: as of `rounding.scaled_e4m3`, for the logits alone.
    """

    wide: Tensor
    scaled: tuple[Tensor, Tensor] | None


class Shard:
    """The labels `owned` of the classifier, with their weights.

    Args:
        chunk: labels worked on at once; 0: as many as keep a chunk in the cache.
        operations: how a chunk is computed; None: what is fastest on the device.
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
        """The chunks of each lane (see module `lanes`) for a global batch of `batch` rows.

        each: bytes of working memory for a label; 0: what a training step takes.
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

    def chunks(self, batch: int, each: int = 0) -> Chunks:
        """Those of all `lanes`, in the order of the labels."""
        return [chunk for lane in self.lanes(batch, each) for chunk in lane]

    def step(
        self,
        embeddings: Tensor,
        positives: Pairs,
        sgd: SGD,
        *,
        with_loss: bool = False,
        on_gradient: Callable[[Tensor], None] = lambda gradient: None,
    ) -> Tensor:
        """Trains the shard on one global batch.

        Args:
            embeddings: [B, D] float32, finite, also in the compute dtype.
            on_gradient: called with dE [B, D] float32 once it is complete, before the last chunk
                of each lane is updated: what it starts (a reduce-scatter) overlaps that update.

        Returns:
            this shard's part of the summed loss, float64 scalar (0 without `with_loss`).
        """
        inputs = self.inputs(embeddings)
        update = self.operations.update(self.weights, sgd, self.owned.start)
        lanes = [
            _Lane(self, inputs, positives, chunks, update, with_loss)
            for chunks in self.lanes(len(embeddings))
        ]
        run([lane.forward for lane in lanes])
        gradient, loss = lanes[0].gradient, lanes[0].loss
        for lane in lanes[1:]:
            gradient += lane.gradient
            loss += lane.loss
        on_gradient(gradient)
        run([lane.finish for lane in lanes])
        return loss

    def inputs(self, embeddings: Tensor) -> Inputs:
        """Of embeddings [B, D] float32."""
        scaled = scaled_e4m3(embeddings) if self.operations.scaled else None
        return Inputs(embeddings.to(self.weights.compute_dtype), scaled)

    def residual(
        self,
        operand: Tensor,
        inputs: Inputs,
        chunk: tuple[int, int],
        pairs: tuple[Tensor, Tensor],
        loss: Tensor | None,
    ) -> Tensor:
        """The function `residual` of a chunk [start, stop), for its `operand` and its `pairs`.

        Returns:
            G [stop - start, B], until the next call.
        """
        rows, columns = pairs
        batch = len(inputs.wide)
        shape = len(operand), self.operations.padded(batch)
        # Labels first: BLAS then reads every operand of the three products as it lies.
        out = self.weights.scratch("logits", *shape, dtype=inputs.wide.dtype)[:, :batch]
        if inputs.scaled is None:
            return self.operations.residual(operand, inputs.wide, columns, rows, out, loss)
        codes = self.weights.operand(*chunk, torch.float8_e4m3fn)
        narrow, scales = inputs.scaled
        return self.operations.residual(codes, narrow, columns, rows, out, loss, scales)

    def initialise_normal(self, std: float, seed: int) -> None:
        """W ~ N(0, std); the row of a label depends on (seed, label) only, not on the shards."""
        for block in range(self.owned.start // INIT_BLOCK, -(-self.owned.stop // INIT_BLOCK)):
            # torch's CPU generator reads 32 bits of its seed: some blocks of many would be twins.
            stream = np.random.default_rng([seed, block])
            drawn = stream.standard_normal((INIT_BLOCK, self.weights.dim), dtype=np.float32)
            rows = torch.from_numpy(drawn) * std
            first = max(block * INIT_BLOCK, self.owned.start)
            last = min((block + 1) * INIT_BLOCK, self.owned.stop)
            if first < last:
                inside = rows[first - block * INIT_BLOCK : last - block * INIT_BLOCK]
                self.write(first, inside)

    def write(self, first: int, rows: Tensor) -> None:
        """Sets the weights of labels [first, first + len(rows)), given as float32."""
        start = first - self.owned.start
        self.weights.weight.write(start, start + len(rows), rows.to(self.weights.device))


class _Lane:
    """A step's work on some chunks of a shard.

    gradient: dE [B, D] float32; loss: float64 scalar; both of these chunks alone.
    """

    def __init__(
        self,
        shard: Shard,
        inputs: Inputs,
        positives: Pairs,
        chunks: Chunks,
        update: Update,
        with_loss: bool,
    ) -> None:
        self._shard, self._inputs, self._positives = shard, inputs, positives
        self._chunks, self._update, self._with_loss = chunks, update, with_loss
        self.gradient = torch.zeros_like(inputs.wide, dtype=torch.float32)
        self.loss = torch.zeros((), dtype=torch.float64, device=inputs.wide.device)
        self.finish: Callable[[], None] = lambda: None

    def forward(self) -> None:
        """All but the last chunk's update, which `finish` makes."""
        for chunk, pairs in zip(self._chunks, self._positives.by_chunk(self._chunks), strict=True):
            self.finish()
            self.finish = self._forward(chunk, pairs)

    def _forward(self, chunk: tuple[int, int], pairs: tuple[Tensor, Tensor]) -> Callable[[], None]:
        """A chunk's part of dE and of the loss; returns its update."""
        (start, stop), scratch = chunk, self._shard.weights.scratch
        operand, inputs = self._shard.weights.operand(start, stop), self._inputs.wide
        loss = self.loss if self._with_loss else None
        residual = self._shard.residual(operand, self._inputs, chunk, pairs, loss)
        add_product(self.gradient, residual.T, operand, 1, 1, scratch)
        return functools.partial(self._update, start, stop, operand, residual, inputs)


def choose_operations(weights: Weights) -> Operations:
    """Those of `cpu_loops`, of `kernels`, or of plain torch, by the device.

    On a CPU plain torch is fastest where fp32 lies in memory: BLAS accumulates into it.
    """
    if weights.device.type == "cpu":
        if not weights.weight.aliased:
            from renee_ray.xfc.kernels import cpu_loops  # numba, which takes a second to import

            cpu_loops.compile_for(weights)
            return Operations(residual, cpu_loops.FusedUpdate)
    elif has_kernels(weights.device):
        from renee_ray.xfc.kernels import gpu

        narrow = isinstance(weights.weight, E4M3) and weights.compute_dtype == torch.bfloat16
        scaled = narrow and native_e4m3(weights.device)
        return Operations(gpu.residual, gpu.FusedUpdate, gpu.PADDING, scaled)
    return Operations(residual, Update)


def residual(
    operand: Tensor, inputs: Tensor, labels: Tensor, rows: Tensor, out: Tensor, loss: Tensor | None
) -> Tensor:
    """sigmoid(operand @ inputs.T) - y, where y is 1 at the pairs (labels, rows).

    Args:
        operand: [c, D]; inputs: [B, D]; out: [c, B], all of one dtype.
        labels: int64 [m], rows of `operand`; rows: int64 [m], of `inputs`; no pair twice.
        loss: if given, the sum of BCE-with-logits is added to it, a float64 scalar.

    Returns:
        `out`
    """
    torch.mm(operand, inputs.T, out=out)
    if loss is not None:
        loss += bce_sum(out, labels, rows)
    return subtract_positives(out, labels, rows)


def subtract_positives(logits: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
    """sigmoid(logits) - y in place, logits [c, B], where y is 1 at the pairs (labels, rows).

    At a positive it is -sigmoid(-logit): a difference from 1 would lose all digits in bf16.
    """
    positive = logits[labels, rows].neg_().sigmoid_().neg_()
    logits.sigmoid_()
    logits[labels, rows] = positive
    return logits


def bce_sum(logits: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
    """Sum of BCE-with-logits over a chunk [c, B] whose positives are (labels, rows)."""
    everywhere = torch.nn.functional.softplus(logits.float()).sum(dtype=torch.float64)
    return everywhere - logits[labels, rows].sum(dtype=torch.float64)


def default_chunk(each: int, device_type: str) -> int:
    """Labels of `each` bytes of buffers that fit what a chunk may take on the device."""
    return max(64, chunk_bytes(device_type) // each // 64 * 64)


def buffer_bytes(batch: int, weights: Weights, operations: Operations) -> int:
    """Bytes of working memory for one label of a chunk, at most.

    Of kernels on a GPU: residuals and operand. Otherwise residuals and, for the loss, two fp32
    copies; for each weight its operand and gradient, each at most fp32. Plain torch, where the
    weights are not in memory as fp32, takes for each its operand, its value, velocity and noise,
    the gradient as bf16 and fp32, and four numbers while rounding it.
    """
    item, plain = weights.compute_dtype.itemsize, operations.update is Update
    if weights.device.type == "cuda" and not plain:
        return item * operations.padded(batch) + item * weights.dim
    for_each = item + 36 if plain and not weights.weight.aliased else 8
    return (item + 8) * max(batch, 1) + for_each * weights.dim
