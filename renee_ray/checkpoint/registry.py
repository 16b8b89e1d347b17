"""All checkpoints of a run: chooses the newest and the best, and deletes the others."""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow.fs as pafs
from torch import Tensor

from renee_ray.checkpoint.state import (
    REVISED,
    Checkpoint,
    CheckpointError,
    Manifest,
    file_sizes,
    manifest_name,
)
from renee_ray.checkpoint.tensor_file import Copy, FileFacts, write
from renee_ray.data.storage import filesystem_of, patiently, replace_on, to_disk

DIRECTORY = "checkpoints"
NAME = re.compile(r"step-(\d{9,})-([0-9a-f]{8})")


@dataclass(frozen=True)
class Found:
    """A directory with a manifest. problem: why it cannot be used, or None.

    revision: the newest of its labels.
    """

    name: str
    revision: int
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
        directory, _, revision = name.partition("@")
        if not NAME.fullmatch(directory) or not re.fullmatch(r"\d{0,4}", revision, re.ASCII):
            raise CheckpointError(f"{name!r} is no name of a checkpoint of {self.run}")
        return Checkpoint(self.filesystem, f"{self.root}/{directory}", int(revision or 0))

    def found(self) -> Iterator[Found]:
        """Yields every committed checkpoint, the newest first, with sizes compared.

        A later revision of the labels is newer, whatever its step.
        """
        committed = (
            (max(revisions), step, name)
            for step, name in self._directories()
            if (revisions := self._revisions(name))
        )
        for revision, step, directory in sorted(committed, reverse=True):
            name = f"{directory}@{revision}" if revision else directory
            checkpoint = None
            try:
                checkpoint = self.at(name)
                checkpoint.check_sizes()
                yield Found(name, revision, step, checkpoint, None)
            except CheckpointError as error:
                yield Found(name, revision, step, checkpoint, str(error))

    def newest(self, *, but: Collection[str] = ()) -> Checkpoint | None:
        """Returns the newest whole checkpoint but some; None where nothing else was committed.

        Only those of the newest revision count.

        Raises:
            CheckpointError: there are checkpoints, and none is whole.
        """
        return _usable(self.found(), but)

    def best(self, metric: str) -> Checkpoint | None:
        """Returns the earliest of the highest `metric`; the newest where none has it.

        Only those of the newest revision count. The one before the first step counts if there is no
        other, since untrained weights may get as many of a few validation points right.
        """
        return _best(list(self.found()), metric)

    def write(self, name: str, tensors: Mapping[str, Tensor | Copy]) -> FileFacts:
        """Writes a file of a checkpoint, which becomes one by its manifest."""
        filesystem, path = self.filesystem, f"{self.root}/{name}"

        def once() -> FileFacts:
            filesystem.create_dir(path.rpartition("/")[0], recursive=True)
            try:
                with filesystem.open_output_stream(path) as sink:
                    facts = write(sink, tensors)
                to_disk(filesystem, path)
            except OSError:
                with suppress(OSError):  # a full disk has room again for what matters more
                    filesystem.delete_file(path)
                raise
            return facts

        return patiently(once, f"writing {path}")

    def lacking(self, directory: str, files: Mapping[str, FileFacts]) -> list[str]:
        """Returns the files of a directory that this process does not see as they were written."""
        sizes = file_sizes(self.filesystem, f"{self.root}/{directory}")
        return [name for name, facts in files.items() if sizes.get(name) != facts.bytes]

    def publish(self, directory: str, manifest: Manifest) -> None:
        """Writes the manifest of a checkpoint, or of its next revision, whole or not at all."""
        path = f"{self.root}/{directory}/{manifest_name(manifest.state.revision)}"
        content = manifest.to_json().encode()
        patiently(
            lambda: replace_on(self.filesystem, path, content, durable=True), f"writing {path}"
        )

    def revise(
        self, checkpoint: Checkpoint, facts: dict[str, Any], new: Mapping[str, Mapping[str, Tensor]]
    ) -> Checkpoint:
        """Publishes the next revision of a checkpoint, which keeps all of its files.

        The manifest comes last, so the revision before it is the run's until this one is whole.

        Args:
            facts: what changes in its state's facts; new: tensors of more files, by name.
        """
        directory = checkpoint.name.partition("@")[0]
        files = {name: self.write(f"{directory}/{name}", new[name]) for name in new}
        revision, earlier = checkpoint.revision + 1, checkpoint.manifest
        facts = {**checkpoint.state.facts, **facts, "revision": revision}
        state, metrics = replace(checkpoint.state, facts=facts), earlier.metrics
        if not np.array_equal(state.retired, checkpoint.state.retired):
            state.best, metrics = {}, {}  # of other labels: none later could be compared with them
        manifest = Manifest(state, metrics, earlier.files | files, time.time())
        self.publish(directory, manifest)
        return self.at(f"{directory}@{revision}")

    def prune(self, keep: int, metric: str, step: int) -> None:
        """Deletes uncommitted checkpoints, and all but the newest `keep` whole ones and the best.

        Of steps up to `step`, which has just been committed. Later ones are left: they may be being
        written, or be damaged ones that a run did not go on from.
        """
        whole = [each for each in self.found() if not each.problem and each.step <= step]
        if not whole:
            return
        best = _best(whole, metric)
        kept = {each.name.partition("@")[0] for each in whole[:keep]}
        kept |= {best.name.partition("@")[0]} if best else set()
        for at, name in self._directories():
            if name not in kept and at <= step:
                self.delete(name)

    def clear_uncommitted(self) -> None:
        """Deletes what killed writers left. A writer that lives on loses its own only."""
        for _, name in self._directories():
            if not self._revisions(name):
                self.delete(name)

    def _directories(self) -> list[tuple[int, str]]:
        selector = pafs.FileSelector(self.root, allow_not_found=True)
        listed = patiently(
            lambda: self.filesystem.get_file_info(selector), f"listing {self.run}/{DIRECTORY}"
        )
        names = (NAME.fullmatch(info.base_name) for info in listed)
        return [(int(match[1]), match[0]) for match in names if match]

    def _revisions(self, name: str) -> list[int]:
        """Returns the revisions of a directory that have a manifest; none: it is not committed."""
        path = f"{self.root}/{name}"
        selector = pafs.FileSelector(path, allow_not_found=True)
        listed = patiently(lambda: self.filesystem.get_file_info(selector), f"listing {path}")
        names = (REVISED.fullmatch(info.base_name) for info in listed)
        return [int(match[1] or 0) for match in names if match]

    def delete(self, name: str) -> None:
        """Deletes manifests first, so that half of a checkpoint never looks like one."""
        path = f"{self.root}/{name}"

        def delete() -> None:
            for revision in self._revisions(name):
                self.filesystem.delete_file(f"{path}/{manifest_name(revision)}")
            if self.filesystem.get_file_info(path).type == pafs.FileType.Directory:
                self.filesystem.delete_dir(path)

        patiently(delete, f"deleting {path}")


