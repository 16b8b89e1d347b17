"""What a node tells about itself, its storage and its links: functions that run there as Ray tasks.

All return dictionaries that JSON can hold. They are sent by value (doctor.py), because a node may
have this package in another version, or not at all. So they import what is large only late.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import platform
import resource
import shutil
import socket
import sys
import tempfile
import time
import uuid
from contextlib import suppress
from datetime import timedelta
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import tenacity

from renee_ray.data.storage import read_file, remove, write_file
from renee_ray.errors import reason
from renee_ray.machine import available_bytes, limit_bytes, output

LIBRARIES = ("ray", "torch", "transformers", "pyarrow", "numpy")
GPUS = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
CUDA = """import torch
print(torch.version.cuda, torch.cuda.device_count() if torch.cuda.is_available() else 0)"""
TORCH_S = 60.0
"""Seconds for that: to load torch from a network's disk takes long."""
PROBE_FILE = ".renee-ray-doctor-"
PROBE_BYTES, LARGE_BYTES = 1 << 10, 16 << 20
"""Bytes of a file, and of the tensor that two ranks add up to measure their bandwidth."""
REPEATS = 5
DEVICES = {"gloo": "cpu", "nccl": "cuda"}
CONNECT_S = 10.0
"""Seconds that a connection may take."""


def examine_node() -> dict[str, Any]:
    """Returns versions, GPUs, memory and limits of a process of Ray's on this node.

    Sizes are in bytes, and memory is the container's, where it has less than the machine. `gpus`
    has (name, memory) of each; `cuda_devices` is the number of those that torch can use, and
    `gpu_failure` says why the driver does not answer.
    """
    versions: dict[str, str | None] = {"python": platform.python_version()}
    versions["renee_ray"] = _own_version()
    for name in LIBRARIES:
        versions[name] = next((each.version for each in distributions(name=name)), None)
    gpus, devices, failure = list[list[str]](), "0", ""
    try:
        rows = [line.split(", ") for line in output(GPUS)]
        gpus = [row for row in rows if len(row) == 3]  # and not "No devices were found"
    except FileNotFoundError:
        pass
    except OSError as error:
        failure = reason(error)
    if gpus:
        versions["driver"], versions["CUDA"] = gpus[0][2], "None"
        with suppress(OSError):  # what is wrong with torch, its version and devices tell
            versions["CUDA"], devices = output([sys.executable, "-c", CUDA], TORCH_S)[-1].split()
    disk = shutil.disk_usage(tempfile.gettempdir())
    return {
        "versions": versions,
        "gpus": [gpu[:2] for gpu in gpus],
        "cuda_devices": int(devices),
        "gpu_failure": failure,
        "shm_bytes": shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else 0,
        "disk_bytes": disk.total,
        "disk_free_bytes": disk.free,
        "memory_bytes": limit_bytes(),
        "memory_free_bytes": available_bytes(),
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    }


def _own_version() -> str | None:
    """Returns this package's version here, with a digest, since clones share a version."""
    try:
        package = importlib.import_module("renee_ray")
    except ImportError:
        return None
    digest = hashlib.sha256()
    for path in sorted(Path(str(package.__file__)).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return f"{package.__version__} ({digest.hexdigest()[:8]})"


def read_clock() -> dict[str, Any]:
    """Returns the time of this node."""
    return {"time_s": time.time()}


def examine_storage(url: str, marker: str) -> dict[str, Any]:
    """Writes, reads and deletes a file of a unique name in `url`.

    Returns:
        seconds of what succeeded, and `error` of what did not; `sees_marker`, whether the file is
        there that the first node wrote.
    """
    name, content = f"{PROBE_FILE}{uuid.uuid4().hex}", os.urandom(PROBE_BYTES)
    path, found = f"{url}/{name}", dict[str, Any]()
    try:
        start = time.perf_counter()
        write_file(path, content)
        found["write_s"] = time.perf_counter() - start
        try:
            start = time.perf_counter()
            if read_file(path) != content:
                raise OSError("what is read is not what was written")
            found["read_s"] = time.perf_counter() - start
        finally:
            remove(path)
        found["sees_marker"] = read_file(f"{url}/{marker}") is not None
    except Exception as error:  # each filesystem has its own
        said, _, _ = reason(error).partition("; Details:")  # these differ between nodes
        found["error"] = said.replace(name, f"{PROBE_FILE}*")
    return found


def free_port() -> dict[str, Any]:
    """Returns a free port, chosen as Ray Train chooses that of a rendezvous."""
    with socket.create_server(("", 0)) as server:
        return {"port": server.getsockname()[1]}


def exchange(
    rank: int, backend: str, places: list[tuple[str, int]], limit_s: float
) -> dict[str, Any]:
    """Connects with the other rank, each way, then adds up tensors with it as training does.

    Each rank sends and receives a tensor once, so its bytes by the seconds are the bandwidth.

    Args:
        places: address and port of each of the two ranks.

    Returns:
        `blocked`, the reason, where the other could not be reached; nothing where it did not come.
    """
    connect = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(ConnectionRefusedError),  # it may not listen yet
        stop=tenacity.stop_after_delay(limit_s),
        wait=tenacity.wait_fixed(0.1),
        reraise=True,
    )
    blocked = {}
    with socket.create_server(("", places[rank][1])) as server:
        try:
            connect(socket.create_connection, places[1 - rank], CONNECT_S).close()
        except OSError as error:
            blocked = {"blocked": reason(error)}
        server.settimeout(limit_s if blocked else CONNECT_S)
        try:
            server.accept()[0].close()
        except TimeoutError:
            return blocked
    if blocked:
        return blocked
    import torch
    import torch.distributed as dist

    dist.init_process_group(
        backend, init_method="tcp://{}:{}".format(*places[0]), rank=rank, world_size=2,
        timeout=timedelta(seconds=limit_s),
    )  # fmt: skip
    try:
        best = []
        for elements in (1, LARGE_BYTES // 4):
            tensor = torch.zeros(elements, device=DEVICES[backend])
            times = []
            for _ in range(REPEATS):
                start = time.perf_counter()
                dist.all_reduce(tensor)
                float(tensor[0])  # waits for a GPU
                times.append(time.perf_counter() - start)
            best.append(min(times))
    finally:
        dist.destroy_process_group()
    return {"latency_s": best[0], "bytes_per_s": LARGE_BYTES / best[1]}
