"""Joining a Ray cluster, or starting a local one."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import psutil
import ray
from ray._private import ray_constants, utils
from ray._private.authentication import authentication_token_setup

from renee_ray.errors import ReneeError

log = logging.getLogger(__name__)

ATTEMPTS = 3
IDLE_MS = 60_000
"""For which a process that reads may wait for its next window. Ray's own second ends it between
two windows, and to start another takes a core for four."""
LOCAL = {
    ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0",
    "GLOO_SOCKET_IFNAME": "lo",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody takes the only node away
}
UNUSED = ("log_monitor", "dashboard", "monitor")
"""Processes of Ray's that a local cluster has no use for. They send logs to a driver that shows
none; report, where no dashboard is asked for, that Ray is used; and look after other nodes."""


def ensure_ray(min_cpus: int = 3, local_cpus: int = 0) -> None:
    """Connects to the environment's cluster (a submitted job, RAY_ADDRESS), else starts Ray here.

    Locally, Ray's CPUs are slots for processes, not cores: at least `min_cpus`, and
    `local_cpus`, are declared, so that training workers never take the slot that Ray Data reads
    with.

    Raises:
        ReneeError: the cluster has fewer than `min_cpus` CPUs.
    """
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    if not ray.is_initialized():
        with _sigterm_left_alone():
            if os.environ.get("RAY_ADDRESS"):
                _connect()
            else:
                _start_local(max(min_cpus, local_cpus))
    have = ray.cluster_resources().get("CPU", 0)
    if have < min_cpus:
        raise ReneeError(
            f"the Ray cluster has {have:.0f} CPUs and this run needs {min_cpus}: one for each "
            f"worker and one for reading data; add a node or lower num_workers"
        )


def started_here() -> bool:
    """Whether this process started the Ray that it uses, which then ends with it."""
    return _started() is not None


def _started() -> Any:
    """The node of a Ray that this process started; None without."""
    node = ray._private.worker._global_node
    return node if node is not None and node.head else None


def leave_ray(orderly: bool) -> None:
    """Before this process ends by os._exit: the Ray that it started, or was starting, is killed.

    Its raylet would end with this process, by the kernel, but leave two agents behind.

    orderly: no thread is inside Ray, whose shutdown would crash then; a cluster is taken leave of.
    """
    if (node := _started()) is not None:
        node.destroy_external_storage()  # what was spilled to disk
    elif orderly:
        ray.shutdown()
    for act in (psutil.Process.suspend, psutil.Process.kill):  # none can start another meanwhile
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                act(process)


@contextlib.contextmanager
def _sigterm_left_alone() -> Iterator[None]:
    """Keeps a handler of SIGTERM that somebody has set.

    Ray would put one in its place that ends the process by SystemExit; and its C++ part another,
    below Python's, that prints a stack.
    """
    handler, take = signal.getsignal(signal.SIGTERM), utils.set_sigterm_handler
    ours = threading.current_thread() is threading.main_thread() and handler != signal.SIG_DFL
    if ours:
        utils.set_sigterm_handler = lambda theirs: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = take
        if ours:
            signal.signal(signal.SIGTERM, handler)


def _connect() -> None:
    try:
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
    except ConnectionError as error:
        raise ReneeError(
            f"no Ray cluster answers at RAY_ADDRESS={os.environ['RAY_ADDRESS']!r}; start it, or "
            f"unset RAY_ADDRESS to run on this machine"
        ) from error


def _start_local(num_cpus: int) -> None:
    """Ray gives a node a fixed time to start, which a busy machine may exceed: tried thrice."""
    # It warns that it asks for a token by default, which is as it should be.
    logging.getLogger(authentication_token_setup.__name__).setLevel(logging.ERROR)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with _on_this_machine():
                ray.init(
                    address="local",
                    num_cpus=max(num_cpus, os.cpu_count() or 1),
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.WARNING,
                    _system_config={"idle_worker_killing_time_threshold_ms": IDLE_MS},
                )
            _end_unused()
            return
        except Exception as error:
            ray.shutdown()
            if "timed out during startup" not in str(error) or attempt == ATTEMPTS:
                raise
            log.warning("Ray did not start in time (attempt %d of %d)", attempt, ATTEMPTS)


def _end_unused() -> None:
    """Ray has no switch for these; they are this process's own children, which it can end."""
    for name in UNUSED:
        getattr(_started(), f"kill_{name}")(check_alive=False)


@contextlib.contextmanager
def _on_this_machine() -> Iterator[None]:
    """A Ray started inside, and the collectives of its workers, listen on 127.0.0.1 alone.

    Whoever reaches a port of Ray's can run code, and on Linux it listens on every interface. It
    has no other switch than that of the systems on which it knows no clusters, which it and each
    of its processes read from the environment.
    """
    before, enabled = dict(os.environ), ray_constants.ENABLE_RAY_CLUSTER
    os.environ.update(LOCAL)
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = enabled
        for name in LOCAL:
            if name in before:
                os.environ[name] = before[name]
            else:
                del os.environ[name]


def replica_on_loopback() -> None:
    """In a replica of Ray Serve in a local Ray, before its server for other replicas starts.

    That server unpickles what it gets, and Serve 2.60 opens it on every interface, unused as it
    is by default, after the replica's constructor. It has no switch.
    """
    if os.environ.get(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR) != "0":
        return
    from ray.serve._private import replica

    listen = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, address: listen(
        server, address.replace("[::]", "127.0.0.1")
    )
