"""How the numbers of a shard lie in memory.

Ledger, for n labels and dimension D on one rank; bytes a number:

    Float32     data    [n, D] float32         4
    Split       high    [n, D] bfloat16        4   the number rounded to bf16: what matmuls read
                low     [n, D] int16               float32 bits of the number minus those of `high`
    BFloat16    data    [n, D] bfloat16        2   rounded stochastically
    Half        half    [n, D] float16         6   the master rounded: what matmuls read
                master  [n, D] float32
    E4M3        data    [n, D] float8_e4m3fn   1   rounded stochastically, saturating at +-448

`Split` loses nothing: bits(w) = (bits(high) << 16) + low, exactly, because rounding to the
nearest bf16 leaves a remainder that fits a signed 16-bit integer. So the master weight is
fp32 at four bytes, and bf16 matmuls need no converted copy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

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
    dropped: bits of the noise that `store` rounds with; 0: it rounds to nearest, or not at all.
    aliased: whether `read` gives the buffer itself.
    """

    kind = ""
    dropped = 0
    aliased = False

    @abstractmethod
    def __init__(self, rows: int, dim: int, device: torch.device, scratch: Scratch) -> None: ...

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Returns the stored tensors, each [n, D], by suffix of their name in a checkpoint."""

    @abstractmethod
    def read(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Returns rows [start, stop) as float32: the buffer itself, or `out`, or a new tensor.

        out: may be bfloat16 where it holds every number that the buffer can store.
        """

    @abstractmethod
    def pick(self, rows: Tensor) -> Tensor:
        """Returns the rows int64 [m], as a new float32 tensor [m, D]."""

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
        return None


class Single(Buffer):
    """Numbers of one dtype in a single tensor, `data`."""

    dtype: torch.dtype

    def __init__(self, rows: int, dim: int, device: torch.device, scratch: Scratch) -> None:
        self.data = torch.zeros(rows, dim, dtype=self.dtype, device=device)
        self._scratch = scratch

    def tensors(self) -> dict[str, Tensor]:
        return {"": self.data}

    def operand(self, start: int, stop: int, dtype: torch.dtype) -> Tensor | None:
        return self.data[start:stop] if dtype == self.dtype else None


class Float32(Single):
    """Plain float32."""

    kind = "fp32"
    dtype = torch.float32
    aliased = True

    def read(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        return self.data[start:stop]

    def pick(self, rows: Tensor) -> Tensor:
        return self.data.index_select(0, rows)

    def write(self, start: int, stop: int, rows: Tensor) -> None:
        if rows.data_ptr() != self.data[start:stop].data_ptr():
            self.data[start:stop] = rows


class Split(Buffer):
    """float32 as its nearest bfloat16 and the 16 bits that are missing."""

    kind = "split"

    def __init__(self, rows: int, dim: int, device: torch.device, scratch: Scratch) -> None:
        self.high = torch.zeros(rows, dim, dtype=torch.bfloat16, device=device)
        self.low = torch.zeros(rows, dim, dtype=torch.int16, device=device)
        self._scratch = scratch

    def tensors(self) -> dict[str, Tensor]:
        return {".high": self.high, ".low": self.low}

    def read(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        out = _like(self.high[start:stop]) if out is None else out
        bits = out.view(torch.int32)
        bits.copy_(self.high[start:stop].view(torch.int16)).bitwise_left_shift_(16)
        low = self._scratch("low half", *out.shape, dtype=torch.int32)
        bits.add_(low.copy_(self.low[start:stop]))
        return out

    def pick(self, rows: Tensor) -> Tensor:
        bits = self.high.index_select(0, rows).view(torch.int16).int().bitwise_left_shift_(16)
        return bits.add_(self.low.index_select(0, rows)).view(torch.float32)

    def write(self, start: int, stop: int, rows: Tensor) -> None:
        self.store(start, stop, _like(rows).copy_(rows), None)

    def store(self, start: int, stop: int, rows: Tensor, noise: Noise | None) -> None:
        bits = rows.view(torch.int32)
        # Cut to 16 bits and read as signed, the low half is what rounding to nearest leaves.
        self.low[start:stop].copy_(bits)
        bits.add_(0x8000).bitwise_right_shift_(16)
        self.high[start:stop].view(torch.int16).copy_(bits)

    def operand(self, start: int, stop: int, dtype: torch.dtype) -> Tensor | None:
        return self.high[start:stop] if dtype == torch.bfloat16 else None


class BFloat16(Single):
    """bfloat16 alone; updates survive in expectation, by stochastic rounding."""

    kind = "bf16"
    dtype = torch.bfloat16
    dropped = BF16_DROPPED

    def read(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        out = _like(self.data[start:stop]) if out is None else out
        return out.copy_(self.data[start:stop])

    def pick(self, rows: Tensor) -> Tensor:
        return self.data.index_select(0, rows).float()

    def write(self, start: int, stop: int, rows: Tensor) -> None:
        self.data[start:stop] = rows

    def store(self, start: int, stop: int, rows: Tensor, noise: Noise | None) -> None:
        assert noise is not None
        round_to_bf16(rows, noise.rows(start, stop), self._scratch)
        self.data[start:stop] = rows


class Half(Buffer):
    """A float32 master and its float16 copy, for matmuls in float16."""

    kind = "half"
    aliased = True

    def __init__(self, rows: int, dim: int, device: torch.device, scratch: Scratch) -> None:
        self.half = torch.zeros(rows, dim, dtype=torch.float16, device=device)
        self.master = torch.zeros(rows, dim, dtype=torch.float32, device=device)

    def tensors(self) -> dict[str, Tensor]:
        return {".half": self.half, ".master": self.master}

    def read(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        return self.master[start:stop]

    def pick(self, rows: Tensor) -> Tensor:
        return self.master.index_select(0, rows)

    def write(self, start: int, stop: int, rows: Tensor) -> None:
        if rows.data_ptr() != self.master[start:stop].data_ptr():
            self.master[start:stop] = rows
        self.half[start:stop] = rows

    def operand(self, start: int, stop: int, dtype: torch.dtype) -> Tensor | None:
        return self.half[start:stop] if dtype == torch.float16 else None


class E4M3(Single):
    """float8_e4m3fn alone; see `rounding.round_to_e4m3`."""

    kind = "e4m3"
    dtype = torch.float8_e4m3fn
    dropped = E4M3_DROPPED

    def read(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        return self._expanded(self.data[start:stop], out)

    def pick(self, rows: Tensor) -> Tensor:
        codes = self.data.view(torch.uint8).index_select(0, rows)
        return self._expanded(codes.view(torch.float8_e4m3fn), None)

    def _expanded(self, codes: Tensor, out: Tensor | None) -> Tensor:
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

    def store(self, start: int, stop: int, rows: Tensor, noise: Noise | None) -> None:
        assert noise is not None
        round_to_e4m3(rows, noise.rows(start, stop), self._scratch)
        self.data[start:stop] = rows


def _like(rows: Tensor) -> Tensor:
    return torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
