"""Finds the worker that is slow, and the one that did not come to a collective.

Each worker sends a heartbeat every few seconds, from a thread that goes on while it waits in a
collective. A process that is stopped or cut off sends none; one that hangs elsewhere says where.
Everything here only decides, so all of it is tested without a cluster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median_low

from renee_ray.parallel.recorder import KINDS, Pace

PATIENT_S = 30.0
"""Seconds that workers wait for one of them before the driver says so."""
BEFORE_STEPS = {"start", "first_weights"}
"""Phases in which there is nothing to save yet."""


def beat_seconds(timeout_s: float) -> float:
    """Returns the seconds between two heartbeats: several fit into a collective's timeout."""
    return max(1.0, min(5.0, timeout_s / 6))


@dataclass(frozen=True)
class Beat:
    """A worker's heartbeat.

    group: number of the workers that started together, ascending; node: where it runs, for
    people; step, phase, entered, seconds: as in parallel.recorder.Place; ended: it has left its
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


@dataclass
class Watch:
    """The driver's view of the newest group of workers.

    timeout_s: timeout of a collective.
    """

    timeout_s: float
    _group: int = -1
    _over: bool = False
    _beats: dict[int, tuple[Beat, float]] = field(default_factory=dict)
    _collective: tuple[int, int] = (-1, -1)
    _missing: set[int] = field(default_factory=set)
    _sentence: str = ""

    @property
    def patience(self) -> float:
        return min(PATIENT_S, self.timeout_s / 2)

    @property
    def training(self) -> bool:
        """Whether the workers are far enough to be asked for a checkpoint."""
        return any(beat.phase not in BEFORE_STEPS for beat, _ in list(self._beats.values()))

    def saw(self, beat: Beat, now: float) -> None:
        """Takes a heartbeat; `now`: seconds of a clock that only goes forward."""
        if beat.group > self._group:
            self._group, self._over, self._beats = beat.group, False, {}
        if beat.group == self._group:
            self._beats[beat.rank] = (beat, now)
            self._over |= beat.ended

    def complaint(self, now: float) -> str | None:
        """Returns a sentence on the workers that others wait for, once for each collective."""
        if self._over or (found := self._look(now)) is None:
            return None
        missing, awaited, sentence = found
        collective = self._group, awaited
        new = collective != self._collective
        # Whoever dies of the wait is silent too, so later looks add nobody to the first.
        if new or missing <= self._missing:
            self._collective, self._missing, self._sentence = collective, missing, sentence
        return f"{sentence}, for at most {self.timeout_s:.0f} s" if new else None

    def _look(self, now: float) -> tuple[set[int], int, str] | None:
        """Finds ranks that others wait for longer than `patience`.

        Returns:
            (those ranks, the phase in which others wait, as phases entered so far, a sentence)
        """
        silence = max(self.patience, 3 * beat_seconds(self.timeout_s))
        beats = {rank: (beat, now - seen) for rank, (beat, seen) in self._beats.items()}
        heard = {rank: (b, b.seconds + ago) for rank, (b, ago) in beats.items() if ago <= silence}
        missing = {
            rank: f"{beat.who()} has sent nothing for {ago:.0f} s; it was in phase "
            f"`{beat.phase}` of step {beat.step}"
            for rank, (beat, ago) in beats.items()
            if rank not in heard
        }
        waiting = [each for each in heard.values() if _waits(each[0])]
        died = (_waits(beats[r][0]) and beats[r][0].seconds > self.patience for r in missing)
        if not waiting and missing and not any(died):
            # One that hangs keeps the CPUs that it reads by, so that others may get no data.
            waiting = [each for each in heard.values() if KINDS[each[0].phase] == "data"]
        if not waiting:
            return None
        # Some may be past it: gloo lets a rank go on that has got all that it needs.
        first, longest = max(waiting, key=lambda each: each[1])
        missing = missing or {
            rank: f"{beat.who()} has been in phase `{beat.phase}` of step {beat.step} "
            f"for {still:.0f} s"
            for rank, (beat, still) in heard.items()
            if beat.entered < first.entered
        }
        if longest <= self.patience or not missing:
            return None
        others = "another worker waits" if len(waiting) == 1 else f"{len(waiting)} others wait"
        sentence = (
            f"{'; '.join(missing.values())}; {others} for {'it' if len(missing) == 1 else 'them'} "
            f"in phase `{first.phase}` of step {first.step}"
        )
        return set(missing), first.entered, sentence

    def blamed(self) -> str:
        """Names who did not come to the collective in which the others waited until its timeout.

        gloo raises then, while NCCL ends the process with SIGABRT. So only heartbeats are asked:
        the last ones were sent from that collective, shortly before the timeout. Returns an empty
        string if the workers ended for another reason.
        """
        group, awaited = self._collective
        beats = [beat for beat, _ in list(self._beats.values())]
        there = [beat for beat in beats if beat.entered == awaited]
        failed_itself = any(beat.ended and beat.entered < awaited for beat in beats)
        died_there = any(map(self._died, there)) and group == self._group
        return self._sentence if died_there and not failed_itself else ""

    def _died(self, beat: Beat) -> bool:
        """Whether this may be the last heartbeat before the timeout of a collective."""
        return beat.seconds >= self.timeout_s - 2 * beat_seconds(self.timeout_s)


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
