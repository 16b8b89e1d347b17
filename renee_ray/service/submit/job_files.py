"""What a submitted job takes along: the code that it runs, and its environment.

The code is the package that is running, from a clone or a wheel. All of it travels to the cluster,
and the dashboard shows it. Hidden files stay here, and no secret goes into the environment: the
nodes have their own.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Mapping
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


def pack(destination: Path) -> None:
    """Copies the package that is running to `destination`, without hidden and compiled files."""
    shutil.copytree(PACKAGE, destination, ignore=shutil.ignore_patterns(".*", "__pycache__"))
