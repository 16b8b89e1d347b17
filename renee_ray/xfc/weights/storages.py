"""The storages of a shard by name, and their SGD update.

    name         weight     momentum   bytes/weight, momentum
    fp32         Float32    Float32    4, 4      the oracle
    bf16_split   Split      Split      4, 4      fp32 in two halves, the upper one a bf16 operand
    bf16_sr      BFloat16   BFloat16   2, 2      stochastic rounding
    fp16         Half       Float32    6, 4      for GPUs that multiply fp16 but not bf16
    fp8_sr       E4M3       BFloat16   1, 2      stochastic rounding (ELMO, ICML 2025)

Update of a chunk, SGD with coupled weight decay (Renée, section 3; torch.optim.SGD), with G
the residuals and E the embeddings, whose product is the gradient:

    m <- momentum * m + G' E + weight_decay * w;    w <- w - lr * m

Without momentum that is one product accumulated into the weights:

    w <- (1 - lr * weight_decay) * w - lr * G' E
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from renee_ray.xfc.kernels.device import choose_compute, choose_precision
from renee_ray.xfc.weights.buffers import E4M3, BFloat16, Buffer, Float32, Half, Split
from renee_ray.xfc.weights.rounding import Noise
from renee_ray.xfc.weights.scratch import Scratch


@dataclass(frozen=True)
class SGD:
    """Hyper-parameters of one classifier update; `lr` is that of the current step.

    seed, step: what the noise of stochastic rounding depends on, besides label and column.
    """

    lr: float
    momentum: float = 0.9
    weight_decay: float = 0.0
    seed: int = 0
    step: int = 0


@dataclass(frozen=True)
class Storage:
    """Buffers of the weights and of the momentum, and the narrow dtype of the matmuls."""

    weight: type[Buffer]
    velocity: type[Buffer]
    compute: torch.dtype


STORAGES: dict[str, Storage] = {
    "fp32": Storage(Float32, Float32, torch.float32),
    "bf16_split": Storage(Split, Split, torch.bfloat16),
    "bf16_sr": Storage(BFloat16, BFloat16, torch.bfloat16),
    "fp16": Storage(Half, Float32, torch.float16),
    "fp8_sr": Storage(E4M3, BFloat16, torch.bfloat16),
}


class Weights:
    """The weights of a shard and, with momentum, their velocities.

    Args:
        precision: a name in `STORAGES`, or `auto` (see `device.choose_precision`).
        rows: labels of the shard, n; may be 0.
        dim: D.
        momentum: whether a velocity buffer is kept.
        compute: dtype of the matmuls: the storage's own or fp32; None: what suits the device.

    Raises:
        ValueError: the storage cannot be multiplied in `compute`.
    """

    def __init__(
        self,
        precision: str,
        rows: int,
        dim: int,
        momentum: bool,
        device: torch.device,
        compute: torch.dtype | None = None,
    ) -> None:
        self.precision = choose_precision(precision, device)
        storage = STORAGES[self.precision]
        if compute not in (None, torch.float32, storage.compute):
            raise ValueError(
                f"compute {compute}: {self.precision} is multiplied in torch.float32 or "
                f"{storage.compute}"
            )
        self.compute_dtype = compute or choose_compute(storage.compute, self.precision, device)
        self.rows, self.dim, self.device = rows, dim, device
        self.scratch = Scratch(device)
        self.weight = storage.weight(rows, dim, device, self.scratch)
        self.velocity = storage.velocity(rows, dim, device, self.scratch) if momentum else None

    def read(self, start: int, stop: int) -> Tensor:
        """Weights [start, stop) as float32, until the next call; may alias the shard."""
        return self._expanded(self.weight, "weight", start, stop)

    def operand(self, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        """Weights [start, stop) in a dtype, until the next call; may alias the shard.

        dtype: one of those of the storage's matmuls; None: `compute_dtype`.
        """
        dtype = dtype or self.compute_dtype
        if dtype == torch.float32:
            return self.read(start, stop)
        stored = self.weight.operand(start, stop, dtype)
        if stored is not None:
            return stored
        out = self.scratch("operand", stop - start, self.dim, dtype=dtype)
        return self.weight.read(start, stop, out)

    def velocities(self, start: int, stop: int) -> Tensor:
        """Velocities [start, stop) as float32, until the next call; may alias the shard."""
        assert self.velocity is not None
        return self._expanded(self.velocity, "velocity", start, stop)

    def tensors(self) -> dict[str, Tensor]:
        """Everything to save, by name; each tensor is [n, D] and aliases the shard."""
        named = {f"weight{suffix}": t for suffix, t in self.weight.tensors().items()}
        if self.velocity is not None:
            named |= {f"momentum{suffix}": t for suffix, t in self.velocity.tensors().items()}
        return named

    def nbytes(self) -> int:
        """Bytes of the shard."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def _expanded(self, buffer: Buffer, name: str, start: int, stop: int) -> Tensor:
        out = None if buffer.aliased else self.scratch(name, stop - start, self.dim)
        return buffer.read(start, stop, out)


