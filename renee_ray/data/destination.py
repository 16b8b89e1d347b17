"""The directory that a command writes to: which of its files are ours, and what becomes of them.

Two files say which files below a directory are ours:

    manifest    dataset.json, _predictions.json, export.json: the files of a complete result
    claim       _converting.json, _claim.json: the files that are there or will be, while a command
                is running or after it was killed

Only what one of them names is ever removed or written over; all else is somebody's. The invariant
is: a file of ours is named from before it is made until after it is gone.

    claim      the claim is written, before anything else; then scratch files may be
    declare    the claim names old and new files; the manifest, then the old files are removed;
               the claim names the new files alone; then these may be written, then the manifest
    release    scratch files are removed, then the claim

A command that is killed anywhere in this leaves names of all that it left. While the claim does
not say `writing`, a manifest is that of an earlier result, which overwrite=true alone replaces.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import pyarrow.fs as pafs
from pydantic import FailFast, Field, TypeAdapter, ValidationError

from renee_ray.data import storage
from renee_ray.data.untrusted import parse_json, refuse_links_out
from renee_ray.errors import ReneeError

DECLARATION_LIMIT = 1 << 27
"""Bytes of a manifest or a claim."""
SCRATCH = "_scratch"
FILE, DIRECTORY, LINK = "file", "directory", "link"


@dataclass(frozen=True)
class Kind:
    """What a command writes."""

    name: str
    """"a dataset", say, for people."""
    manifest: str
    claim: str
    keys: frozenset[str]
    """Keys that every manifest of this kind has, whatever its version."""
    files: re.Pattern[str]
    """Paths below the directory that a file of ours may have."""
    folders: tuple[str, ...]
    """Directories that hold such files."""
    named: Callable[[dict[str, Any]], list[Any]]
    """Takes a manifest, returns the paths of the files that it names."""
    beside_others: bool = False
    """Whether overwrite=true writes into a directory that holds other files too."""

    @property
    def temporary(self) -> tuple[str, str]:
        """Names that `storage.replace_file` uses on the way."""
        return f"{self.manifest}.tmp", f"{self.claim}.tmp"

    def needs(self, path: str) -> bool:
        """Whether a command would write a file at `path`, or read it as its own."""
        own = (self.manifest, self.claim, SCRATCH, *self.temporary, *self.folders)
        return path in own or self.files.fullmatch(path) is not None


def listed_files(manifest: dict[str, Any]) -> list[Any]:
    """The files of a manifest that lists them."""
    files: list[Any] = manifest["files"]
    return files


@dataclass(frozen=True)
class Claim:
    """What a claim says."""

    files: Annotated[tuple[str, ...], FailFast()] = ()
    """Paths below the directory that are ours, whether they are there or not."""
    signature: Annotated[str, Field(pattern="^[0-9a-f]*$")] = ""
    """Hexadecimal digest of what the result depends on; empty: nothing goes on from it."""
    writing: Annotated[bool, Field(strict=True)] = False
    """The files are those of this command alone, and so is a manifest that is there."""
    stale: Annotated[bool, Field(strict=True)] = False
    """Scratch files may be missing: nothing goes on from them."""


_CLAIM = TypeAdapter(Claim)


@dataclass(frozen=True)
class Destination:
    """The directory `path` of one result. Holds no state: the declarations in it are the state.

    overwrite: whether an earlier result of this kind may be replaced.
    """

    path: str
    kind: Kind
    overwrite: bool

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", self.path.rstrip("/") or "/")

    def check(self) -> None:
        """Refuses a directory that must not be written to.

        Raises:
            ReneeError: `path` is a file, holds a result that is not to be overwritten, a link out
                of it, or a file that neither declaration names: any, or where `overwrite` allows
                others beside the result, one whose place is needed.
        """
        filesystem, root = storage.filesystem_of(self.path)
        there = storage.patiently(lambda: filesystem.get_file_info(root), f"reading {self.path}")
        if there.type == pafs.FileType.File:
            raise ReneeError(f"{self.path} is a file; give a directory for {self.kind.name}")
        refuse_links_out(filesystem, root, self.path)
        claim = self._read_claim()
        if claim is None or not claim.writing:
            self._refuse_complete()
        self._refuse_others()

    def claim(self, signature: str = "") -> bool:
        """Declares that a command is running. `check` has been called.

        Returns:
            whether it goes on with one of the same signature that was cut off.

        Raises:
            ReneeError: another command has published its result, and was cut off after that.
        """
        found = self._read_claim()
        if found is not None and signature and found.signature == signature and not found.stale:
            return True
        self._refuse_complete()
        if found is not None:
            self._remove_scratch(found)
        self._write_claim(Claim(found.files if found else (), signature))
        return False

    def scratch(self, signature: str = "") -> str:
        """The directory of scratch files, which every node that writes files can read."""
        return f"{self._base}/{SCRATCH}/{signature[:16] or 'none'}"

    def is_published(self, signature: str) -> bool:
        """Whether a command of this signature was cut off after it had written the manifest."""
        claim = self._read_claim()
        if claim is None or not claim.writing or claim.signature != signature:
            return False
        return self._published() is not None

    def declare(self, files: Iterable[str], *, keep: bool = False) -> None:
        """Makes way for `files`: an earlier result is removed, unless they were declared before.

        keep: leaves those of its files that have the name of a new one.

        Raises:
            ReneeError: a file has come that is not ours, in the place of one of them.
        """
        claim = self._read_claim() or Claim()
        if claim.writing:
            return
        self._refuse_others()
        old = {*claim.files, *(self._published() or ())}
        new = {path for path in files if self.kind.files.fullmatch(path)}
        self._write_claim(replace(claim, files=tuple(sorted(old | new))))
        self._remove([self.kind.manifest, *sorted(old - new if keep else old)])
        for folder in sorted({file.rpartition("/")[0] for file in new} & {*self.kind.folders}):
            storage.make_directory(f"{self._base}/{folder}")
        self._write_claim(replace(claim, files=tuple(sorted(new)), writing=True))

    def publish(self, content: dict[str, Any]) -> None:
        """Writes a manifest of `content` and of the files that were declared, and releases.

        Raises:
            ReneeError: the claim is gone.
        """
        claim = self._read_claim()
        if claim is None:
            raise ReneeError(
                f"{self.path}/{self.kind.claim} is gone: another command has written to "
                f"{self.path} meanwhile; give this one again, with another directory"
            )
        text = json.dumps({**content, "files": claim.files}, indent=1)
        storage.replace_file(f"{self._base}/{self.kind.manifest}", text.encode())
        self.release()

    def release(self) -> None:
        """Removes what is needed only while a command is running."""
        if (claim := self._read_claim()) is not None:
            self._remove_scratch(claim)
            self._remove([*self.kind.temporary, self.kind.claim])

    def abandon(self) -> None:
        """Removes all that the command has made, but not a result that it did not touch."""
        if (claim := self._read_claim()) is not None:
            self._remove_scratch(claim)
            self._remove(sorted({*claim.files} - (self._published() or frozenset())))
            self._remove([*self.kind.temporary, self.kind.claim])

    @property
    def _base(self) -> str:
        return self.path.rstrip("/")

    def _remove(self, paths: Iterable[str]) -> None:
        for path in paths:
            storage.remove(f"{self._base}/{path}")

    def _remove_scratch(self, claim: Claim) -> None:
        self._write_claim(replace(claim, stale=True))
        storage.remove(self.scratch(claim.signature))
        if not storage.listing(f"{self._base}/{SCRATCH}"):
            storage.remove(f"{self._base}/{SCRATCH}")

    # ------------------------------------------------------------------------- declarations

    def _write_claim(self, claim: Claim) -> None:
        content = json.dumps(asdict(claim), indent=1).encode()
        path = f"{self._base}/{self.kind.claim}"
        if self._read_claim() is None:
            storage.make_directory(self._base)
            # Not by way of a temporary file, which nothing would declare yet. What is cut off
            # here is an empty file, which `_read_claim` knows.
            storage.write_file(path, content)
        else:
            storage.replace_file(path, content)

    def _read_claim(self) -> Claim | None:
        content = storage.read_file(f"{self._base}/{self.kind.claim}", DECLARATION_LIMIT)
        if content == b"":
            return Claim()
        found = _object(content)
        if found is None or "files" not in found:
            return None
        try:
            claim = _CLAIM.validate_python(found)
        except ValidationError:
            return None
        return claim if all(map(self.kind.files.fullmatch, claim.files)) else None

    def _published(self) -> frozenset[str] | None:
        """The files that a manifest of ours names, of whatever version; None: there is none."""
        path = f"{self._base}/{self.kind.manifest}"
        found = _object(storage.read_file(path, DECLARATION_LIMIT))
        if found is None or not self.kind.keys <= found.keys():
            return None
        try:
            files = frozenset(self.kind.named(found))
            return files if all(map(self.kind.files.fullmatch, files)) else None
        except (LookupError, TypeError, AttributeError):
            return None

    # ------------------------------------------------------------------------------ refusals

    def _refuse_complete(self) -> None:
        if not self.overwrite and self._published() is not None:
            raise ReneeError(
                f"{self.path} already holds {self.kind.name}; give another directory or "
                f"overwrite=true"
            )

    def _refuse_others(self) -> None:
        for path in self._others():
            if self.kind.needs(path):
                raise ReneeError(
                    f"{self.path}/{path} is in the way: no manifest or claim of renee_ray names "
                    f"it; move it, or give another directory"
                )
            if not (self.overwrite and self.kind.beside_others):
                hint = " or overwrite=true, which leaves them alone" * self.kind.beside_others
                raise ReneeError(
                    f"{self.path} holds other files ({path!r:.200}); give another directory{hint}"
                )

    def _others(self) -> Iterator[str]:
        """Paths of what nothing of ours names, in the directory and in `kind.folders`."""
        published, claim = self._published(), self._read_claim()
        ours = {*(published or ())}
        folders = {*self.kind.folders}
        if published is not None:
            ours.add(self.kind.manifest)
        if claim is not None:
            ours |= {self.kind.claim, *self.kind.temporary, *claim.files}
            ours.add(self.scratch(claim.signature).removeprefix(f"{self._base}/"))
            folders.add(SCRATCH)
        for name, kind in self._entries(""):
            if name in folders and kind == DIRECTORY:
                expected = DIRECTORY if name == SCRATCH else FILE
                for inside, kind in self._entries(name):
                    if f"{name}/{inside}" not in ours or kind != expected:
                        yield f"{name}/{inside}"
            elif name not in ours or kind != FILE:
                yield name

    def _entries(self, name: str) -> list[tuple[str, str]]:
        """(name, kind) of what is in the directory, or in one that is in it."""
        filesystem, root = storage.filesystem_of(self.path)
        path = f"{root}/{name}"
        if not isinstance(filesystem, pafs.LocalFileSystem):
            infos = storage.listing(f"{self._base}/{name}".rstrip("/"))
            directory = pafs.FileType.Directory
            return sorted((i.base_name, DIRECTORY if i.type == directory else FILE) for i in infos)
        if not os.path.isdir(path):
            return []
        with os.scandir(path) as found:  # pyarrow does not list a link that leads nowhere
            return sorted((entry.name, _kind(entry)) for entry in found)


def _kind(entry: os.DirEntry[str]) -> str:
    if entry.is_symlink():
        return LINK
    return DIRECTORY if entry.is_dir() else FILE


def _object(content: bytes | None) -> dict[str, Any] | None:
    try:
        found = None if content is None else parse_json(content)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def refuse_overlap(src: str, dst: str) -> None:
    """Raises ReneeError where what is read would lie in what is written, or the other way."""
    if storage.overlap(src, dst):
        raise ReneeError(
            f"{src} and {dst} are the same, or one is in the other, links followed; give another "
            f"destination"
        )
