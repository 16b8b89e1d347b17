"""Joining a Ray cluster, or starting a local one."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
from typing import Any

import psutil
import ray

from renee_ray.errors import ReneeError, reason
from renee_ray.service.cluster import ray_compat

log = logging.getLogger(__name__)

ATTEMPTS = 3


class _Started:
    """node: of the Ray that `ensure_ray` has started last."""

    node: Any = None


def ensure_ray(min_cpus: int = 3, local_cpus: int = 0) -> None:
    """Connects to the environment's cluster (a submitted job, RAY_ADDRESS), else starts Ray here.

    Locally, Ray's CPUs are slots for processes, not cores. At least `min_cpus` and `local_cpus`
    are declared, so that training workers never take the slot that Ray Data reads with. A Ray that
    an earlier call has started with fewer is started anew.

    Raises:
        ReneeError: the cluster has fewer than `min_cpus` CPUs.
    """
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    slots = max(min_cpus, local_cpus)
    ours = _Started.node is not None and ray_compat.started_node() is _Started.node
    if ours and ray.cluster_resources().get("CPU", 0) < slots:
        ray.shutdown()
    if not ray.is_initialized():
        with ray_compat.sigterm_left_alone():
            if os.environ.get("RAY_ADDRESS"):
                _connect()
            else:
                _start_local(slots)
    have = ray.cluster_resources().get("CPU", 0)
    if have < min_cpus:
        raise ReneeError(
            f"the Ray cluster has {have:.0f} CPUs and this run needs {min_cpus}: one for each "
            f"worker and one for reading data; add a node or lower num_workers"
        )


def started_here() -> bool:
    """Returns whether this process started the Ray that it uses, which then ends with it."""
    return ray_compat.started_node() is not None


def leave_ray(orderly: bool) -> None:
    """Kills the Ray that this process started, or was starting, before an end by os._exit.

    Its raylet would end with this process, by the kernel, but leave two agents behind.

    orderly: no thread is inside Ray, whose shutdown would crash then. A cluster that was joined
        is left only in this case.
    """
    if (node := ray_compat.started_node()) is not None:
        node.destroy_external_storage()  # objects that were spilled to disk
    elif orderly:
        ray.shutdown()
    for act in (psutil.Process.suspend, psutil.Process.kill):  # none can start another meanwhile
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                act(process)


def _connect() -> None:
    try:
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
    except ConnectionError as error:
        raise ReneeError(
            f"no Ray cluster answers at RAY_ADDRESS={os.environ['RAY_ADDRESS']!r}; start it, or "
            f"unset RAY_ADDRESS to run on this machine"
        ) from error
    except (RuntimeError, ray.exceptions.AuthenticationError) as error:
        raise ReneeError(
            f"the Ray cluster at RAY_ADDRESS={os.environ['RAY_ADDRESS']!r} takes no command from "
            f"here ({reason(error):.300}); use its versions of Ray and Python, and its token"
        ) from error


def _start_local(num_cpus: int) -> None:
    """Starts Ray on this machine, in three attempts: a busy machine may exceed Ray's timeout."""
    ray_compat.silence_token_notice()
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with ray_compat.on_loopback(), ray_compat.without_unused():
                ray.init(
                    address="local",
                    num_cpus=max(num_cpus, os.cpu_count() or 1),
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.WARNING,
                    _system_config=ray_compat.SYSTEM_CONFIG,
                )
            _Started.node = ray_compat.started_node()
            return
        except Exception as error:
            ray.shutdown()
            if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS):
                raise ReneeError(
                    f"Ray cannot start ({reason(error):.200}); it keeps a token in HOME/.ray and "
                    f"files in /tmp/ray: set HOME to a directory that can be written, or "
                    f"RAY_AUTH_TOKEN and RAY_TMPDIR"
                ) from error
            if "timed out during startup" not in str(error) or attempt == ATTEMPTS:
                raise
            log.warning("Ray did not start in time (attempt %d of %d)", attempt, ATTEMPTS)


def node_name() -> str:
    """Returns the name of this process' node, for people: host name and address."""
    return f"{socket.gethostname()} ({ray.util.get_node_ip_address()})"
