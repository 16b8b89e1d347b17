"""What the tests of hostile input share: a directory of canaries, and what must hold after a case.

Whoever runs a case puts what is hostile into `given`; `outside` lies beside it and has what must
not be read, written or run: a secret, a file that its execution would make, a whole dataset.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from renee_ray.cli.main import main
from renee_ray.errors import ReneeError

Made = list[str] | Callable[[], object]
"""Arguments of `renee-ray`, or a call that raises ReneeError."""
SECRET = "canary-9b1c-secret"
LONGEST = 800
"""Characters of a sentence."""


class Place:
    """The directories of a case."""

    def __init__(self, path: Path) -> None:
        self.path, self.given, self.outside = path, path / "given", path / "outside"
        self.given.mkdir()
        self.outside.mkdir()
        self.secret = self.outside / "secret.txt"
        self.secret.write_text(SECRET)
        self.executed = self.outside / "executed"

    def command(self) -> str:
        """A shell command that shows that it was executed."""
        return f"touch {self.executed}"

    def snapshot(self, directory: Path) -> dict[str, str]:
        """A hash of every file and link below a directory."""
        return {
            str(path.relative_to(directory)): os.readlink(path)
            if path.is_symlink()
            else hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(directory.rglob("*"))
            if path.is_symlink() or path.is_file()
        }


@dataclass(frozen=True)
class Case:
    """One hostile case: its name in docs/security.md, how it is made, and what it says.

    make: puts the case into `given` and returns what is to be done with it.
    sentence: a pattern.
    """

    name: str
    make: Callable[[Place], Made]
    sentence: str


class Canary:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


def _age(path: Path) -> None:
    """Makes a read of the file show in its access time, where the filesystem keeps one."""
    stat = path.stat()
    os.utime(path, ns=(stat.st_mtime_ns - 10**9, stat.st_mtime_ns))


def refused(case: Case, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """The case ends with one clear sentence, and nothing else has happened."""
    what = case.make(place)
    before = place.snapshot(place.path)
    files = [path for path in place.outside.rglob("*") if path.is_file()]
    for path in files:
        _age(path)
    times = [path.stat().st_atime_ns for path in files]
    capsys.readouterr()
    if isinstance(what, list):
        assert main(what) == 1
        captured = capsys.readouterr()
        out, sentence = captured.out, captured.err
        assert sentence.startswith("renee-ray: ") and sentence.count("\n") == 1
        sentence = sentence.removesuffix("\n")
    else:
        with pytest.raises(ReneeError) as caught:
            what()
        out, sentence = "", str(caught.value)
    assert out == ""
    assert re.search(case.sentence, sentence), sentence
    assert len(sentence) < LONGEST + len(str(place.path)) * 2
    assert sentence.isprintable() and "Traceback" not in sentence
    assert SECRET not in sentence
    assert [path.stat().st_atime_ns for path in files] == times, "something outside was read"
    assert place.snapshot(place.path) == before
