"""What README and the recipes promise, checked without running anything long."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from renee_ray.config.overrides import make_config, read_yaml
from renee_ray.config.schema import RunConfig

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


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
    from renee_ray.cli.main import cli

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


@pytest.mark.parametrize(
    "path", sorted((ROOT / "renee_ray" / "recipes").glob("*.yaml")), ids=lambda p: p.stem
)
def test_recipes_are_valid(path: Path) -> None:
    make_config(RunConfig, read_yaml(str(path)), {"data": "d", "output": "o"}, where=path.name)
