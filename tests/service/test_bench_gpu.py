"""`bench gpu`: what it runs, what it keeps of what fails, and its page."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from renee_ray.cli import main as cli
from renee_ray.service.bench import gpu


@pytest.mark.parametrize("small", [True, False])
def test_its_commands_are_ones_that_there_are(
    small: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(gpu, "run_command", lambda each, *_, **__: (seen.append(each), ([], ""))[1])
    monkeypatch.setattr(gpu, "write_sample", lambda *_: None)
    for name in gpu.LIMITS:
        gpu.part(name, small, str(tmp_path), 0.0)
    assert len(seen) == 5 + 3 + 1 + 5 + 1 + 2
    for command in seen:
        group, words = cli.cli, command.split()
        while isinstance(group, cli.click.Group):
            _, group, words = group.resolve_command(cli.click.Context(group), words)
        assert group is not None
        group.make_context("a command", words)  # raises what is wrong with a flag


def test_a_command_that_fails_or_takes_too_long_says_so() -> None:
    assert gpu.run_command("--version", time.monotonic() + 300) == ([], "")
    records, error = gpu.run_command("bench step --labels 0", time.monotonic() + 300)
    assert not records and "status 2" in error and "--labels" in error
    records, error = gpu.run_command("bench step", time.monotonic() + 1)
    assert not records and "took too long" in error


def test_parts_for_which_there_is_no_time_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "gpu.json")
    assert cli.main(["bench", "gpu", "--small", "--out", out, "--minutes", "0"]) == 0
    found = json.loads(Path(out).read_text())
    assert list(found["parts"]) == list(gpu.LIMITS)
    assert set(json.loads(capsys.readouterr().out)["errors"]) == set(gpu.LIMITS)
    assert found["versions"]["torch"] and found["device"] and "commit" in found
    assert cli.main(["bench", "gpu", "--out", out, "--only", "all"]) == 2
    assert "'oracle'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_is_killed_and_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "gpu.json")
    arguments = "--small", "--only", "resume", "--out", out, "--minutes", "40"
    assert cli.main(["bench", "gpu", *arguments]) == 0
    assert not json.loads(capsys.readouterr().out)["errors"]
    parts = json.loads(Path(out).read_text())["parts"]
    (resumed,) = parts["resume"]["records"]
    assert 0 < resumed["killed_after"] <= resumed["resumed_from"] < resumed["steps"]
