"""Seconds of a rank by phase of the step, and counts of its work, for others to read.

A step is cut into phases without a gap: entering one ends the one before it. Their kinds are:

    data         waiting for the next batch
    own          work that waits for nobody
    collective   sending, and waiting for the other ranks to come
    pause        work outside of steps: first weights, validation, checkpoints

On a GPU a phase's time is the device's: an event is recorded where a phase begins and read when
the device has passed it, so nothing is synchronised. Elsewhere it is the host's.

Every rank enters the same phases in the same order, so the number of phases entered so far tells
which rank is behind. A thread reads it that goes on while this one waits in a collective.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import TypeVar

import torch

from renee_ray.rank.collectives import Ranks, gather_numbers

T = TypeVar("T")

KINDS = {
    "data": "data",
    "encoder_forward": "own",
    "route": "collective",
    "gather": "collective",
    "classifier": "own",
    "scatter": "collective",
    "encoder_backward": "own",
    "reduce": "collective",
    "optimizer": "own",
    "loss": "collective",
    "start": "pause",
    "first_weights": "pause",
    "evaluation": "pause",
    "evaluation_data": "pause",
    "checkpoint": "pause",
    "end": "pause",
}
"""Phases in the order of a step, then pauses, with their kinds. With `encoder.gradient=mean` the
encoder's gradients are exchanged in `encoder_backward`."""


@dataclass(frozen=True)
class Totals:
    """Sums of one rank since its process began.

    seconds: by phase; rows: own points; label_rows: own labels times points of global batches;
    tokens, cells: of own rows, without and with padding; checkpoint_seconds: from the beginning
    of a checkpoint to its end, whatever training does meanwhile; checkpoint_bytes: written by
    this rank.
    """

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    steps: float = 0
    skipped: float = 0
    rows: float = 0
    label_rows: float = 0
    tokens: float = 0
    cells: float = 0
    checkpoints: float = 0
    checkpoint_seconds: float = 0
    checkpoint_bytes: float = 0

    def of_kind(self, *kinds: str) -> float:
        return sum(self.seconds[phase] for phase, kind in KINDS.items() if kind in kinds)


GPU_MEMORY = ("gpu_peak_gib", "gpu_reserved_gib", "gpu_total_gib")
"""What `gpu_memory` returns."""
COUNTS = tuple(each.name for each in fields(Totals) if each.name != "seconds")


@dataclass(frozen=True)
class Pace:
    """Mean seconds of a rank's steps since the last sample.

    step: the whole step; own: without waiting for other ranks; data: waiting for the next batch.
    """

    step: float
    own: float
    data: float


@dataclass(frozen=True)
class Place:
    """The step and phase that a rank is in.

    step: counted from 1; entered: phases entered so far; seconds: since the last of them.
    """

    step: int
    phase: str
    entered: int
    seconds: float


class Recorder:
    """Records the phases and counts of one rank, whose thread alone calls `enter` and `count`.

    paces: of every rank, in rank order, as of the last sample.
    doing: progress of long work outside of steps, for people.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._clock: _HostClock | _DeviceClock = (
            _DeviceClock() if device is not None and device.type == "cuda" else _HostClock()
        )
        self._counts = {name: 0.0 for name in COUNTS}
        self._sampled = Totals()
        self._place = (0, "start", 0, time.monotonic())
        self.paces: list[Pace] = []
        self.doing = ""

    def enter(self, phase: str, step: int | None = None) -> None:
        """Ends the current phase and begins `phase`; `step`, from 1, where a step begins."""
        before, _, entered, _ = self._place
        assert phase in KINDS
        self._clock.enter(phase)
        # One assignment: another thread sees the place before or after it.
        self._place = (before if step is None else step, phase, entered + 1, time.monotonic())

    def each(self, items: Iterable[T], waiting: str, working: str) -> Iterator[T]:
        """Yields items, in phase `waiting` until one comes and in `working` while it is used."""
        iterator, ended = iter(items), object()
        while True:
            self.enter(waiting)
            item = next(iterator, ended)
            self.enter(working)
            if item is ended:
                return
            yield item  # type: ignore[misc]  # not `ended`

    def count(self, **added: float) -> None:
        """Adds to the totals of these names."""
        for name, amount in added.items():
            self._counts[name] += amount

    def totals(self) -> Totals:
        return Totals(dict(self._clock.seconds), **self._counts)

    def place(self) -> Place:
        step, phase, entered, since = self._place
        return Place(step, phase, entered, time.monotonic() - since)

    def sample(self, ranks: Ranks) -> dict[str, float]:
        """Exchanges the pace since the last sample with all ranks, which all call this.

        Returns:
            this rank's counts since then, by name.
        """
        totals, before = self.totals(), self._sampled
        self._sampled = totals
        steps = max(1, totals.steps - before.steps)

        def mean(*kinds: str) -> float:
            return (totals.of_kind(*kinds) - before.of_kind(*kinds)) / steps

        own = [mean("data", "own", "collective"), mean("data", "own"), mean("data")]
        self.paces = [Pace(*each) for each in gather_numbers(ranks, own)]
        return {name: getattr(totals, name) - getattr(before, name) for name in COUNTS}


def gpu_memory(device: torch.device) -> dict[str, float | None]:
    """Returns GiB of a GPU: the most that this process's tensors took, held for them, and had.

    All are None where the device is no GPU.
    """
    if device.type != "cuda":
        return dict.fromkeys(GPU_MEMORY)
    found = (
        torch.cuda.max_memory_allocated(device),
        torch.cuda.max_memory_reserved(device),
        torch.cuda.get_device_properties(device).total_memory,
    )
    return {name: count / 2**30 for name, count in zip(GPU_MEMORY, found, strict=True)}


class _HostClock:
    def __init__(self) -> None:
        self.seconds = dict.fromkeys(KINDS, 0.0)
        self._phase, self._since = "start", time.perf_counter()

    def enter(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[self._phase] += now - self._since
        self._phase, self._since = phase, now


class _DeviceClock:
    """Sums the times between events on the device's timeline, once it has passed them."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(KINDS, 0.0)
        self._marks: deque[tuple[str, torch.cuda.Event]] = deque()
        self._unused: list[torch.cuda.Event] = []
        self.enter("start")

    def enter(self, phase: str) -> None:
        event = self._unused.pop() if self._unused else torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((phase, event))
        while len(self._marks) > 1 and self._marks[1][1].query():
            ended, begun = self._marks.popleft()
            self.seconds[ended] += begun.elapsed_time(self._marks[0][1]) / 1000
            self._unused.append(begun)