class Update:
    """One SGD step on a shard, chunk by chunk.

    Args:
        first: global id of the shard's first label.
    """

    def __init__(self, weights: Weights, sgd: SGD, first: int) -> None:
        self._weights, self._sgd, self._first = weights, sgd, first
        self._noise = step_noise(weights, sgd, first)

    def __call__(
        self, start: int, stop: int, operand: Tensor, residual: Tensor, inputs: Tensor
    ) -> None:
        """Updates rows [start, stop) by the gradient `residual @ inputs`.

        Args:
            operand: what `Weights.operand(start, stop)` gave; is overwritten.
            residual: [stop - start, B]; inputs: [B, D], both in the compute dtype.
        """
        weights, sgd = self._weights, self._sgd
        exact = operand.dtype == torch.float32
        weight = operand if exact else weights.read(start, stop)
        if weights.velocity is None:
            decay = 1 - sgd.lr * sgd.weight_decay
            add_product(weight, residual, inputs, decay, -sgd.lr, weights.scratch)
        else:
            velocity = weights.velocities(start, stop)
            add_product(velocity, residual, inputs, sgd.momentum, 1, weights.scratch)
            if sgd.weight_decay:
                velocity.add_(weight, alpha=sgd.weight_decay)
            weight.sub_(velocity, alpha=sgd.lr)
            weights.velocity.store(start, stop, velocity, self._noise[1])
        weights.weight.store(start, stop, weight, self._noise[0])


def step_noise(
    weights: Weights, sgd: SGD, first: int, *, opposite: bool = False
) -> list[Noise | None]:
    """That of the weights and of the velocities at a step, None where nothing is rounded so.

    first: global id of the shard's first label; opposite: as for `Noise`.
    """
    return [
        Noise(
            sgd.seed, sgd.step, stream, buffer.dropped, weights.dim, first, weights.scratch,
            opposite=opposite,
        )
        if buffer is not None and buffer.dropped
        else None
        for stream, buffer in enumerate((weights.weight, weights.velocity))
    ]  # fmt: skip


def add_product(
    total: Tensor, left: Tensor, right: Tensor, beta: float, alpha: float, scratch: Scratch
) -> None:
    """total <- beta * total + alpha * left @ right, accumulated in fp32.

    Args:
        total: float32 [m, n]; left: [m, k]; right: [k, n], of one dtype.
    """
    if right.dtype == torch.float32:
        total.addmm_(left, right, beta=beta, alpha=alpha)
        return
    product = scratch("product fp32", *total.shape)
    if right.is_cuda:
        torch.mm(left, right, out_dtype=torch.float32, out=product)
    else:
        narrow = scratch("product", *total.shape, dtype=right.dtype)
        product.copy_(torch.mm(left, right, out=narrow))
    if beta != 1:
        total.mul_(beta)
    total.add_(product, alpha=alpha)
