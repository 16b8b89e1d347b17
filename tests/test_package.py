"""The package as it is installed: its public names, and a wheel that needs no clone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import renee_ray

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "renee_ray"


def test_public_names_are_those_that_are_listed() -> None:
    for name in renee_ray.__all__:
        assert callable(getattr(renee_ray, name)), name
    assert set(renee_ray.__all__) < set(dir(renee_ray))
    assert not hasattr(renee_ray, "no_such_name")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: a build leaves files beside its source."""
    source, made = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    shutil.copytree(
        PACKAGE, source / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__", ".*")
    )
    command = "pip wheel --no-deps --no-build-isolation --no-index --wheel-dir"
    subprocess.run([sys.executable, "-m", *command.split(), made, source], check=True)
    (found,) = made.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for PYTHONPATH with the files of the wheel alone."""
    directory = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory)
    return directory


@pytest.mark.slow
def test_the_wheel_has_the_package_and_its_data(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (about,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = message_from_bytes(archive.read(about))
    files = (path for path in PACKAGE.rglob("*") if path.is_file())
    assert names == {
        path.relative_to(ROOT).as_posix() for path in files if path.parent.name != "__pycache__"
    }
    assert metadata["Version"] == renee_ray.__version__
    assert {"quickstart", "serve", "cluster"} < set(metadata.get_all("Provides-Extra", []))


@pytest.mark.slow
def test_commands_run_from_the_wheel_in_an_empty_directory(installed: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(installed)},
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout, done.stderr

    assert run("-c", "import renee_ray; print(renee_ray.__path__[0], end='')") == (
        0, str(installed / "renee_ray"), "",
    )  # fmt: skip
    program = ("-m", "renee_ray")
    version = run(*program, "--version")
    assert version[0] == 0 and renee_ray.__version__ in version[1]
    for command in (["train", "lf-debian-40k"], ["quickstart"], ["serve"], ["submit"]):
        status, out, err = run(*program, *command, "--help")
        assert status == 0 and out.startswith(f"Usage: renee-ray {command[0]}"), err
    status, out, err = run(*program, "train", "lf-debian-40k", "data=none", "output=run")
    assert (status, out) == (1, "") and "none is not a renee_ray dataset" in err
    status, out, err = run(
        *program, "submit", "--address", "http://127.0.0.1:9", "train", "lf-debian-40k",
        "data=s3://bucket/set", "output=s3://bucket/run",
    )  # fmt: skip
    assert (status, out) == (1, "") and "no job server answers" in err
    unpack = "from renee_ray.service.quickstart import *; print(unpack(ARCHIVE, Path('raw')))"
    assert run("-c", unpack)[:2] == (0, "raw/LF-DebianPerl-2K\n")
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]
