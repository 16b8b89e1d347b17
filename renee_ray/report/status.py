"""The state of a run, from the files in its directory alone: no Ray, no cluster.

RUN/status.json is written by the run's first worker every ten seconds, and by the driver before
the workers are there and when the run has failed:

    state, reason               the writer's state; time_s: when it wrote
    launched_s, restarts        when the command was given; how often workers were started anew
    record                      the last one of training/loop: step, loss, rows a second, ...
    step, phase, phase_s        steps done, that worker's phase, and for how long
    doing                       progress of a long phase before the first step
    ranks                       for every worker: node, seconds of a step, its own part of it
    starts                      each start of workers: step, time_s, workers; the newest MOST_STARTS
    environment, command        of rank 0: device, versions, ...; what was typed
    checkpoint, evaluation, best, skipped
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import RenderableType, group
from rich.table import Column, Table
from rich.text import Text

from renee_ray.data.storage import read_file, read_json
from renee_ray.errors import ReneeError

STATUS_FILE, STATUS_VERSION = "status.json", 1
SILENT_S = 60.0
"""Seconds without an update after which a run's state is unknown."""
STARTING_S = 600.0
"""The same while workers are started, which send no updates."""
WAITING_S = 15.0
"""Seconds in a waiting phase after which a run counts as waiting."""
SHOWN_RANKS = 16
MOST_STARTS = 500
GPU_MEMORY = ("gpu_peak_gib", "gpu_reserved_gib", "gpu_total_gib")
"""As in rank/recorder.py, which needs torch, and this does not."""
WAITS_FOR = {
    "data": "for data",
    "evaluation_data": "for validation data",
    "route": "for other workers",
    "gather": "for other workers",
    "scatter": "for other workers",
    "reduce": "for other workers",
    "loss": "for other workers",
}
COLOURS = {"running": "green", "finished": "green", "waiting": "yellow", "failed": "red"}


def read_status(run: str, now: float) -> dict[str, Any]:
    """Reads the state of the run at `run`; `now`: seconds since 1970.

    Returns:
        `state` (running, finished, stopped, waiting, failed or unknown), `reason`, `age_s` of the
        last word, and what is known of: step, total_steps, epoch, epochs, loss, rows_per_second,
        seconds_left, GPU_MEMORY, skipped, restarts, evaluation, best, checkpoint, ranks,
        num_workers, starts, environment, command.

    Raises:
        ReneeError: there is no run.
    """
    if read_file(f"{run}/run.json") is None:
        raise ReneeError(f"{run} is not a run of renee_ray: no run.json; give a run's directory")
    found = read_json(f"{run}/{STATUS_FILE}")
    if found is None:
        raise ReneeError(f"{run} has no {STATUS_FILE}: it has not been trained yet")
    if found.get("format_version") != STATUS_VERSION:
        raise ReneeError(
            f"{run}/{STATUS_FILE} has format version {found.get('format_version')!r} and this "
            f"renee_ray reads {STATUS_VERSION}; use the renee_ray that trains the run"
        )
    try:
        return described(found, now) | {"run": run}
    except (LookupError, TypeError, AttributeError):
        raise damaged(run, STATUS_FILE) from None


def described(content: Mapping[str, Any], now: float) -> dict[str, Any]:
    """Returns what `read_status` returns, from the content of status.json."""
    age = max(0.0, now - content["time_s"])
    state, reason = state_of(content, age)
    record = content.get("record") or {}
    keys = ("total_steps", "epoch", "loss", "rows_per_second", "padding", "seconds_left")
    checkpoint = content.get("checkpoint")
    return {
        "state": state,
        "reason": reason,
        "age_s": age,
        "step": content.get("step", record.get("step")),
        **{key: record.get(key) for key in keys + GPU_MEMORY},
        "epochs": content.get("epochs"),
        "skipped": content.get("skipped", 0),
        "restarts": content.get("restarts", 0),
        "evaluation": content.get("evaluation"),
        "best": content.get("best"),
        "metric": content.get("metric"),
        "checkpoint": checkpoint and checkpoint | {"age_s": max(0.0, now - checkpoint["time_s"])},
        "ranks": content.get("ranks", []),
        "starts": content.get("starts", []),
        **{key: content.get(key) for key in ("num_workers", "environment", "command")},
    }


