"""Hosts on one machine: network namespaces with an address and a raylet each (Linux, root)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from .conftest import ENVIRONMENT, HEALTH, descendants, end

START_S = 120
BRIDGE, NET, HEAD_PORT = "rr{0}br", "10.213.{0}", 6379


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def can_have_hosts() -> bool:
    """Whether this machine lets us make network namespaces."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    try:
        ip("netns", "add", "rr-probe")
        ip("netns", "delete", "rr-probe")
    except subprocess.CalledProcessError:
        return False
    return True


needs_hosts = pytest.mark.skipif(not can_have_hosts(), reason="needs root and network namespaces")


@dataclass
class Host:
    """A namespace, connected to the bridge, and the raylet in it."""

    name: str
    address: str
    raylet: subprocess.Popen[str] | None = None

    def run(
        self, *command: str, env: dict[str, str], out: Path | None = None
    ) -> subprocess.Popen[str]:
        """Starts a command on this host."""
        own = {
            "GLOO_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        return subprocess.Popen(
            ["ip", "netns", "exec", self.name, *command],
            stdout=out.open("w") if out else subprocess.PIPE,
            stderr=subprocess.STDOUT if out else subprocess.PIPE,
            text=True,
            env=inherited | ENVIRONMENT | own | env,
        )

    def node_id(self) -> str:
        """As Ray numbers it, from the command line of its raylet."""
        assert self.raylet is not None
        found = re.search(r"--node_id=(\w+)", " ".join(descendants(self.raylet.pid).values()))
        assert found is not None
        return found[1]

    def cut(self) -> None:
        """Takes its link down: it hears nothing more, and nobody hears it."""
        ip("-n", self.name, "link", "set", "eth0", "down")

    def kill(self) -> None:
        """`kill -9` of all of its Ray."""
        if self.raylet is not None:
            end(self.raylet)
            self.raylet = None


@dataclass
class Hosts:
    """A head with one CPU, which the driver runs on, and hosts of two CPUs for a worker each."""

    directory: Path
    number: int = field(default_factory=lambda: os.getpid() % 250)
    hosts: list[Host] = field(default_factory=list)

    @property
    def head(self) -> Host:
        return self.hosts[0]

    @property
    def address(self) -> str:
        return f"{self.head.address}:{HEAD_PORT}"

    def start(self, workers: int) -> None:
        bridge = BRIDGE.format(self.number)
        ip("link", "add", bridge, "type", "bridge")
        ip("link", "set", bridge, "up")
        for _ in range(workers + 1):
            self.add()

    def add(
        self, cpus: int = 2, within: tuple[str, ...] = (), env: dict[str, str] | None = None
    ) -> Host:
        """One more host; the first is the head. `within` is a command that runs its raylet."""
        index = len(self.hosts)
        name, address = f"rr{self.number}h{index}", f"{NET.format(self.number)}.{index + 1}"
        veth = f"rr{self.number}v{index}"
        ip("netns", "add", name)
        host = Host(name, address)
        self.hosts.append(host)
        ip("link", "add", veth, "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("link", "set", veth, "master", BRIDGE.format(self.number), "up")
        ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
        ip("-n", name, "link", "set", "eth0", "up")
        ip("-n", name, "link", "set", "lo", "up")
        role = ["--head", f"--port={HEAD_PORT}", "--num-cpus=1", "--include-dashboard=false"]
        if index:
            role = [f"--address={self.address}", f"--num-cpus={cpus}"]
        out = self.directory / f"host{index}.out"
        # One after the other: they choose the names of their sockets in one directory.
        limit = time.monotonic() + START_S
        while "Ray runtime started" not in (out.read_text() if out.exists() else ""):
            assert time.monotonic() < limit, out.read_text()
            if host.raylet is None or host.raylet.poll() is not None:  # a busy machine's may end
                host.raylet = host.run(
                    *within, sys.executable, "-m", "ray.scripts.scripts", "start", "--block",
                    *role, f"--node-ip-address={address}", f"--temp-dir={self.directory}",
                    f"--object-store-memory={100 * 2**20}", "--disable-usage-stats",
                    env=HEALTH | (env or {}), out=out,
                )  # fmt: skip
            time.sleep(0.2)
        return host

    def stop(self) -> None:
        for host in self.hosts:
            host.kill()
            subprocess.run(["ip", "netns", "delete", host.name], capture_output=True)
        subprocess.run(["ip", "link", "delete", BRIDGE.format(self.number)], capture_output=True)
