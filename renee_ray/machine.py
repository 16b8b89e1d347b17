"""The machine, or container, that a process runs in: free memory, threads, its commands."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import psutil

OPENMP = {"GOMP_SPINCOUNT": "2000"}
"""Set before torch loads: its idle threads otherwise spin on the cores of the compiled loops."""

V1 = ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
      "total_inactive_file")  # fmt: skip
V2 = ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")
"""Of each version of cgroups: where it is mounted, its limit, its use, and what of that are pages
of files that nobody has used for a while, which the kernel takes back before it refuses any."""
COMMAND_S = 10.0
"""Seconds that a command may take: a driver that is broken may hang."""


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets variables of this process's environment meanwhile."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def output(command: list[str], timeout_s: float = COMMAND_S) -> list[str]:
    """Returns the lines that a command prints, which sees all GPUs.

    Raises:
        FileNotFoundError: it is not installed.
        OSError: it fails or takes too long, with the reason as one sentence.
    """
    variables = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=variables, timeout=timeout_s
        )
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"{command[0]} takes longer than {timeout_s:g} s") from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "it says nothing").splitlines()[0]
        raise OSError(f"{command[0]} ends with status {done.returncode}: {said:.200}")
    return done.stdout.splitlines()


def available_bytes(root: Path = Path("/")) -> int:
    """Bytes that this process can still take without swapping or being killed.

    That is the least of what the machine has and of what is left of the limit of every group
    of processes that it is in, from its container's to the outermost that can be seen.

    Args:
        root: the directory that `proc` and `sys` are in.
    """
    return max(0, min([psutil.virtual_memory().available, *(left for _, left in _limits(root))]))


def limit_bytes(root: Path = Path("/")) -> int:
    """Bytes that all processes here may take together: the machine's, or less in a container."""
    return min([psutil.virtual_memory().total, *(most for most, _ in _limits(root))])


def _limits(root: Path) -> Iterator[tuple[int, int]]:
    """Each limit, and the bytes left of it; a group may be above its limit."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount, limit, usage, inactive = V1 if controllers else V2
        group = PurePosixPath(path.lstrip("/"))
        # A container may see its group at the mount itself, under whatever path that has outside.
        for each in (group, *group.parents):
            directory = root / mount / each
            most, used = _read(directory / limit).strip(), _read(directory / usage).strip()
            if most.isdigit() and used.isdigit():
                reclaimable = _field(_read(directory / "memory.stat"), inactive)
                yield int(most), int(most) - int(used) + reclaimable


def _field(stat: str, name: str) -> int:
    found = (line.split() for line in stat.splitlines())
    return next((int(value) for key, value in found if key == name), 0)


def _read(path: Path) -> str:
    """A small file; empty where there is none, or it may not be read."""
    try:
        return path.read_text()
    except OSError:
        return ""
