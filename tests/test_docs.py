"""What README promises, checked without running anything long."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


MOST_LINES, MOST_LINES_OF_A_FUNCTION, MOST_CHARACTERS = 450, 60, 110


def tracked(*suffixes: str) -> Iterator[tuple[Path, str]]:
    """Each tracked file with one of these suffixes, and its text."""
    command = ["git", "ls-files", "-z", *(f"*{suffix}" for suffix in suffixes)]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a clone")
    for name in listed.stdout.split("\0")[:-1]:
        if (ROOT / name).exists():  # else it is deleted and not yet committed
            yield Path(name), (ROOT / name).read_text(encoding="utf-8")


def test_no_line_is_long() -> None:
    long = [
        f"{path}:{number}"
        for path, text in tracked(".py", ".md")
        for number, line in enumerate(text.split("\n"), 1)
        if len(line) > MOST_CHARACTERS
    ]
    assert not long, long


def test_no_file_and_no_function_is_long() -> None:
    files = {path: text for path, text in tracked(".py")}
    assert files
    long = [f"{path}" for path, text in files.items() if text.count("\n") > MOST_LINES]
    for path, text in files.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                if node.end_lineno - node.lineno + 1 > MOST_LINES_OF_A_FUNCTION:
                    long.append(f"{path}:{node.lineno} {node.name}")
    assert not long, long


def test_links_of_the_documents_lead_somewhere() -> None:
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_ci_runs_the_command_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    (finds,) = (line for line in script.splitlines() if line.startswith("command="))
    shows = f'{finds}; echo "${{command%%&& .venv/bin/pytest*}}|${{command##*&& }}"'
    said = subprocess.run(["bash", "-euc", shows], cwd=ROOT, capture_output=True, text=True)
    installs, tests = said.stdout.split("|")
    assert "pip install -c constraints.txt -e '.[test]'" in installs and "pytest" not in installs
    assert tests == '.venv/bin/pytest -n 3 -m ""\n'
    subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")], check=True)


def test_readme_names_the_commands_that_exist() -> None:
    from renee_ray.cli.main import cli

    table = README[README.index("## Commands") : README.index("```sh\nrenee-ray convert")]
    assert set(re.findall(r"^\| `renee-ray ([\w-]+)", table, re.MULTILINE)) == set(cli.commands)


def test_constraints_pin_what_setup_cfg_asks_for() -> None:
    import configparser

    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = setup["options.extras_require"]
    asked = "\n".join([setup["options"]["install_requires"], extras["quickstart"], extras["test"]])
    names = {match.lower() for match in re.findall(r"^([A-Za-z0-9-]+)", asked, re.MULTILINE)}
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = {match.lower() for match in re.findall(r"^([\w-]+)==[\d.]+$", pins, re.MULTILINE)}
    # Which triton there can be depends on the build of torch.
    assert names - {"renee", "triton"} <= pinned
