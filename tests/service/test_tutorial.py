"""The pages of docs/ that a reader can follow from beginning to end, run block by block."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from renee_ray.cli.main import main
from tests.service.gateway import free_ports
from tests.test_site import NOT_RUN

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]
DOCS = Path(__file__).resolve().parents[2] / "docs"
COMMAND = re.compile(r"^renee-ray (.*[^&\\\n])$", re.MULTILINE)
"""A whole line, which does not run beside the next ones."""


@pytest.fixture
def printed_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], str]:
    """Runs all blocks of a page's text that are not marked, and returns what they print.

    Commands and Python run in this process, with its Ray. In those of their own, most of the time
    would go into imports and into a Ray for each; what serves is one.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")

    def run(text: str) -> str:
        text = text.replace("8000", str(free_ports(1)[0]))
        capsys.readouterr()
        printed = ""
        for found in re.finditer(r"^```(sh|python)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            if NOT_RUN.search(text[: found.start()]):
                continue
            if found[1] == "python":
                exec(found[2], {})
                printed += capsys.readouterr().out
                continue
            for number, piece in enumerate(COMMAND.split(found[2])):
                if number % 2:
                    status = main(shlex.split(piece))
                    said = capsys.readouterr()
                    assert status == 0, (piece, said.err)
                    printed += said.out
                elif piece.strip():
                    ended = subprocess.run(
                        ["bash", "-euc", piece], capture_output=True, text=True, timeout=600
                    )
                    assert ended.returncode == 0, (piece, ended.stderr)
                    printed += ended.stdout
        return printed

    return run


def test_the_tutorial_runs_and_answers(printed_by: Callable[[str], str]) -> None:
    printed = printed_by((DOCS / "tutorial.md").read_text(encoding="utf-8"))
    assert "libemail-valid-loose-perl" in printed
    right = re.search(r"^│ P +│ +([\d.]+)", printed, re.MULTILINE)
    assert right and abs(float(right[1]) - 46) < 3
    assert printed.count("libjson-perl: module for") >= 2  # from Python and over HTTP
    assert '"predictions"' in printed


def test_the_emoji_search_runs_and_answers(
    tmp_path: Path, printed_by: Callable[[str], str]
) -> None:
    """With a small bag alone and one epoch, of which no quality is asked."""
    text = (DOCS / "emoji-search.md").read_text(encoding="utf-8")
    command = "renee-ray train emoji-search"
    bag = "encoder.name=none encoder.bag.dim=64 encoder.bag.buckets=4096"
    quick = f"{command} {bag} epochs=1 num_workers=1"
    assert text.count(f"{command} data=") == 1
    printed = printed_by(text.replace(command, quick))
    assert "🎂\tbirthday cake\n" in printed
    found = re.search(r'^\{"step".*"predictions".*\}$', printed, re.MULTILINE)
    assert found, printed
    answers = json.loads(found[0])["predictions"]
    assert len(answers) == 1 and len(answers[0]) == 3
    names = (tmp_path / "EmojiSearch-1.5K" / "Y.txt").read_text(encoding="utf-8").splitlines()
    assert all(names[answer["label"]] == answer["text"] for answer in answers[0])
