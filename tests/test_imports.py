"""What a process imports decides how soon it starts: seconds of a core, for each of many."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("module", "without"),
    [
        ("renee_ray", {"torch", "ray"}),
        ("renee_ray.cli.main", {"torch"}),
        ("renee_ray.data.rows", {"torch"}),  # what a task that reads unpickles
        ("renee_ray.service.convert.convert", {"torch"}),
        ("renee_ray.service.submit.submit", {"torch"}),
        ("renee_ray.service.train.train", {"transformers", "numba"}),
        ("renee_ray.service.score.predict", {"transformers"}),
        ("renee_ray.service.serve.replicas", {"transformers"}),
    ],
)
def test_what_a_process_does_without(module: str, without: set[str]) -> None:
    code = f"import sys, {module}; print({without} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "set()\n"), done.stderr


def test_a_clone_in_the_current_directory_does_not_hide_the_package(tmp_path: Path) -> None:
    """Ray's workers look there first, and a clone's directory is named like the package in it."""
    (tmp_path / "renee_ray" / "renee_ray").mkdir(parents=True)
    code = "import sys; sys.path.insert(0, ''); import renee_ray; renee_ray.__version__"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
