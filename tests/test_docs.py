"""What README and the recipes promise, checked without running anything long."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

from renee_ray.config import RunConfig, make_config, read_yaml

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "renee_ray"
README = (ROOT / "README.md").read_text(encoding="utf-8")

ALLOWED_IMPORTS = {
    "service": {
        "data", "xfc", "training", "benchmarks", "metrics", "report", "status", "config", "memory",
        "program",
        "service",
    },
    "training": {"data", "xfc", "training", "metrics", "config", "memory"},
    "data": {"data", "xfc.labels", "config", "memory"},
    "benchmarks": {"benchmarks", "data", "xfc", "training", "config", "memory"},
    "xfc": {"xfc", "config", "memory"},
}  # fmt: skip
"""Each room imports only rooms below it (data/order.py takes its one integer split from xfc)."""


def imports(path: Path) -> set[str]:
    """Modules that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_only_the_service_imports_ray() -> None:
    users = {
        path.relative_to(PACKAGE).parts[0]
        for path in PACKAGE.rglob("*.py")
        if any(name.split(".")[0] == "ray" for name in imports(path))
    }
    assert users == {"service"}


@pytest.mark.parametrize("room", ALLOWED_IMPORTS)
def test_a_room_imports_only_rooms_below_it(room: str) -> None:
    for path in (PACKAGE / room).glob("*.py"):
        own = {n.removeprefix("renee_ray.") for n in imports(path) if n.startswith("renee_ray.")}
        wrong = {
            n for n in own if not any(f"{n}.".startswith(f"{a}.") for a in ALLOWED_IMPORTS[room])
        }
        assert not wrong, f"{path.name} imports {wrong}"


LIGHT = ("metrics.py", "report.py", "status.py")


def test_light_rooms_import_no_torch() -> None:
    for path in [*(PACKAGE / "data").glob("*.py"), *map(PACKAGE.joinpath, LIGHT)]:
        assert not any(name.split(".")[0] == "torch" for name in imports(path)), path


def test_every_file_of_the_package_is_in_the_map() -> None:
    table = (ROOT / "docs" / "files.md").read_text(encoding="utf-8")
    files = {
        path.relative_to(ROOT).as_posix()
        for path in PACKAGE.rglob("*")
        if path.suffix in (".py", ".j2") and path.name != "__init__.py"
    }
    named = set(re.findall(r"`(renee_ray/[^`]*[^/`])`", table))
    assert named == files


def test_links_of_the_documents_lead_somewhere() -> None:
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_ci_runs_the_command_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    needle = re.search(r'grep -F -- "(.*)" README', script)
    assert needle
    lines = [line for line in README.splitlines() if needle[1] in line]
    tests = '&& .venv/bin/pytest -n 2 -m "not alone" && .venv/bin/pytest -m alone'
    assert len(lines) == 1 and lines[0].endswith(tests)
    subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")], check=True)


def test_readme_names_the_commands_that_exist() -> None:
    from renee_ray.cli import cli

    table = README[README.index("## Commands") : README.index("For example, on a dataset")]
    assert set(re.findall(r"^\| `renee-ray (\w+)", table, re.MULTILINE)) == set(cli.commands)


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


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_recipes_are_valid(path: Path) -> None:
    make_config(RunConfig, read_yaml(str(path)), {"data": "d", "output": "o"}, where=path.name)
