"""Finds the worker that is slow, and the one that did not come to a collective.

Each worker sends a heartbeat every few seconds, from a thread that goes on while it waits in a
collective. A process that is stopped or cut off sends none; one that hangs elsewhere says where.
Everything here only decides, so all of it is tested without a cluster.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median_low

from renee_ray.rank.recorder import KINDS, Pace

PATIENT_S, SILENT_S = 30.0, 120.0
"""Seconds before the driver says that workers wait for one of them, and that nobody is heard."""
BEFORE_STEPS = {"start", "first_weights"}
"""Phases in which there is nothing to save yet."""


def beat_seconds(timeout_s: float) -> float:
    """Returns the seconds between two heartbeats: several fit into a collective's timeout."""
    return max(1.0, min(5.0, timeout_s / 6))


@dataclass(frozen=True)
class Beat:
    """A worker's heartbeat.

    group: a random number of the workers that started together; node: where it runs, for
    people; step, phase, entered, seconds: as in rank.recorder.Place; ended: it has left its
    training function, so the whole group is at its end.
    """

    group: int
    rank: int
    node: str
    pid: int
    step: int
    phase: str
    entered: int
    seconds: float
    ended: bool = False

    def who(self) -> str:
        return f"rank {self.rank} on {self.node} (process {self.pid})"


@dataclass(frozen=True)
class Found:
    """Ranks that others waited for.

    group: theirs; front: the furthest place then, as phases entered; missing: those ranks;
    waiting: the place of each that waited, by rank; sentence: on both; limit: how long they may.
    """

    group: int
    front: int
    missing: set[int]
    waiting: dict[int, int]
    sentence: str
    limit: str


