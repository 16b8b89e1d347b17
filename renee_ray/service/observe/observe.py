"""Observes a run: heartbeats, metrics, status.json, curves and log lines.

Every worker has an `Observer`, which the training thread hands records to. The observer's thread
sends a heartbeat to the driver and sums to Prometheus every few seconds. Another thread, of rank
0, writes status.json and history.json. None of them can fail the training or make a step wait.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shlex
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from renee_ray.checkpoint.state import State
from renee_ray.config.schema import RunConfig
from renee_ray.errors import LeaseLost, ReneeError, reason, redacted
from renee_ray.rank.collectives import Ranks, all_sum, gather_bytes
from renee_ray.rank.recorder import KINDS, Recorder, Totals
from renee_ray.report.run import write_report
from renee_ray.report.status import MOST_STARTS, STATUS_FILE, STATUS_VERSION
from renee_ray.service.cluster.connect import node_name
from renee_ray.service.cluster.driver_channel import DriverChannel
from renee_ray.service.observe.exported import Exported
from renee_ray.service.observe.logs import log_lines
from renee_ray.service.observe.progress import evaluation_line, line
from renee_ray.service.observe.sinks import Sinks
from renee_ray.service.observe.versions import environment
from renee_ray.service.observe.watch import Beat, Stragglers, Watch, beat_seconds
from renee_ray.service.run.directory import HISTORY_FILE, RunDirectory
from renee_ray.service.run.history import BackgroundWriter, History

log = logging.getLogger(__name__)

STATUS_SECONDS = 10.0
"""Seconds between two writes of status.json."""
LINE_SECONDS = 30.0
"""Seconds between two lines of progress in rank 0's log."""
CLOSE_S, FAILED_CLOSE_S = 30.0, 5.0
"""Seconds for which the end of a run, or of a worker that fails, waits for these files."""
FLUSH_S = 5.0
"""Seconds for which a checkpoint, beside training, waits for the curves up to it."""


