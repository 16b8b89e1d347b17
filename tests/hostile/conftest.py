"""The directory of canaries that every hostile case runs in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .place import Place


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """Nothing outside may change, be read or have been executed when the test is over."""
    made = Place(tmp_path)
    monkeypatch.chdir(made.given)
    yield made
    assert not made.executed.exists()
