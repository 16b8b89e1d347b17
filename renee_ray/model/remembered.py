"""The embeddings of a frozen transformer, each computed once.

They lie in a file without a name in the directory for temporary files (TMPDIR), which ends with
the process. On each rank it holds 4 H bytes for every training point, whichever rank embedded it,
and for every other text that this rank has met; a text takes some 100 bytes of memory besides.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from renee_ray.data.split import splitmix64
from renee_ray.errors import ReneeError, reason
from renee_ray.rank.batch import Batch
from renee_ray.rank.collectives import gather_rows, row_counts
from renee_ray.rank.rounds import Rounds


class Remembered:
    """Looks up rows of tokens by a hash of 64 bits of them, and embeds those that are new.

    Args:
        embed: ids, mask int64 [b, T] -> float32 [b, H].
    """

    def __init__(self, embed: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._embed = embed
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self._places: dict[int, int] = {}
        self._size = 0

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Returns embed(ids, mask), without graph.

        Raises:
            ReneeError: the file cannot be written.
        """
        keys = _hashes(ids, mask)
        new = [row for row, key in enumerate(keys) if key not in self._places]
        if new:
            every = len(new) == len(keys)
            with torch.no_grad():
                rows = self._embed(ids, mask) if every else self._embed(ids[new], mask[new])
            self._add([keys[row] for row in new], rows)
        places = (self._places[key] * self._size for key in keys)
        raw = b"".join(os.pread(self._file.fileno(), self._size, place) for place in places)
        found = torch.frombuffer(bytearray(raw), dtype=torch.float32)
        return found.view(len(keys), -1).to(ids.device)

    def embed_all(self, points: Iterable[Batch], device: torch.device, rounds: Rounds) -> None:
        """Embeds all training points, each on one rank, for all ranks; a collective.

        points: this rank's, once; every rank draws equally many batches.
        """
        for batch in points:
            ids, mask, *_ = batch.tokens(device)
            own, keys = self(ids, mask), torch.tensor(_hashes(ids, mask), device=device)
            counts = row_counts(rounds.ranks, len(batch))
            everyone = gather_rows(rounds.ranks, own[: len(batch)], counts)
            of_all = gather_rows(rounds.ranks, keys[: len(batch), None], counts)
            self._add(of_all[:, 0].tolist(), everyone)
            rounds.add(len(batch))
        rounds.finish()

    def _add(self, keys: list[int], rows: Tensor) -> None:
        self._size = 4 * rows.shape[1]
        try:
            for key, row in zip(keys, rows.cpu().numpy(), strict=True):
                if key not in self._places:
                    self._places[key] = len(self._places)
                    self._file.write(row.tobytes())
            self._file.flush()
        except OSError as error:
            raise ReneeError(
                f"{tempfile.gettempdir()} cannot hold the embeddings of encoder.frozen, "
                f"{self._size} bytes a text ({reason(error)}); set TMPDIR to a larger directory"
            ) from None


def _hashes(ids: Tensor, mask: Tensor) -> list[int]:
    tokens: np.ndarray = ids.cpu().numpy().astype(np.uint64) << np.uint64(20)
    mixed = splitmix64(tokens | np.arange(ids.shape[1], dtype=np.uint64))
    hashes = (mixed * mask.cpu().numpy().astype(np.uint64)).sum(1)
    found: list[int] = hashes.view(np.int64).tolist()
    return found
