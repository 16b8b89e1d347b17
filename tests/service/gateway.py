"""A real S3 gateway (SeaweedFS) that demands credentials, on free ports of the loopback."""

from __future__ import annotations

import json
import random
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.fs as pafs

ACCESS_KEY, SECRET_KEY = "gateway-access", "gateway-secret-5f3a"
BUCKET = "renee"
START_S = 300
SERVICES = ("master", "volume", "filer", "s3")
PORTS = [f"{service}.port{kind}" for service in SERVICES for kind in ("", ".grpc")]


@dataclass
class Gateway:
    """`weed` with its files in `directory`; once killed it can be started on them again."""

    directory: Path
    ports: dict[str, int] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    @property
    def env(self) -> dict[str, str]:
        """What a client needs in its environment."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.ports['s3.port']}",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self) -> None:
        """Starts the server, or starts it again, and waits until it answers."""
        if not self.ports:
            self.ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
            keys = [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}]
            actions = ["Admin", "Read", "Write", "List", "Tagging"]
            identity = {"name": "admin", "credentials": keys, "actions": actions}
            (self.directory / "s3.json").write_text(json.dumps({"identities": [identity]}))
        self.process = subprocess.Popen(
            [
                shutil.which("weed", path=str(Path(sys.executable).parent)) or "weed",
                "server",
                f"-dir={self.directory}",
                "-ip=127.0.0.1",
                "-ip.bind=127.0.0.1",
                *(f"-{name}={port}" for name, port in self.ports.items()),
                "-master.telemetry=false",
                "-master.volumeSizeLimitMB=64",
                "-volume.max=400",
                "-filer",
                "-s3",
                f"-s3.config={self.directory / 's3.json'}",
                "-s3.port.iceberg=0",
                "-s3.port.lance=0",
            ],
            cwd=self.directory,
            stdout=subprocess.DEVNULL,
            stderr=(self.directory / "weed.log").open("ab"),
        )
        self._wait()

    def kill(self) -> None:
        """`kill -9`."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def away(self, seconds: float) -> None:
        """Killed until somebody has come in vain, and for `seconds` more; then back again."""
        self.kill()
        with socket.socket() as door:
            door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            door.bind(("127.0.0.1", self.ports["s3.port"]))
            door.listen()
            door.settimeout(START_S)
            door.accept()[0].close()
        time.sleep(seconds)
        self.start()

    def filesystem(self, request_timeout: float = 60) -> pafs.S3FileSystem:
        return pafs.S3FileSystem(
            access_key=ACCESS_KEY,
            secret_key=SECRET_KEY,
            endpoint_override=f"127.0.0.1:{self.ports['s3.port']}",
            scheme="http",
            region="us-east-1",
            allow_bucket_creation=True,
            connect_timeout=2,
            request_timeout=request_timeout,
            retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=1),
        )

    def _wait(self) -> None:
        """Until a file can be written: the server answers before it has a volume."""
        filesystem = self.filesystem(request_timeout=5)
        end = time.monotonic() + START_S
        while True:
            try:
                filesystem.create_dir(BUCKET)
                with filesystem.open_output_stream(f"{BUCKET}/ready") as sink:
                    sink.write(b"yes")
                filesystem.delete_file(f"{BUCKET}/ready")
                return
            except OSError:
                log = self.directory / "weed.log"
                assert self.process is not None and self.process.poll() is None, log.read_text()
                assert time.monotonic() < end, log.read_text()
                time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    """Ports that are free, from a random one on, since tests run side by side.

    All are below 32768. From there on Linux gives ports to outgoing connections, so one of them
    might be taken when a server that was killed starts again.
    """
    found: list[int] = []
    for port in range(random.randrange(20000, 31000), 32000):
        if _is_free(port):
            found.append(port)
        if len(found) == count:
            return found
    raise AssertionError("no free ports")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
