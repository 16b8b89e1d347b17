"""What ends a job and what starts its workers again, decided without a cluster."""

from __future__ import annotations

import errno

import pytest
import torch
from ray.exceptions import RayTaskError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api.config import FailureConfig
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from renee_ray.data.dataset import DatasetError
from renee_ray.errors import ReneeError
from renee_ray.service.cluster.policies import (
    Failures,
    places_for,
    user_error,
    workers_beside_reading,
)

REFUSED = "When reading 'a/b': AWS Error ACCESS_DENIED during GetObject operation"
AWAY = "When reading 'a/b': AWS Error NETWORK_CONNECTION during GetObject operation"
LATE = RuntimeError("Timed out waiting 120000ms for recv operation to complete")
LOST = WorkerHealthCheckFailedError("a worker is gone", RuntimeError("The actor died"))


def of_task(error: Exception) -> Exception:
    """As it comes out of a task that reads."""
    raised: Exception = RayTaskError("read", f"Traceback ...\n{error!r}", error)
    return raised.as_instanceof_cause()  # type: ignore[attr-defined, no-any-return]


def attempts(failures: dict[int, Exception], max_failures: int, most: int = 20) -> int:
    """Groups of workers that are started if each ends like this; `most`: no end in sight."""
    policy = Failures(FailureConfig(max_failures=max_failures))
    for attempt in range(1, most):
        if policy.make_decision(WorkerGroupError("", failures)) == FailureDecision.RAISE:
            return attempt
    return most


@pytest.mark.parametrize("max_failures", [0, 3, -1])
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ReneeError("part 3 is damaged; convert it again"), "part 3 is damaged; convert it again"),
        (
            of_task(DatasetError("x.parquet is cut short; restore it\nFailed after 1/1 attempts")),
            "x.parquet is cut short",
        ),
        (OSError(REFUSED), "refuses the credentials"),
        (of_task(OSError(REFUSED)), "refuses the credentials"),
        (OSError(errno.EACCES, "Permission denied", "/runs/a"), "/runs/a"),
    ],
)
def test_a_users_error_ends_the_job_at_once(
    error: Exception, words: str, max_failures: int
) -> None:
    failures = {0: LATE, 1: error, 2: OSError(AWAY)}
    assert attempts({1: error}, max_failures) == attempts(failures, max_failures) == 1
    found = user_error(WorkerGroupError("", failures))
    assert found is not None and words in str(found) and "\n" not in str(found)


@pytest.mark.parametrize(
    "error",
    [
        LOST,
        LATE,
        MemoryError(),
        TypeError("unsupported operand"),
        torch.OutOfMemoryError("CUDA out of memory"),
        OSError(AWAY),
        OSError("When reading 'a/b': AWS Error UNKNOWN (HTTP status 429)"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
)
def test_what_passes_is_tried_again(error: Exception) -> None:
    assert attempts({0: error}, 0) == 1
    assert attempts({0: error}, 5) == 6
    assert attempts({0: error}, -1) == 20


def test_storage_that_is_away_has_a_sentence_at_the_end() -> None:
    assert "NETWORK_CONNECTION" in str(user_error(WorkerGroupError("", {0: OSError(AWAY)})))
    assert str(user_error(ControllerError(ReneeError("a; b")))) == "a; b"


def test_workers_leave_a_cpu_to_what_reads() -> None:
    nodes, needs = [{"CPU": 4.0, "GPU": 2.0}, {"CPU": 4.0, "GPU": 3.0}, {"CPU": 8.0}], {"GPU": 1.0}
    strategies = {"PACK": 5, "SPREAD": 5, "STRICT_PACK": 3, "STRICT_SPREAD": 2}
    for strategy, places in strategies.items():
        assert places_for(nodes, needs | {"CPU": 0.0}, strategy) == places
    assert workers_beside_reading(4, 1) == 3
    assert workers_beside_reading(5, 2) == 2
    assert workers_beside_reading(4, 2) == 1
    assert workers_beside_reading(0, 1) == 0
    assert workers_beside_reading(4, 0) > 1e9, "GPU workers take none"
