"""A directory that a command fills: which of its files are ours, and whether all are there.

    _claim.json     names what is being written, from before the first file of it to after the last
    the manifest    names the same, and says that it is complete; written last

What is deleted is what one of these names, never what has a name like ours: a directory that holds
anything else is refused. A claim alone is what an interrupted command leaves, and the next one
begins anew. A manifest of an earlier renee_ray names no files; it stands for all of `names`.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.fs as pafs

from renee_ray.data.storage import (
    filesystem_of,
    listing,
    make_directory,
    read_file,
    remove,
    replace_file,
    write_file,
)
from renee_ray.data.untrusted import parse_json, refuse_links_out
from renee_ray.errors import ReneeError

CLAIM = "_claim.json"
MANIFEST_LIMIT = 1 << 27
"""Bytes of a claim or a manifest."""


@dataclass(frozen=True)
class Output:
    """The directory at `path`.

    what: "predictions", say, for people.
    manifests: name of the manifest, then those that it has had.
    keys: what a manifest of ours has, whatever its version.
    names: what a file of ours may be called, and with a `/` at its end a directory.
    folder: a directory in it that holds some of these files; empty: there is none.
    """

    path: str
    what: str
    manifests: tuple[str, ...]
    keys: frozenset[str]
    names: re.Pattern[str]
    folder: str = ""

    def check(self, overwrite: bool) -> None:
        """Raises ReneeError where it holds other files, or what must not be overwritten."""
        filesystem, root = filesystem_of(self.path)
        if filesystem.get_file_info(root).type == pafs.FileType.File:
            raise ReneeError(f"{self.path} is a file; give a directory")
        there = self._there()
        others = sorted(there - self._ours(there))
        if others:
            raise ReneeError(
                f"{self.path} holds other files ({others[0]!r:.80}); give an empty directory"
            )
        refuse_links_out(filesystem, root, self.path)
        if any(self._manifest(name) for name in self.manifests) and not overwrite:
            raise ReneeError(f"{self.path} holds {self.what} already; add overwrite=true")

    def claim(self, files: Sequence[str]) -> None:
        """Says that `files` are being written, and removes what is there, manifests first."""
        there = self._there()
        old = self._ours(there)
        self._write_claim({*files, *old})
        directories = {name for name in files if name.endswith("/")}
        for name in sorted(old - directories, key=lambda name: name not in self.manifests):
            if name != CLAIM:
                remove(f"{self._base}/{name}")

    def publish(self, content: dict[str, Any], files: Sequence[str]) -> None:
        """Writes the manifest: `content`, and that `files` are all there is."""
        said = json.dumps({**content, "files": files}, indent=1)
        replace_file(f"{self._base}/{self.manifests[0]}", said.encode())
        remove(f"{self._base}/{CLAIM}")

    @contextlib.contextmanager
    def scratch(self, name: str) -> Iterator[str]:
        """A directory in it for the time being: every node that can write here can read it."""
        path, claim = f"{self._base}/{name}", f"{self._base}/{CLAIM}"
        before = read_file(claim)
        self._write_claim({f"{name}/", *self._ours(self._there())})
        mine = read_file(claim)
        try:
            remove(path)
            yield path
        finally:
            remove(path)
            if read_file(claim) == mine:  # nothing has been written beside it
                remove(claim) if before is None else replace_file(claim, before)

    @property
    def _base(self) -> str:
        return self.path.rstrip("/")

    def _write_claim(self, names: set[str]) -> None:
        make_directory(self._base)
        kept = sorted(name for name in names if self.names.fullmatch(name))
        content = json.dumps({"files": kept}).encode()
        # The first not by way of a temporary file, which nothing would name yet. What is cut off
        # here is an empty file, which `_manifest` knows.
        write = write_file if self._manifest(CLAIM) is None else replace_file
        write(f"{self._base}/{CLAIM}", content)

    def _there(self) -> set[str]:
        """Names of the files, and of the directories that are not `folder`, with a `/`."""
        found = set()
        for info in listing(self.path):
            name = info.base_name
            if info.type != pafs.FileType.Directory:
                found.add(name)
            elif name != self.folder:
                found.add(f"{name}/")
            else:
                for each in listing(f"{self._base}/{name}"):
                    end = "/" if each.type == pafs.FileType.Directory else ""
                    found.add(f"{name}/{each.base_name}{end}")
        return found

    def _ours(self, there: set[str]) -> set[str]:
        """Those of the names `there` that a claim or a manifest names."""
        ours: set[str] = set()
        for file in (CLAIM, *self.manifests):
            content = self._manifest(file)
            if content is None:
                continue
            named = content.get("files", there)
            mine = set(map(str, named)) if isinstance(named, list | set) else set()
            temporary = {f"{each}.tmp" for each in (CLAIM, self.manifests[0])}
            ours |= {file, *temporary} & there
            ours |= {name for name in mine & there if self.names.fullmatch(name)}
        return ours

    def _manifest(self, name: str) -> dict[str, Any] | None:
        """A claim, or a manifest of ours; None where there is none."""
        content = read_file(f"{self._base}/{name}", MANIFEST_LIMIT)
        if content is None:
            return None
        if name == CLAIM and not content:
            return {"files": []}
        try:
            found = parse_json(content)
        except ValueError:
            return None
        keys = {"files"} if name == CLAIM else self.keys
        return found if isinstance(found, dict) and keys <= found.keys() else None