class Observer:
    """Observes one worker, as a context around all that it does; all ranks enter it together.

    Args:
        launched_s: when the driver started this job: tells a restart from a resumption.
        history: the curves up to `state` on rank 0; None on other ranks.

    recorder: training writes its phases to it; stopped: whether training ended before its end.
    """

    stopped = False

    def __init__(
        self,
        config: RunConfig,
        ranks: Ranks,
        device: torch.device,
        channel: DriverChannel,
        state: State,
        launched_s: float,
        history: History | None,
    ) -> None:
        self._config, self._ranks, self._channel, self._state = config, ranks, channel, state
        self.recorder = Recorder(device)
        self._node, self._nodes, self._group = node_name(), [""], 0
        self._exported = Exported(run_name(config), ranks.rank)
        settings = config.observe
        self._stragglers = Stragglers(settings.straggler_factor, settings.straggler_window_s)
        self._status: Status | None = None
        if history is not None:
            self._status = Status(config, state, launched_s, history)
        self._before, self._last_line = Totals(), 0.0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="observe", daemon=True)

    def __enter__(self) -> Observer:
        ranks = self._ranks
        log_format = self._config.observe.log_format
        log_lines(log_format, run_name(self._config), ranks.rank, self.recorder)
        self._nodes = [name.decode() for name in gather_bytes(ranks, self._node.encode())]
        # A random number, since the clocks of nodes may not agree; rank 0's, so that all have it.
        drawn = secrets.randbits(48) if ranks.rank == 0 else 0
        self._group = int(all_sum(ranks, torch.tensor(drawn)))
        if self._status is not None:
            self._status.start(self._nodes)
        self._thread.start()
        log.info("rank %d of %d on %s, after step %d", ranks.rank, ranks.num_ranks, self._node,
                 self._state.step)  # fmt: skip
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        place = self.recorder.place()
        if error is not None:
            # All ranks fail when one does: rank 0 warns, which the driver shows; others log.
            log.log(
                logging.INFO if self._ranks.rank else logging.WARNING,
                "rank %d on %s stops in phase `%s` of step %d: %s",
                self._ranks.rank, self._node, place.phase, place.step, reason(error),
            )  # fmt: skip
        self._closed.set()
        self._thread.join(5)
        self._tell(ended=True)
        if self._status is None:
            return
        if error is None:
            self._status.sinks.close()
            self._status.ended(self.recorder, "stopped" if self.stopped else "finished")
        else:
            self._status.writer.close(FAILED_CLOSE_S)

    def record(self, record: dict[str, Any]) -> None:
        """Takes a record of training/loop, whose recorder has just exchanged the paces."""
        slow = self._stragglers.add(self.recorder.paces, time.monotonic())
        if self._status is None:
            return
        for rank, times in slow:
            log.warning(
                "rank %d on %s is slow: %.1f times the median of all in its own part of a step",
                rank, self._nodes[rank], times,
            )  # fmt: skip
        self._channel.send(record)
        self._exported.record(record)
        self._status.sinks.record(record, self._phases())
        self._status.sampled(record, self.recorder, self._stragglers.slow)
        if time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            log.info("%s", line(record))

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        if self._status is not None:
            if self._state.evaluation is not None:
                self._status.history.evals.append(self._state.evaluation | {"time_s": time.time()})
            self._exported.validation(metrics)
            self._status.sinks.validation(step, metrics)
            log.info("validation after step %d: %s", step, metrics)
            self._channel.say(evaluation_line(step, metrics))

    def write_history(self) -> None:
        """Hands the curves to the thread that writes them."""
        if self._status is not None:
            self._status.writer.put(HISTORY_FILE, self._status.history.content())

    def flush_history(self) -> None:
        """Waits for the curves, FLUSH_S at most, so that no checkpoint is ahead of them."""
        if self._status is not None:
            self._status.writer.flush(FLUSH_S)

    def checkpointed(self, step: int, seconds: float, written: int) -> None:
        """Notes that the checkpoint of `step` has ended; this rank wrote `written` bytes of it."""
        self.recorder.count(checkpoints=1, checkpoint_seconds=seconds, checkpoint_bytes=written)
        if self._status is not None:
            done = {"step": step, "time_s": time.time(), "seconds": seconds}
            self._status.content["checkpoint"] = done
            log.info("checkpoint of step %d: %.1f s, %d bytes of rank 0", step, seconds, written)

    def _phases(self) -> dict[str, float]:
        """Returns the seconds a step by phase since the last record."""
        now, before = self.recorder.totals(), self._before
        self._before = now
        steps = max(1, now.steps - before.steps)
        return {
            phase: (now.seconds[phase] - before.seconds[phase]) / steps
            for phase, kind in KINDS.items()
            if kind != "pause"
        }

    def _run(self) -> None:
        while True:
            self._tell()
            status = self._status
            if status is not None and time.monotonic() - status.written >= STATUS_SECONDS:
                status.write(self.recorder)
            if self._closed.wait(beat_seconds(self._config.timeout_s)):
                return

    def _tell(self, *, ended: bool = False) -> None:
        place = self.recorder.place()
        beat = Beat(
            self._group, self._ranks.rank, self._node, os.getpid(),
            place.step, place.phase, place.entered, place.seconds, ended,
        )  # fmt: skip
        self._channel.send({"beat": asdict(beat)})
        self._exported.totals(self.recorder.totals())
        if self.recorder.paces:
            self._exported.pace(self.recorder.paces[self._ranks.rank])


