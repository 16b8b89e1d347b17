"""The directory that a command writes to: whether it is ours, and what becomes of its files.

Two files say that a directory is ours:

    manifest    dataset.json, _predictions.json, export.json: it holds a complete result
    claim       _converting.json, _claim.json: a command is running, or was killed

With a claim, files with the names of ours are removed and written over; with a manifest alone, only
those that it names. All others are the user's, and one in a place of ours is refused. A command
that is killed anywhere leaves one of the two: the claim comes before all other files and goes last,
the manifest goes before the files that it is of and comes after them.

A claim holds the token of its command. The next command takes over what another has left, by a
claim of its own. A command that finds its claim gone in `declare`, `hold` or `publish` ends there,
and removes nothing.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pyarrow.fs as pafs

from renee_ray.data import storage
from renee_ray.data.untrusted import object_or_empty
from renee_ray.errors import ReneeError

SCRATCH = "_scratch"


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
    beside_others: bool = False
    """Whether overwrite=true writes into a directory that holds other files too."""

    def needs(self, path: str) -> bool:
        """Whether a command would write a file at `path`, or read it as its own."""
        own = (self.manifest, self.claim, *self.temporary, *self.folders)
        return path in own or self.files.fullmatch(path) is not None

    @property
    def temporary(self) -> tuple[str, ...]:
        """Paths of what is there only while a command is running, beside its claim."""
        return SCRATCH, f"{self.manifest}.tmp", f"{self.claim}.tmp"


@dataclass(frozen=True)
class Destination:
    """The directory `path` of one result. Holds no state: the declarations in it are the state.

    overwrite: whether an earlier result of this kind may be replaced.
    token: tells this command's claim from another's; copies in its workers have the same.
    """

    path: str
    kind: Kind
    overwrite: bool
    token: str = field(default_factory=lambda: secrets.token_hex(8))

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", self.path.rstrip("/") or "/")

    def check(self) -> None:
        """Refuses a directory that must not be written to.

        Raises:
            ReneeError: `path` is a file, holds a result that is not to be overwritten, a file in a
                place of ours that is none of ours or, unless `overwrite` allows it, any other file.
        """
        filesystem, root = storage.filesystem_of(self.path)
        there = storage.patiently(lambda: filesystem.get_file_info(root), f"reading {self.path}")
        if there.type == pafs.FileType.File:
            raise ReneeError(f"{self.path} is a file; give a directory for {self.kind.name}")
        claim = self._claimed()
        if claim is None or not claim.get("writing"):
            self._refuse_complete()
        ours = self._named() if claim is None else None
        for path in self._paths():
            needed = self.kind.needs(path)
            if needed and ours is not None and path not in ours:
                raise ReneeError(
                    f"{self.path}/{path} is in the way, and no {self.kind.manifest} of renee_ray "
                    f"beside it names it; move it, or give another directory"
                )
            if not needed and not (self.overwrite and self.kind.beside_others):
                hint = " or overwrite=true, which leaves them alone" * self.kind.beside_others
                raise ReneeError(
                    f"{self.path} holds other files ({path!r:.200}); give another directory{hint}"
                )

    def claim(self, signature: str = "") -> bool:
        """Declares that a command is running. `check` has been called.

        Args:
            signature: hash of what the result depends on; empty: nothing goes on from it.

        Returns:
            whether it goes on with one of the same signature that was cut off.

        Raises:
            ReneeError: another command has published its result, and was cut off after that.
        """
        found = self._claimed()
        if found and signature and found.get("signature") == signature:
            self._write_claim(signature, writing=bool(found.get("writing")))
            return True
        self._refuse_complete()
        if found is not None:
            if signature and found.get("writing") and not self._is_complete():
                self._remove(self._files())  # of another source; without a signature they may stay
            # Its scratch files are about to be incomplete: nothing may go on from them.
            self._write_claim("")
            storage.remove(f"{self.path}/{SCRATCH}")
        self._write_claim(signature)
        return False

    def scratch(self) -> str:
        """The directory of scratch files, which every node that writes files can read."""
        return f"{self.path}/{SCRATCH}"

    def is_published(self, signature: str) -> bool:
        """Whether a command of this signature was cut off after it had written the manifest.

        Its claim is this command's then.
        """
        claim = self._claimed() or {}
        writing = claim.get("signature") == signature and bool(claim.get("writing"))
        if found := writing and self._is_complete():
            self._write_claim(signature, writing=True)
        return found

    def hold(self) -> dict[str, Any]:
        """Returns this command's claim, which another node may see late.

        Raises:
            ReneeError: it is gone, or another command's.
        """
        claim = storage.awaited(self._own_claim)
        if claim is None:
            raise ReneeError(
                f"{self.path}/{self.kind.claim} is gone, or another command's, which has written "
                f"to {self.path} meanwhile; give this one again, with another directory"
            )
        return claim

    def declare(self, files: Iterable[str], *, keep: bool = False) -> None:
        """Makes way for `files`: an earlier result is removed, unless they were declared before.

        keep: leaves those of its files that have the name of a new one.

        Raises:
            ReneeError: as `hold`.
        """
        claim, new = self.hold(), {*files}
        if claim.get("writing"):
            return
        self._remove([self.kind.manifest, *(p for p in self._files() if not (keep and p in new))])
        for folder in sorted({path.rpartition("/")[0] for path in new} - {""}):
            storage.make_directory(f"{self.path}/{folder}")
        self._write_claim(claim.get("signature", ""), writing=True)

    def publish(self, content: dict[str, Any]) -> None:
        """Writes a manifest of `content` and of the files that are there, and releases.

        Raises:
            ReneeError: as `hold`.
        """
        self.hold()
        text = json.dumps({**content, "files": self._files()}, indent=1)
        storage.replace_file(f"{self.path}/{self.kind.manifest}", text.encode())
        self.release()

    def release(self) -> None:
        """Removes what is needed only while this command is running."""
        if self._own_claim() is not None:
            self._remove([*self.kind.temporary, self.kind.claim])

    def abandon(self) -> None:
        """Removes all that the command has made, but not a result that it did not touch."""
        if self.is_writing() and not self._is_complete():
            self._remove(self._files())
        self.release()

    def is_writing(self) -> bool:
        """Whether this command has declared its files, so that some may be there."""
        return bool((self._own_claim() or {}).get("writing"))

    def _remove(self, paths: Iterable[str]) -> None:
        for path in paths:
            storage.remove(f"{self.path}/{path}")

    def _claimed(self) -> dict[str, Any] | None:
        """What the claim says, as `_write_claim` has it if it is whole; None: there is none."""
        content = storage.read_file(f"{self.path}/{self.kind.claim}")
        return None if content is None else object_or_empty(content)

    def _own_claim(self) -> dict[str, Any] | None:
        claim = self._claimed()
        return claim if claim and claim.get("token") == self.token else None

    def _write_claim(self, signature: str, *, writing: bool = False) -> None:
        storage.make_directory(self.path)
        path = f"{self.path}/{self.kind.claim}"
        content = {"signature": signature, "writing": writing, "token": self.token}
        if self._claimed() is not None:  # cut off here, the former is there still
            storage.replace_file(path, json.dumps(content).encode())
        else:  # and here an empty file, which is a claim too
            storage.write_file(path, json.dumps(content).encode())

    def _is_complete(self) -> bool:
        return self._manifest() is not None

    def _manifest(self) -> dict[str, Any] | None:
        """What the manifest says if it is one of ours, of whatever version."""
        content = storage.read_file(f"{self.path}/{self.kind.manifest}")
        found = {} if content is None else object_or_empty(content)
        return found if self.kind.keys <= found.keys() else None

    def _named(self) -> set[str] | None:
        """The manifest and what it names; nothing if there is none.

        None: it is of a version that names no files, so all that have names of ours are ours.
        """
        manifest = self._manifest()
        if manifest is None:
            return set()
        named = {self.kind.manifest}
        waiting = [manifest.get("files", manifest.get("splits"))]  # where a dataset's parts are
        if waiting == [None]:
            return None
        while waiting:
            each = waiting.pop()
            if isinstance(each, dict | list):
                waiting += each.values() if isinstance(each, dict) else each
            elif isinstance(each, str):
                named.add(each)
        return named

    def _refuse_complete(self) -> None:
        if not self.overwrite and self._is_complete():
            raise ReneeError(
                f"{self.path} already holds {self.kind.name}; give another directory or "
                f"overwrite=true"
            )

    def _files(self) -> list[str]:
        """Paths of the files that have names of ours."""
        return [path for path in self._paths() if self.kind.files.fullmatch(path)]

    def _paths(self) -> list[str]:
        """Paths of what is in the directory and in `kind.folders`, without these."""
        paths = []
        for info in storage.listing(self.path):
            name = info.base_name
            if info.type == pafs.FileType.Directory and name in self.kind.folders:
                inside = storage.listing(f"{self.path}/{name}")
                paths += [f"{name}/{each.base_name}" for each in inside]
            else:
                paths.append(name)
        return sorted(paths)


def refuse_overlap(src: str, dst: str) -> None:
    """Raises ReneeError where what is read would lie in what is written, or the other way."""
    if storage.overlap(src, dst):
        raise ReneeError(
            f"{src} and {dst} are the same, or one is in the other, links followed; give another "
            f"destination"
        )
