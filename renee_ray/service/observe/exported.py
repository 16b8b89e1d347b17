"""The series that a worker exports at its node's Prometheus endpoint, through Ray.

A name is `ray_renee_ray_NAME` there, a counter's `ray_renee_ray_NAME_total`. Every
series has the tags `run`, the last part of the run's path, and `rank`. Only sums and last values
are sent, every few seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from ray.util.metrics import Counter, Gauge

from renee_ray.rank.recorder import GPU_MEMORY, KINDS, Pace, Totals

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


counter, gauge = partial(Metric, Counter), partial(Metric, Gauge)
PHASE_SECONDS = counter(
    "phase_seconds",
    "Seconds by phase of a step and kind of phase (data, own, collective, pause)",
    ("phase", "kind"),
)
TOTALS = {
    "steps": counter("steps", "Steps made, skipped ones included"),
    "skipped": counter("skipped_steps", "Steps skipped: a value not finite"),
    "rows": counter("rows", "Points that this rank trained on"),
    "label_rows": counter("label_rows", "This rank's labels times points of global batches"),
    "tokens": counter("tokens", "Tokens of this rank's points"),
    "cells": counter("token_cells", "The same, padded"),
    "checkpoints": counter("checkpoints", "Checkpoints that have ended"),
    "checkpoint_seconds": counter("checkpoint_seconds", "Seconds from their begin to their end"),
    "checkpoint_bytes": counter("checkpoint_bytes", "Bytes of them that this rank wrote"),
}
PACE = {
    "step": gauge("step_seconds", "Seconds of a step, mean of a sample"),
    "own": gauge("own_step_seconds", "The same without waiting for ranks"),
}
RECORD = {
    "step": gauge("step", "Steps done; rank 0"),
    "total_steps": gauge("total_steps", "Steps of the whole run; rank 0"),
    "epoch": gauge("epoch", "Epochs done; rank 0"),
    "loss": gauge("loss", "Sampled loss of a point; rank 0"),
}
VALIDATION = gauge("validation", "Last validation, percent; rank 0", ("metric",))
GPU_GIB = gauge("gpu_gib", "Memory of a GPU by kind; rank 0", ("kind",))
METRICS = (
    PHASE_SECONDS, *TOTALS.values(), *PACE.values(), *RECORD.values(), VALIDATION,
    GPU_GIB,
)  # fmt: skip


class Exported:
    """The series of one worker, in its process."""

    def __init__(self, run: str, rank: int) -> None:
        self._tags = {"run": run, "rank": str(rank)}
        self._series = {m.name: m.open() for m in METRICS}
        self._before = Totals()

    def totals(self, now: Totals) -> None:
        """Adds the difference to the last call's totals."""
        before, self._before = self._before, now
        for phase, kind in KINDS.items():
            added = now.seconds[phase] - before.seconds[phase]
            self._add(PHASE_SECONDS, added, phase=phase, kind=kind)
        for name, metric in TOTALS.items():
            self._add(metric, getattr(now, name) - getattr(before, name))

    def pace(self, own: Pace) -> None:
        for name, metric in PACE.items():
            self._set(metric, getattr(own, name))

    def record(self, record: Mapping[str, Any]) -> None:
        for name, metric in RECORD.items():
            self._set(metric, record[name])
        for name in GPU_MEMORY:
            if record[name] is not None:
                self._set(GPU_GIB, record[name], kind=name.split("_")[1])

    def validation(self, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._set(VALIDATION, value, metric=name)

    def _add(self, metric: Metric, amount: float, /, **tags: str) -> None:
        if amount > 0:  # Ray refuses to add nothing: what never happened has no series
            self._series[metric.name].inc(amount, self._tags | tags)

    def _set(self, metric: Metric, value: float, /, **tags: str) -> None:
        self._series[metric.name].set(value, self._tags | tags)
