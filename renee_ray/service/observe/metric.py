"""A series at Ray's Prometheus endpoint, and the one that reading tasks add to.

The other series stand in `exported`, which needs torch; a reading task starts without it.
"""

from __future__ import annotations

from dataclasses import dataclass

from ray.util.metrics import Counter, Gauge

from renee_ray.data import storage

TAGS = ("run", "rank")


@dataclass(frozen=True)
class Metric:
    """A series. kind: `counter` or `gauge`; tags: those besides `run` and `rank`."""

    name: str
    kind: str
    description: str
    tags: tuple[str, ...] = ()

    @property
    def exported(self) -> str:
        """The name at the endpoint."""
        return f"ray_{self.name}" + ("_total" if self.kind == "counter" else "")


STORAGE_RETRIES = Metric(
    "renee_ray_storage_retries", "counter", "Operations of storage that were tried again"
)


def count_retries(run: str, rank: int) -> None:
    """Counts retries of storage in this process, a task of a worker's, as the worker's."""
    counter, tags = series(STORAGE_RETRIES), {"run": run, "rank": str(rank)}
    assert isinstance(counter, Counter)
    storage.on_retry[:] = [lambda: counter.inc(1, tags)]


def series(metric: Metric) -> Counter | Gauge:
    """Makes Ray's own object of a series, in this process."""
    kind = Counter if metric.kind == "counter" else Gauge
    return kind(metric.name, metric.description, TAGS + metric.tags)
