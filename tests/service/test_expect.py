"""`expect`: a real run beside what was published for a recipe."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from renee_ray.cli.main import main
from renee_ray.report.plan import expectation_text
from tests.service.conftest import LABELS, Run


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_run_is_compared_with_a_recipe(trained: Run, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "num_workers=1", "--recipe", "debian-bag", "--json"
    assert main(["expect", trained.path, *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["split"] == "test" and set(found["expected"]) <= set(found["metrics"])
    unlike = {what: (own, theirs) for what, own, theirs in found["differences"]}
    assert unlike["labels"] == (LABELS, 40398)
    shown = io.StringIO()
    Console(file=shown, width=100).print(expectation_text(found))
    assert f"step {found['step']} " in shown.getvalue()
    for metric, published in found["expected"].items():
        rows = [line for line in shown.getvalue().splitlines() if f" {metric} " in line]
        gap = found["metrics"][metric] - published
        assert any(f"{published:.2f}" in row and f"{gap:+.2f}" in row for row in rows)
