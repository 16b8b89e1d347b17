"""How the numbers of a shard lie in memory.

Ledger, for n labels and dimension D on one rank; bytes a number:

    Float32     data    [n, D] float32         4
    Half        data    [n, D] float16         6   the rest rounded: what matmuls read
                rest    [n, D] float32
    Split       data    [n, D] bfloat16        4   the number rounded to bf16: what matmuls read
                rest    [n, D] int16               float32 bits of the number minus those of `data`
    BFloat16    data    [n, D] bfloat16        2   rounded stochastically
    E4M3        data    [n, D] float8_e4m3fn   1   rounded stochastically, saturating at +-448

`Split` loses nothing: bits(w) = (bits(data) << 16) + rest, exactly, because rounding to the
nearest bf16 leaves a remainder that fits a signed 16-bit integer. So the master weight is
fp32 at four bytes, and bf16 matmuls need no converted copy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from renee_ray.xfc.weights.gpu_trial import has_kernels
from renee_ray.xfc.weights.rounding import (
    BF16_DROPPED,
    E4M3_DROPPED,
    E4M3_MAX,
    Noise,
    round_to_bf16,
    round_to_e4m3,
)
from renee_ray.xfc.weights.scratch import Scratch


class Buffer(ABC):
    """Numbers [n, D] that are fp32 for whoever reads or writes them, however they are stored.

    kind: the name of the format, by which compiled code chooses how to read and write it.
    stored: dtypes of the one or two tensors, `data` and `rest`, by suffix of their name in a
        checkpoint. A matmul in the dtype of `data` reads that; `rest` is `data` if that is alone.
    dropped: bits of the noise that `store` rounds with; 0: it rounds to nearest, or not at all.
    aliased: whether `read` gives the buffer itself.
    """

    kind = ""
    stored: ClassVar[dict[str, torch.dtype]]
    dropped = 0
    aliased = False

    def __init__(self, rows: int, dim: int, device: torch.device, scratch: Scratch) -> None:
        self.data, *more = (
            torch.zeros(rows, dim, dtype=dtype, device=device) for dtype in self.stored.values()
        )
        self.rest = more[0] if more else self.data
        self._scratch = scratch

    def tensors(self) -> dict[str, Tensor]:
        """Returns the stored tensors, each [n, D], by suffix of their name in a checkpoint."""
        return dict(zip(self.stored, (self.data, self.rest), strict=False))

    def read(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Returns rows [start, stop) as float32: the buffer itself, or `out`, or a new tensor.

        out: may be bfloat16 where it holds every number that the buffer can store.
        """
        return self._take(slice(start, stop), out)

    def pick(self, rows: Tensor) -> Tensor:
        """Returns the rows int64 [m], as a new float32 tensor [m, D]."""
        return self._take(rows, None)

    @abstractmethod
    def _take(self, rows: slice | Tensor, out: Tensor | None) -> Tensor: ...

    @abstractmethod
    def write(self, start: int, stop: int, rows: Tensor) -> None:
        """Stores the numbers nearest to float32 rows [stop - start, D]."""

    def store(self, start: int, stop: int, rows: Tensor, noise: Noise | None) -> None:
        """Stores the rows, rounded stochastically where the storage does so; may overwrite them.

        noise: of `dropped` bits; None where that is 0.
        """
        self.write(start, stop, rows)

    def operand(self, start: int, stop: int, dtype: torch.dtype) -> Tensor | None:
        """Returns rows [start, stop) in `dtype` aliasing the buffer, or None if it has none."""
        return self.data[start:stop] if dtype == self.data.dtype else None


class Float32(Buffer):
    """Plain float32."""

    kind = "fp32"
    stored: ClassVar[dict[str, torch.dtype]] = {"": torch.float32}
    aliased = True

    def _take(self, rows: slice | Tensor, out: Tensor | None) -> Tensor:
        return self.rest[rows]

    def write(self, start: int, stop: int, rows: Tensor) -> None:
        if rows.data_ptr() != self.rest[start:stop].data_ptr():
            self.rest[start:stop] = rows


class Half(Float32):
    """A float32 master and its float16 copy, for matmuls in float16."""

    kind = "half"
    stored: ClassVar[dict[str, torch.dtype]] = {".half": torch.float16, ".master": torch.float32}

    def write(self, start: int, stop: int, rows: Tensor) -> None:
        super().write(start, stop, rows)
        self.data[start:stop] = rows


class Split(Buffer):
    """float32 as its nearest bfloat16 and the 16 bits that are missing."""

    kind = "split"
    stored: ClassVar[dict[str, torch.dtype]] = {".high": torch.bfloat16, ".low": torch.int16}

    def _take(self, rows: slice | Tensor, out: Tensor | None) -> Tensor:
        high = self.data[rows]
        out = _like(high) if out is None else out
        bits = out.view(torch.int32)
        bits.copy_(high.view(torch.int16)).bitwise_left_shift_(16)
        low = self._scratch("low half", *out.shape, dtype=torch.int32)
        bits.add_(low.copy_(self.rest[rows]))
        return out

    def write(self, start: int, stop: int, rows: Tensor) -> None:
        self.store(start, stop, rows.clone(), None)

    def store(self, start: int, stop: int, rows: Tensor, noise: Noise | None) -> None:
        bits = rows.view(torch.int32)
        # Cut to 16 bits and read as signed, the low half is what rounding to nearest leaves.
        self.rest[start:stop].copy_(bits)
        bits.add_(0x8000).bitwise_right_shift_(16)
        self.data[start:stop].view(torch.int16).copy_(bits)


class BFloat16(Buffer):
    """bfloat16 alone; updates survive in expectation, by stochastic rounding."""

    kind = "bf16"
    stored: ClassVar[dict[str, torch.dtype]] = {"": torch.bfloat16}
    dropped = BF16_DROPPED
    _round = staticmethod(round_to_bf16)

    def _take(self, rows: slice | Tensor, out: Tensor | None) -> Tensor:
        stored = self.data[rows]
        return stored.float() if out is None else out.copy_(stored)

    def write(self, start: int, stop: int, rows: Tensor) -> None:
        self.data[start:stop] = rows

    def store(self, start: int, stop: int, rows: Tensor, noise: Noise | None) -> None:
        assert noise is not None
        self._round(rows, noise.rows(start, stop), self._scratch)
        self.data[start:stop] = rows


class E4M3(BFloat16):
    """float8_e4m3fn alone; see `rounding.round_to_e4m3`."""

    kind = "e4m3"
    stored: ClassVar[dict[str, torch.dtype]] = {"": torch.float8_e4m3fn}
    dropped = E4M3_DROPPED
    _round = staticmethod(round_to_e4m3)

    def _take(self, rows: slice | Tensor, out: Tensor | None) -> Tensor:
        codes = self.data.view(torch.uint8)[rows].view(torch.float8_e4m3fn)
        out = _like(codes) if out is None else out
        # torch converts e4m3 one by one, which on a CPU takes a dozen times as long.
        if out.device.type == "cpu":
            from renee_ray.xfc.weights import cpu_rows  # numba takes a second to import

            cpu_rows.expand_e4m3(codes, out)
        elif has_kernels(out.device):
            from renee_ray.xfc.weights import gpu_rows  # triton is not on every machine

            gpu_rows.expand_e4m3(codes, out)
        else:
            out.copy_(codes)
        return out

    def write(self, start: int, stop: int, rows: Tensor) -> None:
        self.data[start:stop] = rows.clamp(-E4M3_MAX, E4M3_MAX)


def _like(rows: Tensor) -> Tensor:
    return torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