def place_of_best(found: Sequence[tuple[int, int, float | None, bool]]) -> int | None:
    """Finds the best of (revision, step, metric if it has it, whether it is whole).

    found: the newest first. Returns its place, as `Checkpoints.best` chooses, or None.
    """
    whole = [i for i, each in enumerate(found) if each[3] and each[0] == found[0][0]]
    trained = [i for i in whole if found[i][1] > 0] or whole
    scored = [(value, -found[i][1], i) for i in trained if (value := found[i][2]) is not None]
    if scored:
        return max(scored, key=lambda one: one[:2])[2]
    return whole[0] if whole else None


def _best(found: list[Found], metric: str) -> Checkpoint | None:
    facts = [
        (each.revision, each.step, metrics.get(metric), not each.problem)
        for each in found
        for metrics in [each.checkpoint.manifest.metrics if each.checkpoint else {}]
    ]
    place = place_of_best(facts)
    return _usable(iter(found)) if place is None else found[place].checkpoint


def _usable(found: Iterator[Found], but: Collection[str] = ()) -> Checkpoint | None:
    problem = newest = None
    for each in found:
        newest = each.revision if newest is None else newest
        if each.revision != newest:
            break  # it would show labels again that were retired
        if each.name in but:
            continue
        if each.problem is None:
            return each.checkpoint
        problem = problem or each.problem
    if problem:
        raise CheckpointError(problem)
    return None
