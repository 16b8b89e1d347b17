"""What a process imports decides how soon it starts: seconds of a core, for each of many."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "without"),
    [
        ("renee_ray", "torch"),
        ("renee_ray", "ray"),
        ("renee_ray.cli.main", "torch"),
        ("renee_ray.data.rows", "torch"),  # with the next, what a task that reads unpickles
        ("renee_ray.service.observe.metric", "torch"),
        ("renee_ray.service.convert.convert", "torch"),
        ("renee_ray.service.submit.submit", "torch"),
        ("renee_ray.service.train.train", "transformers"),
        ("renee_ray.service.score.predict", "transformers"),
        ("renee_ray.service.serve.replicas", "transformers"),
        ("renee_ray.service.train.train", "numba"),
    ],
)
def test_what_a_process_does_without(module: str, without: str) -> None:
    code = f"import sys, {module}; sys.exit({without!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
