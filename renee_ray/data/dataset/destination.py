"""The directory that a conversion writes to: which files in it are ours, and what becomes of them.

    dataset.json        names the parts of a dataset that is complete
    _converting.json    a conversion that is going on: the parts that are there or will be, its
                        directory of scratch files, and the source and settings that these are of

Only what one of the two names is ever removed or written over; all else is somebody's. So each
name is declared before the file is made, and a declaration goes after the files that it names:

    claim      _converting.json is written, then scratch files
    declare    names of old and new parts; dataset.json and the old parts go; then new parts alone
               are named, and written; then dataset.json
    release    scratch files go, then _converting.json

A conversion that is cut off anywhere in this leaves names of all that it left.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow.fs as pafs

from renee_ray.data import storage
from renee_ray.data.dataset.dataset import (
    MANIFEST,
    MANIFEST_LIMIT,
    SPLITS,
    Dataset,
    Manifest,
    is_part_path,
)
from renee_ray.data.untrusted import parse_json, refuse_links_out
from renee_ray.errors import ReneeError

CLAIM = "_converting.json"
SCRATCH = "_scratch"
TEMPORARY = (f"{MANIFEST}.tmp", f"{CLAIM}.tmp")
FILE, DIRECTORY, LINK = "file", "directory", "link"
MANIFEST_KEYS = {"format_version", "vocabulary_hash", "splits"}
"""Of a manifest of any version."""


@dataclass(frozen=True)
class Claim:
    """What `_converting.json` says."""

    signature: str
    """Hexadecimal digest of what the conversion depends on."""
    parts: tuple[str, ...]
    """Paths below the directory that are ours, whether they are there or not."""
    writing: bool
    """The parts are those of this conversion alone, and so is a dataset.json that is there."""
    stale: bool = False
    """Scratch files may be missing: nothing goes on from them."""


NOTHING = Claim("", (), writing=False)


class Destination:
    """The directory of one conversion.

    Raises:
        ReneeError: `path` is a file, holds a dataset and is not to be overwritten, overlaps with
            the source, or holds a file that neither declaration names: any, or with `overwrite`
            one whose place is needed.
    """

    def __init__(self, path: str, src: str, overwrite: bool) -> None:
        self.path, self.overwrite = path.rstrip("/"), overwrite
        self._located = storage.filesystem_of(path)
        refuse_overlap(src, path)
        filesystem, root = self._located
        there = storage.patiently(lambda: filesystem.get_file_info(root), f"reading {path}")
        if there.type == pafs.FileType.File:
            raise ReneeError(f"{path} is a file; give a directory for the dataset")
        refuse_links_out(filesystem, root, path)
        self._claim = self._read_claim()
        self._dataset = self._named_by_manifest()
        if self._claim is None or not self._claim.writing:
            self._refuse_dataset()
        self._refuse_foreign()

    @property
    def scratch(self) -> str:
        """The directory of scratch files, which every node that writes parts can read."""
        assert self._claim is not None
        return f"{self.path}/{SCRATCH}/{self._claim.signature[:16] or 'none'}"

    def claim(self, signature: str) -> bool:
        """Declares that a conversion is going on.

        Returns:
            whether it is one of the same signature that was cut off.

        Raises:
            ReneeError: another conversion has published a dataset, and was cut off after that.
        """
        found = self._claim
        if found is not None and found.signature == signature and not found.stale:
            return True
        self._refuse_dataset()
        if found is not None:
            self._remove_scratch()
        self._declare(Claim(signature, () if found is None else found.parts, writing=False))
        return False

    def published(self, signature: str) -> Manifest | None:
        """The manifest, where a conversion of this signature was cut off after its last part."""
        found = self._claim
        if found is None or not found.writing or found.signature != signature:
            return None
        return None if self._dataset is None else Dataset.without_check(self.path).manifest

    def declare(self, parts: Iterable[str]) -> None:
        """Makes way for `parts`: an earlier dataset is removed, unless they were declared before.

        Raises:
            ReneeError: a file has come that is not ours, in the place of one of them.
        """
        assert self._claim is not None
        if self._claim.writing:
            return
        self._refuse_foreign()
        old, new = {*self._claim.parts, *(self._dataset or ())}, set(parts)
        self._declare(replace(self._claim, parts=tuple(sorted(old | new))))
        self._remove([MANIFEST, *sorted(old)])
        self._dataset = None
        for split in SPLITS:
            storage.make_directory(f"{self.path}/{split}")
        self._declare(replace(self._claim, parts=tuple(sorted(new)), writing=True))

    def release(self) -> None:
        """Removes what only a conversion that is going on needs."""
        self._remove_scratch()
        self._remove([*TEMPORARY, CLAIM])

    def abandon(self) -> None:
        """Removes all that the conversion has made, but not a dataset that it did not touch."""
        self._remove_scratch()
        assert self._claim is not None
        named = self._named_by_manifest() or frozenset()
        self._remove(sorted({*self._claim.parts} - named))
        self._remove([*TEMPORARY, CLAIM])

    def _remove(self, names: Iterable[str]) -> None:
        for name in names:
            storage.remove(f"{self.path}/{name}")

    def _remove_scratch(self) -> None:
        assert self._claim is not None
        self._declare(replace(self._claim, stale=True))
        storage.remove(self.scratch)
        if not storage.listing(f"{self.path}/{SCRATCH}"):
            storage.remove(f"{self.path}/{SCRATCH}")

    # ------------------------------------------------------------------------- declarations

    def _declare(self, claim: Claim) -> None:
        content = json.dumps(asdict(claim), indent=1).encode()
        if self._claim is None:
            storage.make_directory(self.path)
            # Not by way of a temporary file, which nothing would declare yet. What is cut off
            # here is an empty file, which `_read_claim` knows.
            storage.write_file(f"{self.path}/{CLAIM}", content)
        else:
            storage.replace_file(f"{self.path}/{CLAIM}", content)
        self._claim = claim

    def _content(self, name: str) -> bytes | None:
        """What a declaration holds, if it is a file."""
        return storage.read_file(f"{self.path}/{name}", MANIFEST_LIMIT)

    def _read_claim(self) -> Claim | None:
        content = self._content(CLAIM)
        if content == b"":
            return NOTHING
        found = _object(content)
        if found is None or found.keys() != asdict(NOTHING).keys():
            return None
        signature, parts = found["signature"], found["parts"]
        flags = found["writing"], found["stale"]
        if (
            not isinstance(signature, str)
            or not re.fullmatch("[0-9a-f]*", signature)
            or not isinstance(parts, list)
            or not all(map(is_part_path, parts))
            or not all(isinstance(flag, bool) for flag in flags)
        ):
            return None
        return Claim(signature, tuple(parts), *flags)

    def _named_by_manifest(self) -> frozenset[str] | None:
        """The parts that a manifest of ours names, of whatever version; None: there is none."""
        found = _object(self._content(MANIFEST))
        if found is None or not found.keys() >= MANIFEST_KEYS:
            return None
        splits = found["splits"]
        listed = list(splits.values()) if isinstance(splits, dict) else [None]
        paths = set[str]()
        for parts in listed:
            if not isinstance(parts, list):
                return None
            for part in parts:
                path = part.get("path") if isinstance(part, dict) else None
                if not is_part_path(path):
                    return None
                paths.add(path)
        return frozenset(paths)

    # ------------------------------------------------------------------------------ refusals

    def _refuse_dataset(self) -> None:
        if self._dataset is not None and not self.overwrite:
            raise ReneeError(
                f"{self.path} already holds a dataset; give another directory or overwrite=true"
            )

    def _refuse_foreign(self) -> None:
        for name in self._foreign():
            if _needed(name):
                raise ReneeError(
                    f"{self.path}/{name} is in the way: no manifest of a dataset or of a "
                    f"conversion names it; move it, or give another directory"
                )
            if not self.overwrite:
                raise ReneeError(
                    f"{self.path} exists already and holds other things ({name!r:.200}); give "
                    f"another directory or overwrite=true, which leaves them alone"
                )

    def _foreign(self) -> Iterator[str]:
        """Paths of what nothing of ours names, in the directory and in those of the parts."""
        ours = {*(self._dataset or ())}
        directories = {*SPLITS}
        if self._dataset is not None:
            ours.add(MANIFEST)
        if self._claim is not None:
            ours |= {CLAIM, *TEMPORARY, *self._claim.parts}
            ours.add(self.scratch.removeprefix(f"{self.path}/"))
            directories.add(SCRATCH)
        for name, kind in self._entries(""):
            if name in directories and kind == DIRECTORY:
                expected = DIRECTORY if name == SCRATCH else FILE
                for inside, kind in self._entries(name):
                    if f"{name}/{inside}" not in ours or kind != expected:
                        yield f"{name}/{inside}"
            elif name not in ours or kind != FILE:
                yield name

    def _entries(self, name: str) -> list[tuple[str, str]]:
        """(name, kind) of what is in the directory, or in one that is in it."""
        filesystem, root = self._located
        path = f"{root}/{name}"
        if not isinstance(filesystem, pafs.LocalFileSystem):
            infos = storage.listing(f"{self.path}/{name}".rstrip("/"))
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


def _needed(name: str) -> bool:
    """Whether a conversion would write a file of this name, or read it as its own."""
    return name in (MANIFEST, CLAIM, SCRATCH, *TEMPORARY, *SPLITS) or is_part_path(name)


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
            f"{src} and {dst} are the same, or one is in the other, links followed; give a "
            f"directory of its own for the dataset"
        )
