"""Joining a Ray cluster, or starting a local one."""

from __future__ import annotations

import logging
import os

import ray

from renee_ray.config import ReneeError

log = logging.getLogger(__name__)

ATTEMPTS = 3


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


def _connect() -> None:
    try:
        ray.init(log_to_driver=False)
    except ConnectionError as error:
        raise ReneeError(
            f"no Ray cluster answers at RAY_ADDRESS={os.environ['RAY_ADDRESS']!r}; start it, or "
            f"unset RAY_ADDRESS to run on this machine"
        ) from error


def _start_local(num_cpus: int) -> None:
    """Ray gives a node a fixed time to start, which a busy machine may exceed: tried thrice."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            ray.init(
                address="local",
                num_cpus=max(num_cpus, os.cpu_count() or 1),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
            return
        except Exception as error:
            ray.shutdown()
            if "timed out during startup" not in str(error) or attempt == ATTEMPTS:
                raise
            log.warning("Ray did not start in time (attempt %d of %d)", attempt, ATTEMPTS)
