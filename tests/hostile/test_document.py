"""docs/security.md lists every hostile case by number."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from renee_ray.errors import ReneeError

from ..service import test_serve_http
from . import test_configs, test_datasets, test_models, test_runs, test_shown, test_sources
from .place import SECRET, Case, Made, Place, refused

SECURITY = Path(__file__).parents[2] / "docs" / "security.md"
MODULES = [test_datasets, test_models, test_configs, test_sources, test_shown, test_runs]


def test_the_document_lists_every_case_by_number() -> None:
    listed = SECURITY.read_text(encoding="utf-8").partition("## Hostile cases")[2]
    names = re.findall(r"`([a-z0-9]+(?:-[a-z0-9]+)+)`", listed)
    cases = [case.name for module in MODULES for case in getattr(module, "CASES", [])]
    known = [*cases, *test_serve_http.WRONG_TOKENS, *test_serve_http.HOSTILE]
    assert sorted(names) == sorted(known) and len(set(known)) == len(known)
    tests = set(re.findall(r"`(test_\w+)`", listed))
    assert tests <= {name for module in [*MODULES, test_serve_http] for name in vars(module)}
    numbers = [int(number) for number in re.findall(r"(?:^|, )(\d+)\. `", listed, re.M)]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) >= 30


def test_a_read_outside_is_noticed(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """What `refused` asserts can fail: a case that reads the secret, and one that quotes it."""

    def reads(place: Place) -> Made:
        def read() -> None:
            raise ReneeError(f"refused {len(place.secret.read_text())}")

        return read

    def quotes(place: Place) -> Made:
        def quote() -> None:
            raise ReneeError(f"refused {SECRET}")

        return quote

    with pytest.raises(AssertionError, match="something outside was read"):
        refused(Case("reads", reads, "refused"), place, capsys)
    with pytest.raises(AssertionError):
        refused(Case("quotes", quotes, "refused"), place, capsys)
