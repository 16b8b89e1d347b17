"""The pages of docs/ that a reader can follow from beginning to end, run block by block."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.service.gateway import free_ports
from tests.test_site import NOT_RUN

DOCS = Path(__file__).resolve().parents[2] / "docs"


def printed_by(text: str, directory: Path, extra: dict[str, str]) -> str:
    """Runs all blocks of a page's text that are not marked, and returns what they print."""
    text = text.replace("8000", str(free_ports(1)[0]))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | extra | {"PATH": path}
    printed = ""
    for found in re.finditer(r"^```(sh|python)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if NOT_RUN.search(text[: found.start()]):
            continue
        interpreter = ["bash", "-euc"] if found[1] == "sh" else [sys.executable, "-c"]
        run = subprocess.run(
            [*interpreter, found[2]], cwd=directory, env=environment,
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert run.returncode == 0, (found[2], run.stderr)
        printed += run.stdout
    return printed


@pytest.mark.slow
def test_the_tutorial_runs_and_answers(tmp_path: Path, compiled_loops: dict[str, str]) -> None:
    """The transformer, whose figures come last and are not looked at, for one epoch."""
    text, command = (DOCS / "tutorial.md").read_text(encoding="utf-8"), "train quickstart"
    assert text.count(f"renee-ray {command} ") == 1
    printed = printed_by(text.replace(command, f"{command} epochs=1"), tmp_path, compiled_loops)
    assert "libemail-valid-loose-perl" in printed
    right = re.search(r"^│ P +│ +([\d.]+)", printed, re.MULTILINE)
    assert right and abs(float(right[1]) - 46) < 3
    assert printed.count("libjson-perl: module for") >= 2  # from Python and over HTTP
    assert '"predictions"' in printed


@pytest.mark.slow
def test_the_emoji_search_runs_and_answers(tmp_path: Path, compiled_loops: dict[str, str]) -> None:
    """With a small bag alone and one epoch, of which no quality is asked."""
    text = (DOCS / "emoji-search.md").read_text(encoding="utf-8")
    command = "renee-ray train emoji-search"
    bag = "encoder.name=none encoder.bag.dim=64 encoder.bag.buckets=4096"
    quick = f"{command} {bag} epochs=1 num_workers=1"
    assert text.count(f"{command} data=") == 1
    printed = printed_by(text.replace(command, quick), tmp_path, compiled_loops)
    assert "🎂\tbirthday cake\n" in printed
    found = re.search(r'^\{"step".*"predictions".*\}$', printed, re.MULTILINE)
    assert found, printed
    answers = json.loads(found[0])["predictions"]
    assert len(answers) == 1 and len(answers[0]) == 3
    names = (tmp_path / "EmojiSearch-1.5K" / "Y.txt").read_text(encoding="utf-8").splitlines()
    assert all(names[answer["label"]] == answer["text"] for answer in answers[0])
