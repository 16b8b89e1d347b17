"""A trained run as an application of Ray Serve, and the questions to it.

A change to another run is a second application beside the first, not Serve's rolling update. That
would end the only replica of a shard before its successor has loaded its weights, and embeddings of
one model would meanwhile meet label vectors of another.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import re
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
import tenacity
from ray import serve
from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, ReplicaState

from renee_ray.errors import ReneeError, reason
from renee_ray.service.cluster.connect import ensure_ray
from renee_ray.service.cluster.launch import threads_of, worker_environment
from renee_ray.service.serve.replicas import EncoderReplica, Found, ServedRun, ShardReplica

STARTS = 2
"""Failed starts of a deployment's replicas after which the service is given up."""
PLACING_S = 600
"""Seconds that a replica may wait for its CPU and GPU, which `check_room` has found free."""
POLL_S = 0.5
FAILED, UNPLACED = "A replica failed to start", "to be scheduled"
"""Words of a deployment's message in Serve 2.60, which has no other sign of either."""
DIED = (RayActorError, ObjectLostError, OutOfMemoryError, NodeDiedError)
"""What a question raises if a replica dies: OutOfMemoryError if Ray killed it for its memory."""


@dataclass
class Application:
    """An application whose replicas have all answered. `facts`: the answer of `GET /info`."""

    name: str
    facts: dict[str, Any]
    encoder: DeploymentHandle
    asked: int = 0

    async def predict(self, texts: list[str], k: int) -> Found:
        """Returns the k best labels of each text, and how many texts were scored together.

        It asks again if a replica, of the encoder or of a shard, dies meanwhile: to score twice
        changes nothing, and whoever asks bounds the time. If cancelled, it takes the question
        back, and replicas drop it unless they have begun to score it.
        """
        self.asked += 1
        try:
            return await _scored(self.encoder, texts, k)
        finally:
            self.asked -= 1

    def end(self) -> None:
        """Ends the application, which is asked nothing new, once it has answered everything."""
        time.sleep(1)  # for who has looked it up and not asked yet
        while self.asked:
            time.sleep(0.1)
        serve.delete(self.name)

    def ready(self) -> bool:
        """Returns whether every deployment has a replica that Serve found in health."""
        found = serve.status().applications.get(self.name)
        return found is not None and all(
            each.replica_states.get(ReplicaState.RUNNING) for each in found.deployments.values()
        )


@tenacity.retry(
    retry=tenacity.retry_if_exception_type(DIED),
    wait=tenacity.wait_fixed(0.1),
)
async def _scored(encoder: DeploymentHandle, texts: list[str], k: int) -> Found:
    response = encoder.predict.remote(texts, k)
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise


@contextlib.contextmanager
def ray_serve(served: ServedRun, name: str) -> Iterator[None]:
    """Starts Ray, or joins a cluster, with Serve; leaves it without applications of this `name`.

    Raises:
        ReneeError: the cluster is too small for the run's processes.
    """
    joined = ray.is_initialized() or bool(os.environ.get("RAY_ADDRESS"))
    ensure_ray(served.num_processes + 1, 2 * served.num_processes + 1)  # two during a change
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        check_room(served, ray.cluster_resources())
        serve.start(proxy_location="Disabled")
        yield
    finally:
        if joined:
            _leave(name)
        else:
            ray.shutdown()


def _leave(name: str) -> None:
    """Ends our applications, and Serve too if it has no other and no proxy: then it was ours."""
    for each in serve.status().applications:
        if each.startswith(name):
            serve.delete(each)
    left = serve.status()
    if not left.applications and not left.proxies:
        serve.shutdown()


def check_room(served: ServedRun, free: dict[str, float]) -> None:
    """Refuses replicas that could never be placed, for which Serve would wait for ever.

    Raises:
        ReneeError: there are too few CPUs or GPUs in `free`.
    """
    gpus, processes = served.settings.gpus_per_process, served.num_processes
    share = 1 / math.floor(1 / gpus + 1e-9) if gpus else 0.0  # 0.6 of a GPU leaves room for none
    for kind, each in ("GPU", share), ("CPU", 1.0):
        have = free.get(kind, 0.0)
        if each * processes > have + 1e-6:
            raise ReneeError(
                f"num_shards={served.num_shards}, num_encoders={served.settings.num_encoders} and "
                f"gpus_per_process={gpus:g} need {each * processes:g} {kind}s, and the Ray cluster "
                f"has {have:g} free; lower one of them"
            )


