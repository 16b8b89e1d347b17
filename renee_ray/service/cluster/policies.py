"""Policies of the controller of a Ray Train job: restarts after failures, number of workers.

a user's error                      ends the job: it would come again
anything else: a lost worker, a     `checkpoint.max_failures` more attempts
late peer, storage that is away
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import ray
from ray.exceptions import RayTaskError
from ray.train.v2.api.exceptions import TrainingFailedError

from renee_ray.data.storage import REFUSED, storage_error
from renee_ray.errors import ReneeError, reason
from renee_ray.service.cluster.ray_compat import (
    DefaultFailurePolicy,
    ElasticScalingPolicy,
    FailureDecision,
    FixedScalingPolicy,
    NoopDecision,
    available_resources_per_node,
    reserved_by_worker,
)

READING_CPUS = 1
"""CPUs of a cluster that workers leave to the tasks that read for them."""


class Failures(DefaultFailurePolicy):
    """Ray's own policy, except that a user's error ends the job."""

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        if is_final(training_failed_error):
            return FailureDecision.RAISE
        return super().make_decision(training_failed_error)


def places_for(nodes: list[dict[str, Any]], needs: dict[str, float], strategy: str) -> int:
    """Counts the workers that nodes can hold.

    nodes: the resources of each; needs: those of a worker; strategy: of their placement.
    """
    needed = {name: count for name, count in needs.items() if count}
    room = [
        min(int(node.get(name, 0) // count) for name, count in needed.items()) for node in nodes
    ]
    if strategy == "STRICT_PACK":
        return max(room, default=0)
    return sum(min(each, 1) for each in room) if strategy == "STRICT_SPREAD" else sum(room)


class Elastic(ElasticScalingPolicy):
    """Ray's own policy, except that it leaves the CPU that the reading tasks need.

    It heeds a strict placement too, which Ray's does not: such a group would be waited for without
    end.
    """

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        needs = reserved_by_worker(self.scaling_config)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        beside = workers_beside_reading(ray.cluster_resources().get("CPU", 0), needs.get("CPU", 0))
        placed = places_for(nodes, needs, str(self.scaling_config.placement_strategy))
        return int(min(super()._count_possible_workers(reserved_resources), beside, placed))

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> Any:
        """Grows only into GPUs that are free: the group would end first, and may not come again."""
        decision = super().make_decision_for_running_worker_group(
            worker_group_state, worker_group_status
        )
        more = getattr(decision, "num_workers", 0) - worker_group_state.num_workers
        needs = {"GPU": reserved_by_worker(self.scaling_config).get("GPU", 0)}
        if more > 0 and needs["GPU"]:
            free = list(available_resources_per_node().values())
            if places_for(free, needs, str(self.scaling_config.placement_strategy)) < more:
                return NoopDecision()
        return decision


class Fixed(FixedScalingPolicy):
    """Ray's own policy for a number of workers that stays, without its actor that asks for nodes:
    a local Ray has one."""

    def after_controller_start(self, train_run_context: Any) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass


def workers_beside_reading(cpus: float, each: float) -> float:
    """Returns how many workers of `each` CPUs fit a cluster beside the tasks that read for them."""
    return max(cpus - READING_CPUS, 0) // each if each else math.inf


def user_error(error: BaseException) -> ReneeError | None:
    """Finds the user's error, or storage's in one sentence, in what Ray wrapped."""
    causes = list(_causes(error))
    found = [*filter(_is_final, causes), *filter(_is_of_storage, causes)]
    if not found:
        return None
    first = found[0]
    if not isinstance(first, ReneeError):
        return storage_error(first)  # type: ignore[arg-type]  # an OSError
    # Ray Data appends lines on its retries to what a task raised.
    return ReneeError(reason(first)) if "\n" in str(first) else first


def is_final(error: BaseException) -> bool:
    """Returns whether it is a user's error, which another attempt would meet again."""
    return any(map(_is_final, _causes(error)))


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yields an error and all that it wraps; for a task's error, what was raised in the task."""
    seen: set[int] = set()
    queue: list[Any] = [error]
    while queue:
        current = queue.pop(0)
        if not isinstance(current, BaseException) or id(current) in seen:
            continue
        seen.add(id(current))
        if not isinstance(current, RayTaskError) or not isinstance(current.cause, BaseException):
            yield current
        failures = getattr(current, "worker_failures", None) or {}
        others = ("cause", "controller_failure", "__cause__")
        queue += [*failures.values(), *(getattr(current, name, None) for name in others)]


def _is_final(error: BaseException) -> bool:
    if isinstance(error, ReneeError | PermissionError):
        return True
    return _is_of_storage(error) and any(mark in str(error) for mark in REFUSED)


def _is_of_storage(error: BaseException) -> bool:
    return isinstance(error, OSError) and "AWS Error" in str(error)
