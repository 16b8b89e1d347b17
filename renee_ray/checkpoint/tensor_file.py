"""Tensors in a safetensors file with checksums, read in ranges of rows.

    8 bytes      length of the header
    header       JSON: name -> dtype, shape, offsets; `__metadata__` has, for each tensor, the
                 CRC-32 of every BLOCK bytes of it, so that a part is verified without the rest
    tensors      raw, one after the other

Any safetensors reader reads it. The header's own CRC-32 is kept by whoever names the file.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow.fs as pafs
import torch
from torch import Tensor

BLOCK = 1 << 20
"""Bytes that share a checksum, the smallest unit of reading."""
STRIDE = 16 * BLOCK
"""Bytes that are in memory at a time."""
PIECE = 64 * STRIDE
"""Bytes of a piece of a copy. Pinned memory comes in powers of two, so that a shard of 17 GiB in
one piece would take 32."""
SUMS = "crc32"
DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Damaged(ValueError):
    """A file that is not what its checksums or its header say."""


@dataclass(frozen=True)
class FileFacts:
    """What a manifest says of a file. header_crc32: of its length and header."""

    bytes: int
    header_crc32: int


@dataclass(frozen=True)
class Copy:
    """A tensor's bytes in pieces uint8, all of PIECE bytes but the last."""

    dtype: torch.dtype
    shape: torch.Size
    pieces: list[Tensor]

    @classmethod
    def like(cls, tensor: Tensor) -> Copy:
        """Takes host memory for a copy; pinned for a GPU, whose copies then run at bus speed."""
        sizes = [min(PIECE, tensor.nbytes - start) for start in range(0, tensor.nbytes, PIECE)]
        pieces = [torch.empty(size, dtype=torch.uint8, pin_memory=tensor.is_cuda) for size in sizes]
        return cls(tensor.dtype, tensor.shape, pieces)

    @property
    def nbytes(self) -> int:
        return sum(map(len, self.pieces))

    @classmethod
    def bytes_like(cls, tensor: Tensor) -> int:
        """Returns the bytes of memory that `like` takes."""
        whole, rest = divmod(tensor.nbytes, PIECE)
        if tensor.is_cuda and rest:
            rest = 1 << (rest - 1).bit_length()
        return whole * PIECE + rest

    def take(self, tensor: Tensor) -> Copy:
        """Copies a contiguous tensor of this dtype and shape."""
        parts = _bytes_of(tensor).split(PIECE)
        for piece, part in zip(self.pieces, parts, strict=False):  # an empty one has no piece
            piece.copy_(part)
        return self


def write(sink: BinaryIO, tensors: Mapping[str, Tensor | Copy]) -> FileFacts:
    """Writes `tensors`, which are contiguous; those on a GPU pass through memory in strides."""
    entries: dict[str, Any] = {}
    sums: dict[str, str] = {}
    offset = 0
    for name, tensor in tensors.items():
        size = tensor.nbytes
        entries[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        sums[name] = "".join(f"{zlib.crc32(block):08x}" for block in _parts(tensor, BLOCK))
        offset += size
    entries["__metadata__"] = {f"{SUMS} {name}": value for name, value in sums.items()}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    sink.write(header)
    for tensor in tensors.values():
        for part in _parts(tensor, STRIDE):
            sink.write(part)
    return FileFacts(len(header) + offset, zlib.crc32(header))


def _parts(tensor: Tensor | Copy, size: int) -> Iterator[memoryview]:
    for flat in _flat(tensor):
        for start in range(0, len(flat), size):
            yield flat[start : start + size].cpu().numpy().data


def _flat(tensor: Tensor | Copy) -> list[Tensor]:
    return tensor.pieces if isinstance(tensor, Copy) else [_bytes_of(tensor)]


def _bytes_of(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor, uint8 [bytes]."""
    return tensor.detach().view(-1).view(torch.uint8)


class TensorFile:
    """An open file, whose header is read and verified.

    Raises:
        Damaged: a header that is cut, too long, or not the one of `facts`.
    """

    def __init__(self, file: pafs.NativeFile, facts: FileFacts) -> None:
        self._file = file
        length = file.read_at(8, 0)
        size = int.from_bytes(length, "little")
        if len(length) < 8 or size > facts.bytes:
            raise Damaged("its header is cut or too long")
        text = file.read_at(size, 8)
        if zlib.crc32(length + text) != facts.header_crc32:
            raise Damaged("its header does not match its checksum")
        self._entries = json.loads(text)
        sums = self._entries.pop("__metadata__")
        self._sums = {name: bytes.fromhex(sums[f"{SUMS} {name}"]) for name in self._entries}
        self._begin = 8 + size

    def shapes(self) -> dict[str, tuple[torch.dtype, list[int]]]:
        """Returns (dtype, shape) of each tensor."""
        return {
            name: (DTYPES[entry["dtype"]], entry["shape"]) for name, entry in self._entries.items()
        }

    def tensors(self, *names: str) -> dict[str, Tensor]:
        """Reads and verifies these of the tensors, or all."""
        tensors = {}
        for name, (dtype, shape) in self.shapes().items():
            if names and name not in names:
                continue
            tensors[name] = torch.empty(shape, dtype=dtype)
            self.read_into(name, tensors[name])
        return tensors

    def read_into(self, name: str, out: Tensor, first: int = 0) -> None:
        """Fills the contiguous `out` with the bytes of a tensor from its byte `first` on.

        Raises:
            Damaged: the file is cut, or a block is not what its checksum says.
        """
        target, stop = _bytes_of(out), first + out.numel() * out.element_size()
        for start, raw in self._blocks(name, first, stop):
            low, high = max(start, first), min(start + len(raw), stop)
            part = torch.from_numpy(np.frombuffer(raw, np.uint8)[low - start : high - start].copy())
            target[low - first : high - first].copy_(part)

    def verify(self) -> None:
        """Reads the whole file.

        Raises:
            Damaged: as in read_into.
        """
        for name, entry in self._entries.items():
            start, stop = entry["data_offsets"]
            for _ in self._blocks(name, 0, stop - start):
                pass

    def _blocks(self, name: str, first: int, stop: int) -> Iterator[tuple[int, bytes]]:
        """Yields (first byte in the tensor, bytes) of the blocks around [first, stop), verified."""
        begin, end = self._entries[name]["data_offsets"]
        sums = self._sums[name]
        stop = min(-(-stop // BLOCK) * BLOCK, end - begin)
        for start in range(first // BLOCK * BLOCK, stop, STRIDE):
            size = min(STRIDE, stop - start)
            raw = self._file.read_at(size, self._begin + begin + start)
            if len(raw) != size:
                raise Damaged("it is cut")
            for offset in range(0, size, BLOCK):
                at = (start + offset) // BLOCK * 4
                block = memoryview(raw)[offset : offset + BLOCK]
                if zlib.crc32(block) != int.from_bytes(sums[at : at + 4], "big"):
                    raise Damaged(f"{name} does not match its checksum at byte {start + offset}")
            yield start, raw
