"""Rounds of work that take the ranks unequal time and that end together.

Texts of different lengths take one rank minutes longer than another. If the ranks met only at the
end, the fast ones would run into the timeout of the collective. So they meet after every batch,
also those that have no batch left, and no rank waits longer than one batch takes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

from renee_ray.rank.collectives import Ranks, row_counts
from renee_ray.rank.recorder import Recorder

log = logging.getLogger(__name__)

SAY_SECONDS = 15.0
"""Seconds between two lines of progress."""


@dataclass
class Rounds:
    """The rounds of one rank, which all ranks enter together until every one is through.

    what: what is embedded, for people; total: how many of these all ranks have, 0 if unknown.
    recorder: is told the progress; say: is given a line of it now and then, on rank 0.
    done: embedded by all ranks so far.
    """

    ranks: Ranks
    what: str
    total: int = 0
    recorder: Recorder = field(default_factory=Recorder)
    say: Callable[[str], None] = log.info
    done: int = 0

    def __post_init__(self) -> None:
        self._began = self._said = time.monotonic()

    def add(self, rows: int) -> int:
        """Ends a round in which this rank has embedded `rows`; returns the sum over all ranks."""
        self.recorder.enter("first_weights")
        everyone = sum(row_counts(self.ranks, rows))
        self.done += everyone
        now = time.monotonic()
        self.recorder.doing = self._progress(now - self._began)
        if self.ranks.rank == 0 and now - self._said >= SAY_SECONDS:
            self._said = now
            self.say(self.recorder.doing)
        return everyone

    def finish(self) -> None:
        """Takes part in rounds until no rank has anything left."""
        while self.add(0):
            pass
        self.recorder.doing = ""

    def _progress(self, seconds: float) -> str:
        rate = self.done / max(seconds, 1e-9)
        text = f"{self.what} embedded: {self.done:,}"
        if not self.total:
            return f"{text}, {rate:,.0f} a second"
        left = timedelta(seconds=round((self.total - self.done) / rate)) if rate else "?"
        return f"{text} of {self.total:,}, {rate:,.0f} a second, {left} left"
