"""How a shard's weights lie in memory, and their SGD update.

Ledger, for a shard of n labels and dimension D on one rank:

    fp32        weight       [n, D] float32
    bf16_split  high         [n, D] bfloat16   the weight rounded to bf16: what matmuls read
                low          [n, D] int16      float32 bits of the weight minus those of `high`
    momentum, when on: one more buffer in the same storage

`bf16_split` loses nothing: bits(w) = (bits(high) << 16) + low, exactly, because rounding
to the nearest bf16 leaves a remainder that fits a signed 16-bit integer. So the master
weight is fp32 at four bytes, and the matmuls need no converted copy.

Update of a chunk, SGD with coupled weight decay (Renée, section 3; torch.optim.SGD):

    g <- grad + weight_decay * w;    m <- momentum * m + g;    w <- w - lr * m
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SGD:
    """Hyper-parameters of one classifier update; `lr` is that of the current step."""

    lr: float
    momentum: float = 0.9
    weight_decay: float = 0.0


class Buffer(ABC):
    """[n, D] numbers that are fp32 for whoever reads or writes them, however they are stored."""

    @abstractmethod
    def __init__(self, rows: int, dim: int, device: torch.device) -> None: ...

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors, each [n, D], by suffix of their name in a checkpoint."""

    @abstractmethod
    def read(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) as float32; may alias the buffer."""

    @abstractmethod
    def write(self, start: int, stop: int, rows: Tensor) -> None:
        """Stores float32 rows [stop - start, D]."""

    @abstractmethod
    def operand(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) as a matmul reads them, aliasing the buffer."""


class Float32(Buffer):
    """Plain float32."""

    def __init__(self, rows: int, dim: int, device: torch.device) -> None:
        self.data = torch.zeros(rows, dim, dtype=torch.float32, device=device)

    def tensors(self) -> dict[str, Tensor]:
        return {"": self.data}

    def read(self, start: int, stop: int) -> Tensor:
        return self.data[start:stop]

    def write(self, start: int, stop: int, rows: Tensor) -> None:
        if rows.data_ptr() != self.data[start:stop].data_ptr():
            self.data[start:stop] = rows

    operand = read


class Split(Buffer):
    """float32 as its nearest bfloat16 and the 16 bits that are missing."""

    def __init__(self, rows: int, dim: int, device: torch.device) -> None:
        self.high = torch.zeros(rows, dim, dtype=torch.bfloat16, device=device)
        self.low = torch.zeros(rows, dim, dtype=torch.int16, device=device)

    def tensors(self) -> dict[str, Tensor]:
        return {".high": self.high, ".low": self.low}

    def read(self, start: int, stop: int) -> Tensor:
        bits = self.high[start:stop].view(torch.int16).to(torch.int32)
        return bits.bitwise_left_shift_(16).add_(self.low[start:stop]).view(torch.float32)

    def write(self, start: int, stop: int, rows: Tensor) -> None:
        bits = rows.contiguous().view(torch.int32)
        high = (bits + 0x8000).bitwise_right_shift_(16)
        self.high[start:stop].view(torch.int16).copy_(high)
        self.low[start:stop].copy_(bits - high.bitwise_left_shift_(16))

    def operand(self, start: int, stop: int) -> Tensor:
        return self.high[start:stop]


STORAGES: dict[str, tuple[type[Buffer], torch.dtype]] = {
    "fp32": (Float32, torch.float32),
    "bf16_split": (Split, torch.bfloat16),
}
"""Name -> (buffer, dtype of the matmuls)."""


class Weights:
    """The weights of a shard and, with momentum, their velocities.

    Args:
        precision: a name in `STORAGES`.
        rows: labels of the shard, n; may be 0.
        dim: D.
        momentum: whether a velocity buffer is kept.
    """

    def __init__(
        self, precision: str, rows: int, dim: int, momentum: bool, device: torch.device
    ) -> None:
        buffer, self.compute_dtype = STORAGES[precision]
        self.precision, self.rows, self.dim, self.device = precision, rows, dim, device
        self.weight = buffer(rows, dim, device)
        self.velocity = buffer(rows, dim, device) if momentum else None

    def update(self, start: int, stop: int, grad: Tensor, sgd: SGD) -> None:
        """One SGD step on rows [start, stop); `grad` float32 [stop - start, D] is overwritten."""
        weight = self.weight.read(start, stop)
        grad.add_(weight, alpha=sgd.weight_decay)
        if self.velocity is not None:
            grad.add_(self.velocity.read(start, stop), alpha=sgd.momentum)
            self.velocity.write(start, stop, grad)
        weight.sub_(grad, alpha=sgd.lr)
        self.weight.write(start, stop, weight)

    def tensors(self) -> dict[str, Tensor]:
        """Everything to save, by name; each tensor is [n, D] and aliases the shard."""
        named = {f"weight{suffix}": t for suffix, t in self.weight.tensors().items()}
        if self.velocity is not None:
            named |= {f"momentum{suffix}": t for suffix, t in self.velocity.tensors().items()}
        return named

    def nbytes(self) -> int:
        """Bytes of the shard."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())