@dataclass
class Watch:
    """The driver's view of the newest group of workers.

    timeout_s: timeout of a collective.
    """

    timeout_s: float
    _group: int = -1
    _groups: set[int] = field(default_factory=set)
    _over: bool = False
    _heard_s: float | None = None
    _beats: dict[int, tuple[Beat, float]] = field(default_factory=dict)
    _found: Found | None = None

    @property
    def patience(self) -> float:
        return min(PATIENT_S, self.timeout_s / 2)

    @property
    def training(self) -> bool:
        """Whether the workers are far enough to be asked for a checkpoint."""
        return any(beat.phase not in BEFORE_STEPS for beat, _ in list(self._beats.values()))

    def saw(self, beat: Beat, now: float) -> None:
        """Takes a heartbeat; `now`: seconds of a clock that only goes forward."""
        if beat.group not in self._groups:
            self._groups.add(beat.group)
            self._group, self._over, self._beats = beat.group, False, {}
        if beat.group == self._group:
            self._heard_s = now
            self._beats[beat.rank] = (beat, now)
            self._over |= beat.ended

    def complaint(self, now: float) -> str | None:
        """Returns a sentence on the workers that others wait for, once for each collective.

        Or one that nobody is heard, once until a worker is heard again.
        """
        if self._heard_s is None:
            self._heard_s = now
        if now - self._heard_s > SILENT_S and self._group < 0:
            self._heard_s = math.inf
            return (
                f"no worker has begun within {SILENT_S:.0f} s: they wait for room in the cluster "
                f"(see `ray status`), or load the model"
            )
        if now - self._heard_s > SILENT_S:
            self._heard_s = math.inf
            return (
                f"no worker has been heard for {SILENT_S:.0f} s: if a node is gone, the run waits "
                f"until the cluster has room for its workers again (see `ray status`)"
            )
        if self._over or (found := self._look(now)) is None:
            return None
        before = self._found
        if before is None or (before.group, before.front) != (found.group, found.front):
            self._found = found
            return found.sentence + found.limit
        # Whoever dies of the wait is silent too, so later looks add nobody to the first.
        if found.missing <= before.missing:
            self._found = found
        return None

    def _look(self, now: float) -> Found | None:
        """Finds ranks that others wait for longer than `patience`."""
        silence = max(self.patience, 3 * beat_seconds(self.timeout_s))
        beats = {rank: (beat, now - seen) for rank, (beat, seen) in self._beats.items()}
        front = max((beat.entered for beat, _ in beats.values()), default=0)
        heard = {rank: (b, b.seconds + ago) for rank, (b, ago) in beats.items() if ago <= silence}
        missing = {
            rank: f"{beat.who()} has sent nothing for {ago:.0f} s; it was in phase "
            f"`{beat.phase}` of step {beat.step}"
            for rank, (beat, ago) in beats.items()
            if rank not in heard
        }
        waiting = {rank: each for rank, each in heard.items() if _waits(each[0])}
        died = (_waits(beats[r][0]) and beats[r][0].seconds > self.patience for r in missing)
        if missing and not any(died):
            # gloo lets a rank go on that has got all that it needs, and one that hangs keeps the
            # CPUs that it reads by: so those behind may wait for it too, and those for data.
            waiting |= {r: each for r, each in heard.items() if KINDS[each[0].phase] == "data"}
        else:
            waiting = {rank: each for rank, each in waiting.items() if each[0].entered == front}
        behind = {rank: each for rank, each in heard.items() if each[0].entered < front}
        # One behind may wait itself, for another further behind.
        own = {r: each for r, each in behind.items() if KINDS[each[0].phase] != "collective"}
        missing = missing or {
            rank: f"{beat.who()} has been in phase `{beat.phase}` of step {beat.step} "
            f"for {still:.0f} s"
            for rank, (beat, still) in (own or behind).items()
        }
        first, longest = max(waiting.values(), key=lambda each: each[1], default=(None, 0.0))
        if first is None or longest <= self.patience or not missing:
            return None
        others = "another worker waits" if len(waiting) == 1 else f"{len(waiting)} others wait"
        sentence = (
            f"{'; '.join(missing.values())}; {others} for {'it' if len(missing) == 1 else 'them'} "
            f"in phase `{first.phase}` of step {first.step}"
        )
        places = {rank: beat.entered for rank, (beat, _) in waiting.items()}
        inside = KINDS[first.phase] == "collective"
        limit = f", for at most {self.timeout_s:.0f} s" if inside else ""
        return Found(self._group, front, {*missing}, places, sentence, limit)

    def blamed(self) -> str:
        """Names who did not come to the collective in which the others waited until its timeout.

        gloo raises then, while NCCL ends the process with SIGABRT. So only heartbeats are asked:
        the last ones were sent from that collective, shortly before the timeout. Returns an empty
        string if the workers ended for another reason.
        """
        if (found := self._found) is None or found.group != self._group:
            return ""
        beats = {rank: beat for rank, (beat, _) in list(self._beats.items())}
        to_the_end = self.timeout_s - 2 * beat_seconds(self.timeout_s)
        waited = any(
            beat.entered == found.waiting.get(rank) and beat.seconds >= to_the_end
            for rank, beat in beats.items()
        )
        failed_itself = any(
            beat.ended and beat.entered < found.front and rank not in found.waiting
            for rank, beat in beats.items()
        )
        return found.sentence if waited and not failed_itself else ""


def _waits(beat: Beat) -> bool:
    """Whether it may be waiting for others.

    The host of a GPU runs ahead of its collectives, but waits for its device in such a phase only.
    """
    return KINDS[beat.phase] in ("collective", "pause")


@dataclass
class Stragglers:
    """Ranks whose own time a step exceeds the median by a factor, over windows of time.

    window_s: length of a window in seconds.
    slow: ranks that were slow in the last window.
    """

    factor: float
    window_s: float
    slow: list[int] = field(default_factory=list)
    _started: float | None = None
    _sums: list[float] = field(default_factory=list)

    def add(self, paces: Sequence[Pace], now: float) -> list[tuple[int, float]]:
        """Takes one sample; at the end of a window, returns slow ranks as (rank, times median)."""
        if self._started is None or len(self._sums) != len(paces):
            self._started, self._sums = now, [0.0] * len(paces)
        self._sums = [sum_ + pace.own for sum_, pace in zip(self._sums, paces, strict=True)]
        if now - self._started < self.window_s:
            return []
        # The lower median: with two ranks, the mean of both would hide the slow one.
        middle = median_low(self._sums)
        found = [
            (rank, own / middle)
            for rank, own in enumerate(self._sums)
            if middle > 0 and own > self.factor * middle
        ]
        self.slow = [rank for rank, _ in found]
        self._started = None
        return found
