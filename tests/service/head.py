"""A real head of a Ray cluster that demands a token, on free ports of the loopback; and a proxy."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

from .conftest import ENVIRONMENT, descendants, end
from .gateway import free_ports

TOKEN = "0123456789abcdef" * 4
START_S = 120
PORTS = (
    "port",
    "dashboard-port",
    "ray-client-server-port",
    "metrics-export-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "runtime-env-agent-port",
)


@dataclass
class Head:
    """`ray start --head` in `directory`; `env` is what its nodes have in their environment."""

    directory: Path
    env: dict[str, str]
    cpus: int = 4
    ports: dict[str, int] = field(default_factory=dict)
    process: subprocess.Popen[str] | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.ports['dashboard-port']}"

    def start(self) -> None:
        """Starts it and waits until its job server answers."""
        self.ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
        python = Path(sys.executable).parent
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "RAY_"))}
        environment = inherited | ENVIRONMENT | self.env
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
        environment |= {"PATH": f"{python}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block",
                "--dashboard-host=127.0.0.1",
                "--min-worker-port=0", "--max-worker-port=0", f"--num-cpus={self.cpus}",
                f"--object-store-memory={200 * 2**20}", f"--temp-dir={self.directory}",
                "--disable-usage-stats",
                *(f"--{name}={port}" for name, port in self.ports.items()),
            ],
            stdout=(self.directory / "out").open("w"),
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )  # fmt: skip
        until = time.monotonic() + START_S
        while True:
            with contextlib.suppress(requests.ConnectionError):
                if self.get("/api/version").ok:
                    return
            log = self.directory / "out"
            assert self.process.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.3)

    def get(self, path: str, token: str | None = TOKEN) -> requests.Response:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return requests.get(self.address + path, headers=headers, timeout=30)

    def job(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.get(f"/api/jobs/{name}").json()
        return found

    def log(self, name: str) -> str:
        return str(self.get(f"/api/jobs/{name}/logs").json()["logs"])

    def stop_job(self, name: str) -> None:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        requests.post(f"{self.address}/api/jobs/{name}/stop", headers=headers, timeout=30)
        until = time.monotonic() + 90
        while self.job(name)["status"] in ("PENDING", "RUNNING"):
            assert time.monotonic() < until
            time.sleep(0.5)

    def stop(self) -> None:
        """Ends it, and what is left of it after a while."""
        if self.process is None:
            return
        family = descendants(self.process.pid)
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(8)
        if self.process.poll() is None:
            end(self.process)
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        self.process = None


class Proxy:
    """A TCP proxy whose connections can be cut, or stalled as by a link that is down."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._server.getsockname()[1])
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._cut, self._stalled, self._closed = False, False, False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def cut(self) -> None:
        """Connections end; new ones are closed at once, until `restore`."""
        self._cut = True

    def stall(self) -> None:
        """Connections stay, and nothing passes; they never pass anything again."""
        self._stalled = True

    def restore(self) -> None:
        self._cut = self._stalled = False

    def close(self) -> None:
        self._closed = True
        self._thread.join(5)

    def _run(self) -> None:
        dead: list[socket.socket] = []
        while not self._closed:
            if self._stalled:
                dead += [each for pair in self._pairs for each in pair]
                self._pairs.clear()
            if self._cut:
                self._end_all()
            ends = {a: b for pair in self._pairs for a, b in (pair, pair[::-1])}
            ready, _, _ = select.select([self._server, *ends], [], [], 0.05)
            for source in ready:
                if source is self._server:
                    self._accept(dead)
                elif source in ends:
                    self._forward(source, ends[source])
        self._end_all()
        for each in [self._server, *dead]:
            each.close()

    def _accept(self, dead: list[socket.socket]) -> None:
        client, _ = self._server.accept()
        if self._cut:
            client.close()
        elif self._stalled:
            dead.append(client)
        else:
            self._pairs.append((client, socket.create_connection(("127.0.0.1", self._target))))

    def _forward(self, source: socket.socket, target: socket.socket) -> None:
        try:
            data = source.recv(65536)
            if data:
                target.sendall(data)
                return
        except OSError:
            pass
        self._pairs = [pair for pair in self._pairs if source not in pair]
        source.close()
        target.close()

    def _end_all(self) -> None:
        for each in (each for pair in self._pairs for each in pair):
            each.close()
        self._pairs.clear()
