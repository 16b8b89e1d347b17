"""The embeddings of a frozen transformer, each computed once.

They lie in a file without a name in the directory for temporary files (TMPDIR), which ends with
the process: 4 H bytes for each text that this rank has met, and some 100 bytes of memory.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from renee_ray.data.split import splitmix64
from renee_ray.errors import ReneeError, reason


class Remembered:
    """Looks up rows of tokens by a hash of 64 bits of them; computes those that are new."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self._places: dict[int, int] = {}
        self._size = 0

    def __call__(
        self, ids: Tensor, mask: Tensor, embed: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Returns embed(ids, mask): float32 [b, H] for ids, mask int64 [b, T]; without graph.

        Raises:
            ReneeError: the file cannot be written.
        """
        keys, new = _hashes(ids, mask), []
        for row, key in enumerate(keys):
            if key not in self._places:
                self._places[key] = len(self._places)
                new.append(row)
        if new:
            every = len(new) == len(keys)
            with torch.no_grad():
                self._write(embed(ids, mask) if every else embed(ids[new], mask[new]))
        places = (self._places[key] * self._size for key in keys)
        raw = b"".join(os.pread(self._file.fileno(), self._size, place) for place in places)
        rows = torch.frombuffer(bytearray(raw), dtype=torch.float32)
        return rows.view(len(keys), -1).to(ids.device)

    def _write(self, rows: Tensor) -> None:
        self._size = 4 * rows.shape[1]
        try:
            self._file.write(rows.cpu().numpy().tobytes())
            self._file.flush()
        except OSError as error:
            raise ReneeError(
                f"{tempfile.gettempdir()} cannot hold the embeddings of encoder.frozen, "
                f"{self._size} bytes a text ({reason(error)}); set TMPDIR to a larger directory"
            ) from None


def _hashes(ids: Tensor, mask: Tensor) -> list[int]:
    tokens = ids.cpu().numpy().astype(np.uint64) << np.uint64(20)
    mixed = splitmix64(tokens + np.arange(ids.shape[1], dtype=np.uint64))
    hashes: list[int] = (mixed * mask.cpu().numpy().astype(np.uint64)).sum(1).tolist()
    return hashes
