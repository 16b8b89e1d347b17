"""What a submitted job takes along: the code that it runs, and its environment.

The code is the package that is running, from a clone or a wheel, or else a whole clone. All of it
travels to the cluster, and the dashboard shows it. Hidden files stay here, and no secret goes into
the environment: the nodes have their own.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path

from renee_ray.errors import ReneeError

PACKAGE = Path(__file__).resolve().parents[2]
"""The package that is running."""

PASSED_ON = (
    "AWS_DEFAULT_REGION",
    "AWS_EC2_METADATA_DISABLED",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "GLOO_SOCKET_IFNAME",
    "HF_HUB_OFFLINE",
    "NCCL_DEBUG",
    "NCCL_IB_DISABLE",
    "NCCL_SOCKET_IFNAME",
    "RENEE_RAY_STORAGE_PATIENCE_S",
)
"""Variables that a job gets from the environment of `submit`, where they are set there."""

LEFT_OUT = (
    ".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "quickstart", "wandb", "mlruns",
    "node_modules",
)  # fmt: skip
"""Names of files and directories that stay here, anywhere in the tree, as environments do."""
LARGE_FILE = 10 * 2**20
"""Bytes of the smallest file that stays here, since it belongs on storage."""

SECRET_WORDS = {
    "KEY", "KEYS", "PASS", "PRIVATE", "PWD", "TOKEN", "TOKENS",
}  # fmt: skip
SECRET_PARTS = ("SECRET", "PASSWORD", "PASSWD", "CREDENTIAL", "APIKEY", "AUTHTOKEN")
USER_AND_PASSWORD = re.compile(r"://[^/@\s]+:[^/@\s]*@")


def looks_secret(name: str) -> bool:
    """Returns whether a variable's name says that its value is a secret."""
    upper = name.upper()
    return bool(SECRET_WORDS & set(upper.split("_"))) or any(p in upper for p in SECRET_PARTS)


def job_environment(
    extra: Iterable[str], stop_wait_s: int, environment: Mapping[str, str]
) -> dict[str, str]:
    """Returns the variables of a job: `PASSED_ON`, `extra`, and how Ray stops it.

    Args:
        extra: `NAME=VALUE`, or `NAME` for its value in `environment`.
        stop_wait_s: seconds between Ray's request to stop and its `kill -9`.

    Raises:
        ReneeError: a variable is not set, or would carry a secret.
    """
    found = {name: environment[name] for name in PASSED_ON if name in environment}
    for item in extra:
        name, equals, value = item.partition("=")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ReneeError(f"--env {name!r} is no name of a variable; give NAME=VALUE or NAME")
        if looks_secret(name):
            raise ReneeError(
                f"--env {name} looks like a secret, and a job's environment is shown on the "
                f"dashboard; set it in the environment of the cluster's nodes instead"
            )
        if not equals and name not in environment:
            raise ReneeError(f"--env {name} is not set here; give {name}=VALUE")
        found[name] = value if equals else environment[name]
    for name, value in found.items():
        refuse_password(value, name)
    # At SIGINT, training ends with a checkpoint and other commands clean up. Ray's default, SIGTERM
    # and SIGKILL 3 seconds later, leaves no time for either.
    return {
        "RAY_JOB_STOP_SIGNAL": "SIGINT",
        "RAY_JOB_STOP_WAIT_TIME_S": str(stop_wait_s),
    } | found


def refuse_password(text: str, where: str) -> None:
    """Raises ReneeError where a URL in `text` has a password, which is not repeated."""
    if USER_AND_PASSWORD.search(text):
        raise ReneeError(
            f"{where} has a URL with a password, which the dashboard would show; set "
            f"credentials in the environment of the cluster's nodes instead"
        )


def check_shared(paths: Mapping[str, str]) -> None:
    """Raises ReneeError for a path that names another file on a node than here."""
    for name, path in paths.items():
        if "://" not in path and not os.path.isabs(path):
            raise ReneeError(
                f"{name}={path!r} is relative, and a job runs in a temporary directory of the "
                f"cluster; give a URL, or an absolute path on storage that every node has"
            )


def job_files(root: Path) -> tuple[list[Path], list[Path]]:
    """Returns the files that a job takes along, and those too large for it, relative to `root`."""
    small: list[Path] = []
    large: list[Path] = []
    for directory, names, files in os.walk(root):
        here = Path(directory)
        names[:] = (n for n in names if not _left_out(n) and not _is_environment(here / n))
        for path in (here / name for name in files if not _left_out(name)):
            if path.is_file():
                kind = large if path.stat().st_size >= LARGE_FILE else small
                kind.append(path.relative_to(root))
    return sorted(small), sorted(large)


def pack(root: Path, destination: Path, limit: int) -> list[Path]:
    """Copies the files below `root` that a job takes along to `destination`.

    Args:
        limit: bytes that Ray accepts.

    Returns:
        the files that were left out because they are large, relative to `root`.

    Raises:
        ReneeError: they are more than `limit`.
    """
    small, large = job_files(root)
    sizes = {path: (root / path).stat().st_size for path in small}
    if sum(sizes.values()) >= limit:
        raise ReneeError(
            f"the files of {root} come to {_mib(sum(sizes.values()))} without those that stay "
            f"here, and Ray takes {_mib(limit)} for a job; most are in "
            f"{', '.join(_largest(sizes))}: move them elsewhere"
        )
    for path in small:
        (destination / path.parent).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / path, destination / path)
    return large


def check_clone(path: Path) -> None:
    """Raises ReneeError where `path` is no clone of the repository, whose code a job could run."""
    if not (path / PACKAGE.name / "__main__.py").is_file():
        raise ReneeError(
            f"--working-dir {path} has no {PACKAGE.name}/__main__.py; give a clone of renee_ray, "
            f"or omit it to take along the package that is running"
        )


def _left_out(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in LEFT_OUT)


def _is_environment(path: Path) -> bool:
    return (path / "pyvenv.cfg").is_file() or (path / "conda-meta").is_dir()


def _largest(sizes: Mapping[Path, int]) -> Iterator[str]:
    tops: dict[str, int] = {}
    for path, size in sizes.items():
        tops[path.parts[0]] = tops.get(path.parts[0], 0) + size
    for name in sorted(tops, key=lambda name: -tops[name])[:3]:
        yield f"{name} ({_mib(tops[name])})"


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"
