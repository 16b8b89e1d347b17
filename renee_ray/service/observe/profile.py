"""A trace of some steps of a rank, by torch's profiler, where `observe.profile` asks for it."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from renee_ray.config.schema import RunConfig
from renee_ray.data.storage import make_directory, replace_file
from renee_ray.errors import reason

log = logging.getLogger(__name__)

SKIPPED, STEPS = 5, 10
"""Steps before the trace, in which libraries still set themselves up, and steps in it."""


@contextlib.contextmanager
def profiled(config: RunConfig, rank: int) -> Iterator[Callable[[], None]]:
    """Yields what is to be called before each step; OUTPUT/profile/rank-R.json.gz is then written.

    It is written after STEPS steps, or at the end of a run that has fewer.
    """
    if not config.observe.profile:
        yield lambda: None
        return

    def write(profile: torch.profiler.profile) -> None:
        try:
            with tempfile.TemporaryDirectory(prefix="renee-ray-") as scratch:
                trace = Path(scratch) / "trace.json.gz"
                profile.export_chrome_trace(str(trace))
                make_directory(f"{config.output}/profile")
                replace_file(f"{config.output}/profile/rank-{rank}.json.gz", trace.read_bytes())
        except Exception as error:  # the training goes on
            log.warning("no profile is written: %s", reason(error))

    schedule = torch.profiler.schedule(wait=SKIPPED, warmup=1, active=STEPS, repeat=1)
    with torch.profiler.profile(schedule=schedule, on_trace_ready=write) as profile:
        yield profile.step