def state_of(content: Mapping[str, Any], age: float) -> tuple[str, str]:
    """Returns (state, reason) of a run whose status.json is `age` seconds old."""
    state, reason = content["state"], content.get("reason", "")
    if state in ("finished", "stopped", "failed"):
        return state, reason
    if age > (STARTING_S if state == "waiting" else SILENT_S):
        before = f"waiting {reason}" if state == "waiting" else f"in phase `{content.get('phase')}`"
        return "unknown", f"nothing was heard for {duration(age)}; it was {before}"
    if state == "waiting":
        return state, reason
    phase, seconds = content.get("phase", ""), content.get("phase_s", 0.0) + age
    if phase in WAITS_FOR and content.get("phase_s", 0.0) > WAITING_S:
        return "waiting", f"{WAITS_FOR[phase]}, for {duration(seconds)}"
    return "running", content.get("doing") or f"phase `{phase}`"


def duration(seconds: float) -> str:
    """Formats seconds as `0:42` or `3:07:00`."""
    hours, rest = divmod(int(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


@group()
def status_text(status: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Shows the status for a terminal."""
    title = Text(f"{status['run']}: ")
    title.append(status["state"], style=f"bold {COLOURS.get(status['state'], 'yellow')}")
    if status["reason"]:
        title.append(f", {status['reason']}")
    yield title
    facts = Table.grid(padding=(0, 2))
    for name, text in _facts(status):
        facts.add_row(name, Text(text))
    yield facts
    if status["ranks"]:
        yield _ranks(status["ranks"])


def _facts(status: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "last heard", f"{duration(status['age_s'])} ago"
    if status["step"] is not None:
        of = "" if status["total_steps"] is None else f" of {status['total_steps']:,}"
        yield "step", f"{status['step']:,}{of}"
    if status["loss"] is not None:
        of = "" if status["epochs"] is None else f" of {status['epochs']}"
        yield "epoch", f"{status['epoch']:.2f}{of}"
        yield "loss", f"{status['loss']:.3f}"
        yield "speed", f"{status['rows_per_second']:,.0f} rows/s, {status['padding']:.0%} padding"
        if status["state"] in ("running", "waiting"):
            yield "time left", duration(status["seconds_left"])
    peak, reserved, total = (status.get(name) for name in GPU_MEMORY)
    if peak is not None:
        yield "GPU memory", f"peak {peak:.1f} GiB, {reserved:.1f} reserved, of {total:.1f}"
    for name in ("evaluation", "best"):
        if status[name]:
            yield f"{name.replace('evaluation', 'last')} validation", _evaluation(status, name)
    if status["checkpoint"]:
        checkpoint = status["checkpoint"]
        yield (
            "last checkpoint",
            f"step {checkpoint['step']:,}, {duration(checkpoint['age_s'])} ago",
        )
    yield "skipped steps", str(status["skipped"])
    if len(status["starts"]) > 1:
        each = (f"{start['step']:,} ({start['workers']})" for start in status["starts"])
        yield "started at step", f"{', '.join(each)}; workers in brackets"
    yield "restarts after failures", str(status["restarts"])


def _evaluation(status: Mapping[str, Any], name: str) -> str:
    found, first = status[name], status["metric"] or "P@1"
    shown = [first, *(each for each in ("P@1", "P@5", "PSP@1", "PSP@5") if each != first)]
    figures = [f"{key} {found['metrics'][key]:.2f}" for key in shown if key in found["metrics"]]
    return f"{'  '.join(figures)}  (step {found['step']:,})"


def _ranks(ranks: list[dict[str, Any]]) -> Table:
    slowest = sorted(ranks, key=lambda each: -each["own_s"])[:SHOWN_RANKS]
    more = f", the {SHOWN_RANKS} slowest of {len(ranks)}" if len(ranks) > SHOWN_RANKS else ""
    rank, *times = (Column(name, justify="right") for name in ("rank", "step", "own part", "data"))
    title = f"Workers{more}: milliseconds of a step"
    table = Table(rank, "node", *times, "", title=title, title_justify="left")
    for each in sorted(slowest, key=lambda each: int(each["rank"])):
        shown = (f"{1000 * each[key]:.1f}" for key in ("step_s", "own_s", "data_s"))
        slow = Text("straggler" if each["slow"] else "", style="red")
        table.add_row(str(each["rank"]), each["node"], *shown, slow)
    return table


def damaged(run: str, name: str) -> ReneeError:
    """Makes the error of a file of a run that cannot be read."""
    return ReneeError(f"{run}/{name} is damaged; wait for the run to write it again")
