"""Work that takes the ranks unequal time, in rounds that end together.

Texts of different lengths take minutes longer on one rank than on another. In a collective that
comes only after all of them the fast ranks would wait for all of that, and time out; so the ranks
meet after every batch, those that have none left too, and a wait is one of a batch at most.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

from renee_ray.parallel.collectives import Ranks, row_counts
from renee_ray.parallel.recorder import Recorder

log = logging.getLogger(__name__)

SAY_SECONDS = 15.0
"""Between two lines of progress."""


@dataclass
class Rounds:
    """Rounds of one rank; all ranks have them at the same time, until every one is through.

    what: what is embedded, for people; total: how many of these all ranks have, 0 if unknown.
    recorder: is told what is done; say: is given a line of it now and then, on rank 0.
    done: of all ranks, so far.
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
        """Ends a round in which this rank has done `rows`; returns those of all ranks."""
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
        """Takes part until no rank has anything left."""
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
