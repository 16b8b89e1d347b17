"""What the controller of a Ray Train job decides: to start again or to end, and with how many.

a user's error                      ends the job: it would come again
an exception of the code itself     at most CODE_RESTARTS more attempts: it may have been a race
a lost worker, memory, a late       `checkpoint.max_failures` more attempts
peer, storage that is away
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.train.v2._internal.execution.failure_handling import (
    DefaultFailurePolicy,
    FailureDecision,
)
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy
from ray.train.v2.api.config import FailureConfig
from ray.train.v2.api.exceptions import TrainingFailedError

from renee_ray.data.storage import REFUSED, storage_error
from renee_ray.errors import ReneeError, reason

CODE_RESTARTS = 3
"""However many lost workers a run survives."""
OF_CODE = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError,
    NotImplementedError, TypeError, ValueError,
)  # fmt: skip
"""What no lost worker, memory or storage raises: torch says RuntimeError, files say OSError."""
READING_CPUS = 1
"""CPUs of a cluster that workers leave to the tasks that read for them."""


class Failures(DefaultFailurePolicy):
    """Ray's own policy, but for what another attempt would not change."""

    def __init__(self, failure_config: FailureConfig) -> None:
        super().__init__(failure_config)
        self._of_code = 0

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        failures = getattr(training_failed_error, "worker_failures", None) or {}
        # What others raise when a worker is lost says nothing of the code.
        lost = any(isinstance(each, RayActorError) for each in failures.values())
        self._of_code += not lost and any(isinstance(each, OF_CODE) for each in failures.values())
        if is_final(training_failed_error) or self._of_code > CODE_RESTARTS:
            return FailureDecision.RAISE
        return super().make_decision(training_failed_error)


class Elastic(ElasticScalingPolicy):
    """Ray's own policy, but for the CPU that reads: workers on it would wait for data for ever."""

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        each = self.scaling_config._resources_per_worker_not_none.get("CPU", 0)
        room = workers_beside_reading(ray.cluster_resources().get("CPU", 0), each)
        return int(min(super()._count_possible_workers(reserved_resources), room))


def workers_beside_reading(cpus: float, each: float) -> float:
    """Workers of `each` CPUs for which a cluster has room beside what reads for them."""
    return max(cpus - READING_CPUS, 0) // each if each else math.inf


def user_error(error: BaseException) -> ReneeError | None:
    """The user's error in what Ray wrapped, or storage's in one sentence, if there is one."""
    causes = list(_causes(error))
    found = [*filter(_is_final, causes), *filter(_is_of_storage, causes)]
    if not found:
        return None
    first = found[0]
    if not isinstance(first, ReneeError):
        return storage_error(OSError(_said(first)))
    # Ray Data appends lines on its retries to what a task raised.
    return ReneeError(reason(first)) if "\n" in str(first) else first


def is_final(error: BaseException) -> bool:
    """Whether it is a user's error, which another attempt would meet again."""
    return any(map(_is_final, _causes(error)))


def _causes(error: BaseException) -> Iterator[BaseException]:
    """All that an error wraps, itself too; of a task's error, what was raised in the task."""
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


def _said(error: BaseException) -> str:
    """What an error said itself, without a traceback that Ray put before it."""
    lines = str(error).splitlines()
    return next((line for line in reversed(lines) if "AWS Error" in line), str(error))
