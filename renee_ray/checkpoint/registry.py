"""All checkpoints of a run: chooses the newest and the best, and deletes the others."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import pyarrow.fs as pafs

from renee_ray.checkpoint.state import MANIFEST, Checkpoint, CheckpointError
from renee_ray.data.storage import filesystem_of, patiently

DIRECTORY = "checkpoints"
NAME = re.compile(r"step-(\d{9,})-([0-9a-f]{8})")


@dataclass(frozen=True)
class Found:
    """A directory with a manifest. problem: why it cannot be used, or None."""

    name: str
    step: int
    checkpoint: Checkpoint | None
    problem: str | None


class Checkpoints:
    """The checkpoints of the run at `run`, a local path or URL.

    Manifests and whole files alone decide: neither the order of a listing nor times of modification
    play a part.
    """

    def __init__(self, run: str) -> None:
        self.run = run
        self.filesystem, root = filesystem_of(run)
        self.root = f"{root.rstrip('/')}/{DIRECTORY}"

    def at(self, name: str) -> Checkpoint:
        """Raises CheckpointError: `name` is no name of a checkpoint, or it cannot be read."""
        if not NAME.fullmatch(name):
            raise CheckpointError(f"{name!r} is no name of a checkpoint of {self.run}")
        return Checkpoint(self.filesystem, f"{self.root}/{name}")

    def found(self, *, but: Collection[str] = ()) -> Iterator[Found]:
        """Yields every committed checkpoint but some, the newest first, with sizes compared."""
        for step, name in sorted(self._directories(), reverse=True):
            if name in but or not self._is_committed(name):
                continue
            checkpoint = None
            try:
                checkpoint = self.at(name)
                checkpoint.check_sizes()
                yield Found(name, step, checkpoint, None)
            except CheckpointError as error:
                yield Found(name, step, checkpoint, str(error))

    def newest(self, *, but: Collection[str] = ()) -> Checkpoint | None:
        """Returns the newest whole checkpoint; None where nothing was ever committed.

        Raises:
            CheckpointError: there are checkpoints, and none is whole.
        """
        return _usable(self.found(but=but))

    def best(self, metric: str) -> Checkpoint | None:
        """Returns the earliest of the highest `metric`; the newest where none has it."""
        return _best(list(self.found()), metric)

    def prune(self, keep: int, metric: str) -> None:
        """Deletes uncommitted checkpoints, and all but the newest `keep` whole ones and the best.

        Directories of steps after the newest are left: they may be being written.
        """
        whole = [each for each in self.found() if not each.problem]
        if not whole:
            return
        best = _best(whole, metric)
        kept = {each.name for each in whole[:keep]} | ({best.name} if best else set())
        for step, name in self._directories():
            if name not in kept and step <= whole[0].step:
                self.delete(name)

    def clear_uncommitted(self) -> None:
        """Deletes what killed writers left. A writer that lives on loses its own only."""
        for _, name in self._directories():
            if not self._is_committed(name):
                self.delete(name)

    def _directories(self) -> list[tuple[int, str]]:
        selector = pafs.FileSelector(self.root, allow_not_found=True)
        listed = patiently(
            lambda: self.filesystem.get_file_info(selector), f"listing {self.run}/{DIRECTORY}"
        )
        names = (NAME.fullmatch(info.base_name) for info in listed)
        return [(int(match[1]), match[0]) for match in names if match]

    def _is_committed(self, name: str) -> bool:
        path = f"{self.root}/{name}/{MANIFEST}"
        info = patiently(lambda: self.filesystem.get_file_info(path), f"reading {path}")
        return info.type == pafs.FileType.File

    def delete(self, name: str) -> None:
        """Deletes the manifest first, so that half of a checkpoint never looks like one."""
        path = f"{self.root}/{name}"

        def delete() -> None:
            if self._is_committed(name):
                self.filesystem.delete_file(f"{path}/{MANIFEST}")
            if self.filesystem.get_file_info(path).type == pafs.FileType.Directory:
                self.filesystem.delete_dir(path)

        patiently(delete, f"deleting {path}")


def _best(found: list[Found], metric: str) -> Checkpoint | None:
    scored = [
        (each.checkpoint.manifest.metrics[metric], -each.step, each.checkpoint)
        for each in found
        if each.checkpoint and not each.problem and metric in each.checkpoint.manifest.metrics
    ]
    if scored:
        return max(scored, key=lambda one: one[:2])[2]
    return _usable(iter(found))


def _usable(found: Iterator[Found]) -> Checkpoint | None:
    problem = None
    for each in found:
        if each.problem is None:
            return each.checkpoint
        problem = problem or each.problem
    if problem:
        raise CheckpointError(problem)
    return None
