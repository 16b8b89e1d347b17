"""A small encoder and a dataset for it."""

from __future__ import annotations

import pytest

from renee_ray.benchmarks.sample import write_sample

LABELS, DIM = 3001, 16


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with a small encoder and a dataset for it."""
    directory = str(tmp_path_factory.mktemp("sample"))
    write_sample(directory, LABELS, 4000, DIM, 2)
    return directory