class Start:
    """Follows the start of an application by its statuses, and decides when it has failed.

    Serve gives up a deployment none of whose replicas starts. Once one runs, it tries the others
    for ever. Loading weights and embedding training points may take hours: they have no limit.
    """

    def __init__(self) -> None:
        self._failures: defaultdict[str, set[str]] = defaultdict(set)
        self._unplaced: dict[str, float] = {}

    def complete(self, found: ApplicationStatusOverview, now: float) -> bool:
        """Returns whether all replicas run.

        Raises:
            RuntimeError: they never will.
        """
        if found.status == ApplicationStatus.RUNNING:
            return True
        for name, each in found.deployments.items():
            failures = self._failures[name]
            if FAILED in each.message:
                failures.add(each.message)  # it names the process: those of two failures differ
            if each.status == "DEPLOY_FAILED" or len(failures) >= STARTS:
                raise RuntimeError(each.message)
            if UNPLACED not in each.message:
                self._unplaced.pop(name, None)
            elif now - self._unplaced.setdefault(name, now) >= PLACING_S:
                raise RuntimeError(
                    f"a process of {name} has found no free CPU or GPU for {PLACING_S} s; lower "
                    f"num_shards, num_encoders or gpus_per_process"
                )
        return False


def _wait_complete(name: str, stopped: threading.Event) -> None:
    """Waits until all replicas of an application run.

    Raises:
        RuntimeError: they never will, or `stopped` is set.
    """
    start = Start()
    while not start.complete(serve.status().applications[name], time.monotonic()):
        if stopped.wait(POLL_S):
            raise RuntimeError("the service ends")


def deploy(name: str, served: ServedRun, stopped: threading.Event) -> Application:
    """Starts an application, and asks it a first question.

    stopped: gives the start up once it is set.

    Raises:
        ReneeError: a replica does not start; nothing is left of the application then.
    """
    settings = served.settings
    threads = threads_of(served.config, bool(settings.gpus_per_process), served.num_processes - 1)
    options: dict[str, Any] = {
        "ray_actor_options": {
            "num_cpus": 1,
            "num_gpus": settings.gpus_per_process,
            "runtime_env": {"env_vars": worker_environment(threads)},
        },
        "graceful_shutdown_wait_loop_s": 0.1,
        "graceful_shutdown_timeout_s": 5,
        "max_constructor_retry_count": STARTS,
        "logging_config": {"enable_access_log": False},
        "health_check_period_s": 1,  # what died is started again that soon
    }
    shards = [
        # One call at a time: a shard reuses its working memory.
        serve.deployment(ShardReplica, name=f"shard-{rank}", max_ongoing_requests=1, **options)
        .bind(served, rank)  # type: ignore[attr-defined]
        for rank in range(served.num_shards)
    ]  # fmt: skip
    options |= {"num_replicas": settings.num_encoders, "max_ongoing_requests": settings.max_waiting}
    encoder: Any = serve.deployment(EncoderReplica, name="encoder", **options)
    try:
        target = serve.RunTarget(encoder.bind(served, shards), name, route_prefix=None)
        [handle] = serve.run_many([target], wait_for_applications_running=False)
        _wait_complete(name, stopped)
        handle.predict.remote([""], 1).result()  # raises unless all of it works
    except Exception as error:
        serve.delete(name)
        raise ReneeError(_reason(error)) from error
    return Application(name, served.facts, handle)


def _reason(error: Exception) -> str:
    """Finds the sentence of a replica that could not start, without its traceback."""
    sentences = re.findall(r"^renee_ray\.[\w.]+: (.+)$", str(error), re.MULTILINE)
    return sentences[-1] if sentences else f"the service did not start: {reason(error):.500}"
