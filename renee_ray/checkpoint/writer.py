"""Writes checkpoints beside training.

    save      copies the tensors to memory that is kept for this, and returns
    thread    writes this rank's files straight to storage, with checksums
              receipts: all ranks exchange what they have written, in a group of their own, as
              JSON: {file: [bytes, CRC-32]}, or null from a rank that could not write
              rank 0, if all could write: publishes the manifest, then deletes old checkpoints
    save      of the next checkpoint waits for the thread first

Invariant: a directory has a manifest only while all of its files are whole. So the manifest is
published last and deleted first.

Training stands still for the copy alone. The copy needs as much host memory as the shard. Where
one rank lacks it, all ranks write their files before `save` returns, which is logged once.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from renee_ray.checkpoint.registry import Checkpoints
from renee_ray.checkpoint.state import (
    ENCODER,
    MOMENTS,
    OPTIMIZER,
    Manifest,
    State,
    moments_of,
    shard_name,
)
from renee_ray.checkpoint.tensor_file import Copy, FileFacts
from renee_ray.data.storage import PATIENCE_S, awaited, usual_patience
from renee_ray.errors import reason
from renee_ray.machine import available_bytes
from renee_ray.model.adapters import trained_state
from renee_ray.model.encoder import Encoder, dense_parameters
from renee_ray.rank.collectives import Ranks, all_sum, gather_bytes
from renee_ray.xfc.shard import Shard

log = logging.getLogger(__name__)

SHARE_OF_MEMORY = 0.8
"""Share of the free memory that the copies of all ranks of this machine may take."""
Files = Mapping[str, Mapping[str, Tensor | Copy]]


def commit_timeout() -> timedelta:
    """Returns how long a rank waits for the others' files.

    Longer than the retries of a rank's two or three files may take. A run with less patience does
    not shorten it, since large files take their time in a store that answers, too.
    """
    return 4 * timedelta(seconds=max(PATIENCE_S, usual_patience()))


@dataclass(frozen=True)
class Written:
    """Costs of one checkpoint on this rank."""

    step: int
    bytes: int
    seconds: float
    committed: bool


@dataclass
class CheckpointWriter:
    """Writes the checkpoints of one rank. All ranks call `start`, `reserve` and `save` alike.

    keep, metric: arguments of `Checkpoints.prune`.
    background: whether to write beside training.
    on_written: is called after each checkpoint, in the thread that writes.
    before_commit: is called there before each commit, on rank 0.
    averages: of the encoder's weights, saved beside the moments (training/averages.py).
    """

    checkpoints: Checkpoints
    ranks: Ranks
    keep: int
    metric: str
    background: bool = True
    on_written: Callable[[Written], None] = lambda written: None
    before_commit: Callable[[], None] = lambda: None
    averages: Mapping[str, Tensor] = field(default_factory=dict)
    _copies: dict[str, Copy] = field(default_factory=dict)
    _reserved: bool = False
    _thread: threading.Thread | None = None
    _committed: bool = True
    _token: str = ""
    _broken: str = ""
    _group: dist.ProcessGroup | None = None

    def start(self) -> CheckpointWriter:
        """Agrees with the other ranks on a name and a group; rank 0 clears what a run left."""
        if self.ranks.rank == 0:
            self._clean_up(self.checkpoints.clear_uncommitted)
        self._token = gather_bytes(self.ranks, secrets.token_hex(4).encode())[0].decode()
        if self.ranks.num_ranks > 1:
            self._group = dist.new_group(backend="gloo", timeout=commit_timeout())
        return self

    def reserve(self, encoder: Encoder, shard: Shard) -> None:
        """Takes the memory of the copies before training, since first use is slower than a copy.

        The ranks write beside training if each of them has that memory.
        """
        if self._reserved or not self.background:
            return
        self._reserved = True
        tensors = shard.weights.tensors()
        alone: list[Tensor] = []
        if self.ranks.rank == 0:
            alone = [*trained_state(encoder).values(), *len(MOMENTS) * dense_parameters(encoder)]
            alone += self.averages.values()
        self.background = self._all_have(
            sum(map(Copy.bytes_like, tensors.values())), sum(map(Copy.bytes_like, alone))
        )
        if self.background and len(shard.owned):
            name = shard_name(shard.owned.start, shard.owned.stop)
            for key, tensor in tensors.items():
                self._copy(f"{name} {key}", tensor)

    def save(
        self,
        state: State,
        encoder: Encoder,
        optimizer: torch.optim.Optimizer,
        shard: Shard,
        metrics: dict[str, float],
    ) -> None:
        """Starts a checkpoint; waits for the one before it."""
        self.wait()
        self.reserve(encoder, shard)
        started = time.perf_counter()
        files: Files = (own := self._files(encoder, optimizer, shard))
        name = f"step-{state.step:09d}-{self._token}"
        if self.background:
            files = {
                file: {key: self._copy(f"{file} {key}", t) for key, t in tensors.items()}
                for file, tensors in own.items()
            }
        manifest = Manifest(copy.deepcopy(state), dict(metrics), {}, time.time())

        def run() -> None:
            self._committed = self._write(name, files, manifest)
            seconds = time.perf_counter() - started
            size = sum(t.nbytes for tensors in files.values() for t in tensors.values())
            step = manifest.state.step  # that of `state` is later by now
            self.on_written(Written(step, size, seconds, self._committed))

        self._committed = False
        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()
        if not self.background:
            self.wait()

    def wait(self) -> bool:
        """Waits for the checkpoint in progress; returns whether the last one was committed.

        Raises:
            RuntimeError: the ranks could not exchange their receipts, and gloo has given their
                group up: no checkpoint would be committed any more, so the workers must start anew.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._broken:
            raise RuntimeError(f"checkpoints cannot go on: {self._broken}")
        return self._committed

    def _files(
        self, encoder: Encoder, optimizer: torch.optim.Optimizer, shard: Shard
    ) -> dict[str, dict[str, Tensor]]:
        files: dict[str, dict[str, Tensor]] = {}
        if len(shard.owned):
            files[shard_name(shard.owned.start, shard.owned.stop)] = shard.weights.tensors()
        if self.ranks.rank == 0:
            files[ENCODER] = {key: t.contiguous() for key, t in trained_state(encoder).items()}
            files[OPTIMIZER] = {**moments_of(encoder, optimizer), **self.averages}
        return files

    def _copy(self, key: str, tensor: Tensor) -> Copy:
        kept = self._copies.get(key)
        if kept is None or kept.shape != tensor.shape:
            kept = self._copies[key] = Copy.like(tensor)
        return kept.take(tensor)

    def _all_have(self, shard: int, alone: int) -> bool:
        """Whether every rank has memory for its copies and those of its machine's other ranks.

        shard: bytes of its shard, which are about those of any rank; alone: bytes of other tensors.
        """
        beside = int(os.environ.get("LOCAL_WORLD_SIZE", self.ranks.num_ranks))
        needed = shard * beside + alone
        lacking = needed > SHARE_OF_MEMORY * available_bytes()
        if lacking:
            log.warning(
                "rank %d has no memory for a copy of %.1f GB: training waits while checkpoints "
                "are written; checkpoint.background=false says so from the start",
                self.ranks.rank, (shard + alone) / 1e9,
            )  # fmt: skip
        return not bool(all_sum(self.ranks, torch.tensor(int(lacking))))

    def _write(self, name: str, files: Files, manifest: Manifest) -> bool:
        """Writes this rank's files; returns on every rank whether the checkpoint is committed."""
        own: dict[str, FileFacts] | None = {}
        try:
            own = {file: self.checkpoints.write(f"{name}/{file}", files[file]) for file in files}
        except Exception as error:  # whatever it is, the others wait for this rank's receipt
            own = None
            log.warning(
                "rank %d cannot write checkpoint %s (%s): it is left out, training goes on",
                self.ranks.rank, name, reason(error),
            )  # fmt: skip
        committed = False
        try:
            everyone = self._exchanged(own and {file: astuple(own[file]) for file in own})
            if self.ranks.rank == 0:
                if None not in everyone:
                    named = {file: each[file] for each in everyone for file in each}
                    whole = {file: FileFacts(*facts) for file, facts in named.items()}
                    committed = self._commit(name, whole, manifest)
                if not committed:
                    self._clean_up(lambda: self.checkpoints.delete(name))
            return bool(self._exchanged(committed)[0])
        except RuntimeError as error:  # a peer died: this worker is about to be stopped too
            log.warning("whether checkpoint %s is committed is not known: %s", name, reason(error))
            self._broken = reason(error)
            if self.ranks.rank == 0 and not committed:
                self._clean_up(lambda: self.checkpoints.delete(name))
            return False

    def _exchanged(self, own: Any) -> list[Any]:
        """Returns what every rank gives, in rank order, by way of JSON."""
        given = gather_bytes(self.ranks, json.dumps(own).encode(), self._group)
        return [json.loads(each) for each in given]

    def _commit(self, name: str, files: dict[str, FileFacts], manifest: Manifest) -> bool:
        """Publishes the manifest, then deletes old checkpoints; rank 0 alone."""
        self.before_commit()
        whole = Manifest(manifest.state, manifest.metrics, files, time.time())
        try:
            if not awaited(lambda: not self.checkpoints.lacking(name, files)):
                lacking = ", ".join(self.checkpoints.lacking(name, files))
                raise OSError(
                    f"rank 0 does not see what others wrote: {lacking}; all nodes must share the "
                    f"same directory"
                )
            self.checkpoints.publish(name, whole)
        except Exception as error:  # storage has its own, and the others wait for this rank
            log.warning("checkpoint %s is not committed (%s)", name, reason(error))
            return False
        self._clean_up(lambda: self.checkpoints.prune(self.keep, self.metric, manifest.state.step))
        return True

    def _clean_up(self, delete: Callable[[], None]) -> None:
        """Makes room. What cannot be deleted now is deleted after the next checkpoint."""
        try:
            delete()
        except Exception as error:
            log.warning("old checkpoints of %s remain (%s)", self.checkpoints.run, reason(error))
