"""A local Ray: where it, and the training workers in it, listen; and which processes it has."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import descendants, end

pytestmark = pytest.mark.slow
LISTEN = "0A"
ANY = {"00000000", "0" * 32}
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "0" * 24 + "01000000"}
"""127.0.0.1, the same inside IPv6, ::1, as /proc/net writes them."""
PROGRAM = """
import os, sys, ray
from renee_ray.service.cluster.connect import ensure_ray
ensure_ray(1)
more = os.cpu_count() + 1
ensure_ray(1, local_cpus=more)  # a later command of this process, with more workers
assert ray.cluster_resources()["CPU"] == more
ray.get(ray.remote(lambda: 1).remote())
print("ready", flush=True)
sys.stdin.read()
"""


def listening(pids: set[int]) -> set[str]:
    """Addresses on which processes listen, as /proc/net writes them."""
    sockets: set[str] = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(OSError):  # it is closed by now
                name = os.readlink(link)
                if name.startswith("socket:["):
                    sockets.add(name[8:-1])
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTEN and fields[9] in sockets:
                found.add(fields[1].partition(":")[0])
    return found


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], list[str]]:
    """Addresses on which a local Ray listens, and command lines of its processes.

    It is started as users do, who have not set RAY_AUTH_MODE: their token is made then.
    """
    home = str(tmp_path_factory.mktemp("home"))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment | {"HOME": home},
    )
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        below = descendants(process.pid)
        found = listening({process.pid, *below}), list(below.values())
        rest, said = process.communicate(timeout=300)
        lines = [each for each in said.splitlines() if "did not start in time" not in each]
        assert (process.returncode, first + rest, lines) == (0, "ready\n", []), "not silent"
        return found
    finally:
        end(process)


def test_a_local_ray_listens_on_loopback_alone(local: tuple[set[str], list[str]]) -> None:
    found, _ = local
    assert found and found <= LOOPBACK, found


def test_a_local_ray_has_no_process_without_a_use(local: tuple[set[str], list[str]]) -> None:
    _, commands = local
    assert any("gcs_server" in command for command in commands)
    for script in ("log_monitor.py", "dashboard/dashboard.py", "autoscaler/_private/monitor.py"):
        assert not any(script in command for command in commands), commands


def test_what_listens_everywhere_is_seen() -> None:
    import socket

    with socket.create_server(("0.0.0.0", 0)):
        assert listening({os.getpid()}) & ANY
