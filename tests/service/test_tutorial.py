"""The tutorial of docs/, run block by block as a reader would."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_site import NOT_RUN

TUTORIAL = Path(__file__).resolve().parents[2] / "docs" / "tutorial.md"


@pytest.mark.slow
def test_the_tutorial_runs_and_answers(tmp_path: Path, compiled_loops: dict[str, str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    text = TUTORIAL.read_text(encoding="utf-8").replace("8000", port)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | compiled_loops | {"PATH": path}
    printed = ""
    for found in re.finditer(r"^```(sh|python)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if NOT_RUN.search(text[: found.start()]):
            continue
        interpreter = ["bash", "-euc"] if found[1] == "sh" else [sys.executable, "-c"]
        run = subprocess.run(
            [*interpreter, found[2]], cwd=tmp_path, env=environment,
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert run.returncode == 0, (found[2], run.stderr)
        printed += run.stdout
    assert "libemail-valid-loose-perl" in printed
    right = re.search(r"^│ P +│ +([\d.]+)", printed, re.MULTILINE)
    assert right and abs(float(right[1]) - 46) < 3
    assert printed.count("libjson-perl: module for") >= 2  # from Python and over HTTP
    assert '"predictions"' in printed
