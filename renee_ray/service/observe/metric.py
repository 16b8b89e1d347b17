"""A series at Ray's Prometheus endpoint, and the one that reading tasks add to.

The other series stand in `exported`, which needs torch; a reading task starts without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ray.util.metrics import Counter, Gauge

from renee_ray.data import storage

TAGS = ("run", "rank")


@dataclass(frozen=True)
class Metric:
    """A series `renee_ray_NAME`. tags: those besides `run` and `rank`."""

    kind: type[Counter | Gauge]
    name: str
    description: str
    tags: tuple[str, ...] = ()

    def open(self) -> Any:
        """Makes Ray's own object of it, in this process."""
        return self.kind(f"renee_ray_{self.name}", self.description, TAGS + self.tags)


STORAGE_RETRIES = Metric(Counter, "storage_retries", "Operations of storage that were tried again")


def count_retries(run: str, rank: int) -> None:
    """Counts retries of storage in this process, a task of a worker's, as the worker's."""
    counter, tags = STORAGE_RETRIES.open(), {"run": run, "rank": str(rank)}
    storage.on_retry[:] = [lambda: counter.inc(1, tags)]