class Status:
    """Writes RUN/status.json, which renee_ray/report/status.py reads, and RUN/history.json."""

    sinks: Sinks

    def __init__(
        self, config: RunConfig, state: State, launched_s: float, history: History
    ) -> None:
        self._config, self._state, self._launched_s = config, state, launched_s
        self._directory = RunDirectory(config.output)
        self.history, self.writer = history, BackgroundWriter(self._directory)
        self.content: dict[str, Any] = {}
        self._nodes: list[str] = []
        self.written = -STATUS_SECONDS

    def start(self, nodes: list[str]) -> None:
        """Begins a group of workers on these nodes, and the thread that writes."""
        self._nodes = nodes
        before = quietly_read(self._directory)
        again = before.get("launched_s") == self._launched_s and before.get("groups", 0) > 0
        if again:
            step = self._state.step
            log.warning("the workers were started again; they go on after step %d", step)
        self.content = before | {
            "format_version": STATUS_VERSION,
            "state": "running",
            "reason": "",
            "launched_s": self._launched_s,
            "groups": before.get("groups", 0) + 1 if again else 1,
            "restarts": before.get("restarts", 0) + again,
            "num_workers": len(nodes),
            "starts": [
                *before.get("starts", [])[1 - MOST_STARTS :],
                {"step": self._state.step, "time_s": time.time(), "workers": len(nodes)},
            ],
            "environment": environment(),
            "epochs": self._config.epochs,
            "ranks": [],
            "record": self.history.steps[-1] if self.history.steps else None,
        }
        self.writer.start()
        self.sinks = Sinks(self._config, self._state.step)

    def sampled(self, record: dict[str, Any], recorder: Recorder, slow: list[int]) -> None:
        self.history.add(record)
        self.content["record"] = record
        self.content["ranks"] = [
            {
                "rank": rank, "node": self._nodes[rank], "step_s": pace.step, "own_s": pace.own,
                "data_s": pace.data, "slow": rank in slow,
            }
            for rank, pace in enumerate(recorder.paces)
        ]  # fmt: skip

    def ended(self, recorder: Recorder, state: str) -> None:
        self.content |= {"state": state, "reason": ""}
        self.write(recorder)
        self.writer.close(CLOSE_S)

    def write(self, recorder: Recorder) -> None:
        self.written, place = time.monotonic(), recorder.place()
        self.content |= {
            "time_s": time.time(),
            "step": self._state.step,
            "phase": place.phase,
            "phase_s": place.seconds,
            "doing": recorder.doing,
            "skipped": self._state.skipped,
            "evaluation": self._state.evaluation,
            "best": self.history.best(self._config.evaluation.metric),
            "metric": self._config.evaluation.metric,
        }
        self.writer.put(STATUS_FILE, dict(self.content))


@contextlib.contextmanager
def following(config: RunConfig, watch: Watch, launched_s: float) -> Iterator[None]:
    """Writes the driver's part of status.json, and the report however the run ends.

    status.json is written before the workers start, and when the run fails.

    Raises:
        ReneeError: a collective timed out, with the worker that did not come; other errors
            come out as they are.
    """
    directory = RunDirectory(config.output)
    _change(directory, "waiting", "for the workers to start", launched_s)
    try:
        yield
    except LeaseLost:  # both files are another driver's
        raise
    except BaseException as error:
        blamed = watch.blamed() if getattr(error, "worker_failures", None) else ""
        found = (
            ReneeError(
                f"the workers gave up waiting for each other: {blamed}; "
                f"look at that node and its log, then give the same command again to resume"
            )
            if blamed
            else error
        )
        ended = ("failed", reason(found))
        if isinstance(error, KeyboardInterrupt):
            ended = "stopped", "at once: what was done after the last checkpoint is done again"
        if _change(directory, *ended, launched_s):  # else storage is away
            _report(config.output)
        if found is error:
            raise
        raise found from error
    _report(config.output)


def _report(run: str) -> None:
    try:
        write_report(run)
    except Exception as error:  # the run itself has ended well
        log.warning("no report is written: %s", reason(error))


def _change(directory: RunDirectory, state: str, cause: str, launched_s: float) -> bool:
    """Changes status.json, and returns whether it is written."""
    before = quietly_read(directory)
    content = before | {
        "format_version": STATUS_VERSION, "state": state, "reason": cause, "time_s": time.time(),
    }  # fmt: skip
    if before.get("launched_s") != launched_s:
        content |= {"launched_s": launched_s, "groups": 0, "command": _command()}
    try:
        directory.write(STATUS_FILE, content, STATUS_SECONDS)
        return True
    except (OSError, ReneeError) as error:
        log.warning("%s is not written: %s", STATUS_FILE, reason(error))
        return False


def _command() -> str:
    """Returns this program's command line; none of a program of others, which may hold secrets."""
    path = Path(sys.argv[0])
    own = path.name == "renee-ray" or path.parts[-2:] == ("renee_ray", "__main__.py")
    return redacted(shlex.join(["renee-ray", *sys.argv[1:]])) if own else ""


def quietly_read(directory: RunDirectory) -> dict[str, Any]:
    """Returns the content of status.json; empty where it is missing or unusable."""
    try:
        found = directory.read(STATUS_FILE)
    except (OSError, ReneeError):
        return {}
    return found if found and found.get("format_version") == STATUS_VERSION else {}


def run_name(config: RunConfig) -> str:
    """Returns the name of a run in metrics and log lines: the last part of its path."""
    return os.path.basename(config.output.rstrip("/"))
