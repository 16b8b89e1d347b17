"""The storages of a shard by name: how its weights and their velocities are stored.

    name         weight     momentum   bytes/weight, momentum
    fp32         Float32    Float32    4, 4      the oracle
    bf16_split   Split      Split      4, 4      fp32 in two halves, the upper one a bf16 operand
    bf16_sr      BFloat16   BFloat16   2, 2      stochastic rounding
    fp16         Half       Float32    6, 4      for GPUs that multiply fp16 but not bf16
    fp8_sr       E4M3       BFloat16   1, 2      stochastic rounding (ELMO, ICML 2025)

The update of these buffers is `kernels.plain.Update`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from renee_ray.xfc.device import choose_precision, native, native_narrow
from renee_ray.xfc.weights.buffers import E4M3, BFloat16, Buffer, Float32, Half, Split
from renee_ray.xfc.weights.scratch import Scratch


@dataclass(frozen=True)
class SGD:
    """Hyper-parameters of one classifier update; `lr` is that of the current step.

    seed, step: they determine the noise of stochastic rounding, with label and column.
    """

    lr: float
    momentum: float = 0.9
    weight_decay: float = 0.0
    seed: int = 0
    step: int = 0


@dataclass(frozen=True)
class Storage:
    """The buffers of weights and momentum, and the narrow dtype of the matmuls."""

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


def stored_bytes(precision: str) -> tuple[int, int]:
    """Returns the bytes of one weight, and of its velocity or mean."""
    storage = STORAGES[precision]
    weight, velocity = storage.weight.stored.values(), storage.velocity.stored.values()
    return sum(each.itemsize for each in weight), sum(each.itemsize for each in velocity)


class Weights:
    """The weights of a shard and, with momentum, their velocities.

    Args:
        precision: a name in `STORAGES`, or `auto` (see `device.choose_precision`).
        rows: labels of the shard, n; may be 0.
        dim: D.
        momentum: whether a velocity buffer is kept.
        compute: dtype of the matmuls: the storage's own or fp32; None: what suits the device.
        averaged: whether a buffer for the mean of several steps' weights is kept.
    """

    def __init__(
        self,
        precision: str,
        rows: int,
        dim: int,
        momentum: bool,
        device: torch.device,
        compute: torch.dtype | None = None,
        *,
        averaged: bool = False,
    ) -> None:
        self.precision = choose_precision(precision, *native_narrow(device))
        storage = STORAGES[self.precision]
        fast = native(storage.compute, device)
        self.compute_dtype = compute or (storage.compute if fast else torch.float32)
        self.rows, self.dim, self.device = rows, dim, device
        self.scratch = Scratch(device)
        self.weight = storage.weight(rows, dim, device, self.scratch)
        self.velocity = storage.velocity(rows, dim, device, self.scratch) if momentum else None
        # As a velocity is stored: a mean in e4m3 would not move by a share of a weight.
        self.average = storage.velocity(rows, dim, device, self.scratch) if averaged else None

    @classmethod
    def of(cls, rows: Tensor) -> Weights:
        """Takes float32 [n, D] as the weights of `fp32`, without a copy."""
        made = cls("fp32", 0, rows.shape[1], False, rows.device)
        made.rows, made.weight.data, made.weight.rest = len(rows), rows, rows
        return made

    def read(self, start: int, stop: int) -> Tensor:
        """Returns weights [start, stop) as float32, valid until the next call; may alias."""
        return self._expanded(self.weight, "weight", start, stop)

    def operand(self, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        """Returns weights [start, stop) in a dtype, valid until the next call; may alias the shard.

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
        """Returns velocities [start, stop) as float32, valid until the next call; may alias."""
        assert self.velocity is not None
        return self._expanded(self.velocity, "velocity", start, stop)

    def averages(self, start: int, stop: int) -> Tensor:
        """Returns means [start, stop) as float32, valid until the next call; may alias."""
        assert self.average is not None
        return self._expanded(self.average, "average", start, stop)

    def tensors(self) -> dict[str, Tensor]:
        """Returns all that is to be saved, by name: tensors [n, D] that alias the shard."""
        named = {f"weight{suffix}": t for suffix, t in self.weight.tensors().items()}
        if self.velocity is not None:
            named |= {f"momentum{suffix}": t for suffix, t in self.velocity.tensors().items()}
        if self.average is not None:
            named |= {f"average{suffix}": t for suffix, t in self.average.tensors().items()}
        return named

    def nbytes(self) -> int:
        """Returns the bytes of the shard."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def _expanded(self, buffer: Buffer, name: str, start: int, stop: int) -> Tensor:
        out = None if buffer.aliased else self.scratch(name, stop - start, self.dim)
        return buffer.read(start, stop, out)
