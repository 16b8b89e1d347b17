"""Runs that are watched: their metrics, log lines, status, curves, and who holds them up."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from renee_ray.config.overrides import make_config, read_yaml
from renee_ray.config.schema import RunConfig
from renee_ray.data import storage
from renee_ray.errors import ReneeError
from renee_ray.rank.recorder import GPU_MEMORY, KINDS, Totals
from renee_ray.report.status import read_status
from renee_ray.service.cluster.launch import decide_gpu
from renee_ray.service.observe.exported import GPU_GIB, METRICS, RECORD, Exported
from renee_ray.service.train.train import train

from .conftest import (
    LABELS,
    LONGER,
    RECIPE,
    Run,
    descendants,
    end,
    finish,
    run_so_far,
    start,
    started,
    until,
)
from .gateway import free_ports
from .test_dashboard import exported
from .test_train import OTHER_ORDER, assert_same_course, newest_commit, wait_for_commit, workers

pytestmark = pytest.mark.slow

EPOCHS = 20
HELD_S, FREE_S = 0.12, 0.04
TIMEOUT_S = 20
"""Longer than workers take on a busy machine between two steps."""
WORKER = "ray::RayTrainWorker"
GPUS = None if torch.cuda.is_available() else 2
"""That Ray believes to be there, though torch cannot use them."""
IMPATIENT = {storage.PATIENCE: "1"}
"""With storage: between two steps a worker waits for others that much longer than `timeout_s`."""
SERIES = re.compile(r"^(ray_renee_ray_\w+)\{([^}]*)\} (\S+)$", re.MULTILINE)


@dataclass
class Watched:
    """A run and what was seen of it from outside while it went on.

    series: last value by (name, sorted tags without Ray's own); states: of `status`; text: on
    the driver's standard error; lines: of all workers' logs; held: the rank that was held back.
    """

    path: str
    result: dict[str, Any]
    series: dict[tuple[str, tuple[tuple[str, str], ...]], float]
    states: list[dict[str, Any]]
    text: str
    lines: list[dict[str, Any]]
    held: int

    def value(self, name: str, **tags: str) -> float:
        wanted = {"run": "watched", **tags}
        found = [v for (n, t), v in self.series.items() if n == name and wanted.items() <= {*t}]
        assert len(found) == 1, (name, tags, found)
        return found[0]


def scraped(port: int) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    found = {}
    for name, tags, value in SERIES.findall(text):
        pairs = re.findall(r'(\w+)="([^"]*)"', tags)
        ours = tuple(sorted((k, v) for k, v in pairs if k in OUR_TAGS))
        found[name, ours] = float(value)
    return found


OUR_TAGS = {"run", "rank"} | {tag for metric in METRICS for tag in metric.tags}


def json_lines(log: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.splitlines() if line.startswith("{")]


def slow_ranks(states: list[dict[str, Any]]) -> set[int]:
    return {each["rank"] for state in states for each in state["ranks"] if each["slow"]}


@dataclass
class Onlooker:
    """Threads that look at a run from outside, and hold back one of its workers.

    path: of the run; port: where its metrics are; logs: the directory of its workers' logs.
    """

    path: str
    port: int
    logs: Path
    text: io.StringIO = field(default_factory=io.StringIO)
    series: dict[Any, float] = field(default_factory=dict)
    states: list[dict[str, Any]] = field(default_factory=list)
    held: int = -1
    before: int = 0
    over: threading.Event = field(default_factory=threading.Event)

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        threads = [threading.Thread(target=each) for each in (self._look, self._hold_back)]
        for thread in threads:
            thread.start()
        try:
            with contextlib.redirect_stderr(self.text):
                yield
        finally:
            self.over.set()
            for thread in threads:
                thread.join()

    def _look(self) -> None:
        while not self.over.wait(2):
            with contextlib.suppress(OSError):
                self.series.update(scraped(self.port))
            with contextlib.suppress(Exception):
                self.states.append(read_status(self.path, time.time()))

    def _hold_back(self) -> None:
        """Stops it for most of the time, until log line and status call it slow."""
        while not any(name.endswith("_steps_total") for name, _ in [*self.series]):
            if self.over.wait(0.5):
                return
        pid = max(p for p, line in descendants(os.getpid()).items() if WORKER in line)
        (log,) = self.logs.glob(f"worker-*-{pid}.err")
        self.held = json_lines(log.read_text())[0]["rank"]
        said = re.compile(rf"rank {self.held} on .* is slow")
        self.before = len(self.text.getvalue())
        while not self.over.wait(FREE_S) and not (
            said.search(self.text.getvalue(), self.before) and self.held in slow_ranks(self.states)
        ):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
                time.sleep(HELD_S)
                os.kill(pid, signal.SIGCONT)


@pytest.fixture(scope="module")
def ray_with_metrics() -> Iterator[tuple[int, Path]]:
    """A local Ray: (the port of its metrics, the directory of its logs)."""
    (port,), temporary = free_ports(1), tempfile.mkdtemp(prefix="rr-", dir="/tmp")
    started(
        lambda: ray.init(
            "local", num_cpus=4, num_gpus=GPUS, include_dashboard=False, log_to_driver=False,
            _metrics_export_port=port,
            _temp_dir=temporary, _system_config={"metrics_report_interval_ms": 500},
        )
    )  # fmt: skip
    try:
        yield port, Path(temporary, "session_latest", "logs").resolve()
    finally:
        ray.shutdown()
        shutil.rmtree(temporary, ignore_errors=True)


@pytest.fixture(scope="module")
def watched(
    ray_with_metrics: tuple[int, Path],
    dataset: str,
    recipe: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Watched:
    """Two workers, one of which is held back."""
    path, (port, logs) = str(tmp_path_factory.mktemp("runs") / "watched"), ray_with_metrics
    settings = {
        "data": dataset, "output": path, "epochs": EPOCHS,
        "evaluation": {"every": EPOCHS / 2}, "checkpoint": {"every_steps": 0},
        "observe": {
            "log_format": "json", "log_to": ["tensorboard"],
            "straggler_window_s": 4.0, "straggler_factor": 1.4,
        },
    }  # fmt: skip
    onlooker = Onlooker(path, port, logs)
    with onlooker.looking():
        result = train(make_config(RunConfig, read_yaml(recipe), settings))
    other = Exported("other", 0)
    other.totals(Totals(skipped=1))
    other.record(dict.fromkeys(RECORD, 0.0) | {name: 3.5 for name in GPU_MEMORY})
    limit = time.monotonic() + 30
    while time.monotonic() < limit and len({name for name, _ in scraped(port)}) < len(METRICS):
        time.sleep(0.5)
    series = onlooker.series | scraped(port)
    lines = [line for log in logs.glob("worker-*.err") for line in json_lines(log.read_text())]
    text = onlooker.text.getvalue()[onlooker.before :]  # since it is held back
    return Watched(path, result, series, onlooker.states, text, lines, onlooker.held)


def test_metrics_are_at_the_endpoint(watched: Watched) -> None:
    assert {name for name, _ in watched.series} >= {exported(metric) for metric in METRICS}
    seconds = {
        (phase, rank): watched.value(
            "ray_renee_ray_phase_seconds_total", phase=phase, kind=kind, rank=rank
        )
        for phase, kind in KINDS.items()
        for rank in "01"
        if kind in ("own", "collective")
    }
    assert all(0 < value < 200 for value in seconds.values())
    steps = watched.value("ray_renee_ray_steps_total", rank="0")
    assert 0 < steps <= watched.result["step"]
    rows = sum(watched.value("ray_renee_ray_rows_total", rank=rank) for rank in "01")
    assert rows == pytest.approx(steps * RECIPE["batch_size"], rel=0.2)
    labels = sum(watched.value("ray_renee_ray_label_rows_total", rank=rank) for rank in "01")
    assert labels == pytest.approx(rows * LABELS, rel=0.1)
    tokens = watched.value("ray_renee_ray_tokens_total", rank="0")
    assert 0.5 < tokens / watched.value("ray_renee_ray_token_cells_total", rank="0") <= 1
    assert watched.value("ray_renee_ray_checkpoint_bytes_total", rank="0") > 20e6
    assert watched.value("ray_renee_ray_loss", rank="0") > 0
    gib = {tags: gib for (name, tags), gib in watched.series.items() if name == exported(GPU_GIB)}
    kinds = {dict(tags)["kind"] for tags in gib}
    assert kinds == {"peak", "reserved", "total"} and set(gib.values()) == {3.5}, "of `other` alone"
    assert watched.value("ray_renee_ray_validation", rank="0", metric="P@1") > 0
    total = watched.value("ray_renee_ray_total_steps", rank="0")
    assert total == watched.result["step"]


def test_the_worker_that_is_held_back_is_named(watched: Watched) -> None:
    said = re.findall(r"rank (\d) on (\S+ \(\S+\)) is slow: (\S+) times", watched.text)
    assert said, watched.text
    # A busy machine may hold back the other for a window too, but never as long.
    _, rank = max((float(times), int(rank)) for rank, _, times in said)
    assert rank == watched.held, said
    assert {node for _, node, _ in said} == {said[0][1]} and socket.gethostname() in said[0][1]
    assert watched.held in slow_ranks(watched.states)


def test_the_status_goes_with_the_run(watched: Watched) -> None:
    states = [state["state"] for state in watched.states]
    order = list(dict.fromkeys(states))
    assert order[0] == "waiting" and "running" in order
    steps = [state["step"] for state in watched.states if state["step"]]
    assert steps == sorted(steps) and len(set(steps)) > 1
    last = read_status(watched.path, time.time())
    assert (last["state"], last["step"]) == ("finished", watched.result["step"])
    assert last["restarts"] == last["skipped"] == 0
    assert last["evaluation"]["metrics"] == watched.result["validation"]
    assert last["best"]["metrics"]["P@1"] == watched.result["best"]
    assert last["checkpoint"]["step"] == last["step"]
    assert [each["rank"] for each in last["ranks"]] == [0, 1]


def test_log_lines_are_json_with_rank_and_step(watched: Watched) -> None:
    assert {line["rank"] for line in watched.lines} == {0, 1}
    assert all(line["run"] == "watched" for line in watched.lines)
    slow = [line for line in watched.lines if "the median" in line["message"]]
    assert slow and all(line["level"] == "WARNING" and line["step"] > 0 for line in slow)
    started = [line for line in watched.lines if "of 2 on" in line["message"]]
    assert len(started) == 2 and {line["level"] for line in started} == {"INFO"}


@pytest.mark.skipif(not GPUS, reason="torch can use the GPUs")
def test_gpus_that_torch_cannot_use_are_given_to_nobody(
    ray_with_metrics: tuple[int, Path], caplog: pytest.LogCaptureFixture
) -> None:
    assert not decide_gpu("auto", 2)
    assert f"torch {torch.__version__} cannot use the GPUs" in caplog.text
    with pytest.raises(ReneeError, match=r"use_gpu=yes: torch .* cannot use the GPUs"):
        decide_gpu("yes", 1)


def test_curves_are_in_tensorboard(watched: Watched) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(f"{watched.path}/tensorboard", {"scalars": 0})
    events.Reload()
    history = json.loads(Path(watched.path, "history.json").read_text())
    loss = [(each.step, pytest.approx(each.value)) for each in events.Scalars("train/loss")]
    assert loss == [(each["step"], each["loss"]) for each in history["steps"]]
    validation = [each.value for each in events.Scalars("validation/P@1")]
    assert validation == pytest.approx([each["metrics"]["P@1"] for each in history["evals"]])
    assert events.Scalars("seconds/classifier")[-1].value > 0


def hung_worker(process: subprocess.Popen[str], path: str, step: int, watchdog: Path) -> int:
    """Stops a worker after the checkpoint of `step`, long before the next; its process id.

    In a checkpoint the others would wait for its files for 20 minutes.

    Kills it when the other has given up waiting for it.
    """
    before = gave_up(watchdog)
    wait_for_commit(process, path, step)
    victim = max(workers(process))
    os.kill(victim, signal.SIGSTOP)
    until(lambda: len(gave_up(watchdog)) > len(before), process, "the other gives up")
    with contextlib.suppress(ProcessLookupError):
        os.kill(victim, signal.SIGKILL)
    return victim


WATCHDOG = """
import logging, os
def watch(record):
    if record.msg.startswith("rank %d on %s stops in phase"):
        open(f"{__file__}.{os.getpid()}", "w").close()
        if os.path.exists(__file__ + ".on"):
            os.abort()
    return True
logging.getLogger("renee_ray.service.observe.observe").addFilter(watch)
"""
"""Writes a file at the moment when gloo raises in a process of a run. Another file makes the
process end by SIGABRT then, as NCCL's does, whose watchdog leaves no time for an exception."""


def gave_up(watchdog: Path) -> list[Path]:
    """Returns the files of the processes that gave up waiting for a collective."""
    return list(watchdog.parent.glob(f"{watchdog.name}.[0-9]*"))


def test_workers_that_hang_are_named_and_replaced_until_the_run_gives_up(
    trained_longer: Run, dataset: str, recipe: str, tmp_path: Path
) -> None:
    """The first time the other's collective raises, the second time it dies in it."""
    path, watchdog = str(tmp_path / "run"), tmp_path / "sitecustomize.py"
    watchdog.write_text(WATCHDOG)
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = start(
        "train", recipe, f"data={dataset}", f"output={path}", *LONGER, "num_workers=2",
        f"timeout_s={TIMEOUT_S}", "checkpoint.max_failures=1", "checkpoint.every_steps=30",
        env=IMPATIENT | {"PYTHONPATH": paths},
    )  # fmt: skip
    try:
        victims = [hung_worker(process, path, 5, watchdog)]
        wait_for_commit(process, path, newest_commit(path) + 5)  # of workers that are new
        Path(f"{watchdog}.on").touch()
        victims.append(hung_worker(process, path, newest_commit(path) + 5, watchdog))
        done = finish(process)
    finally:
        end(process)
    assert done.status == 1
    assert len(gave_up(watchdog)) == 2
    silent = re.findall(r"rank \d on \S+ \(\S+\) \(process (\d+)\) has sent nothing", done.stderr)
    assert {*map(int, silent)} == {*victims}, done.stderr
    assert re.search("another worker waits for it in phase", done.stderr)
    assert done.stderr.count("the workers were started again") == 1
    sentence = done.stderr.splitlines()[-1]
    assert sentence.startswith("renee-ray: the workers gave up waiting for each other: ")
    assert f"(process {victims[1]}) has sent nothing" in sentence
    status = read_status(path, time.time())
    assert (status["state"], status["restarts"]) == ("failed", 1)
    assert f"(process {victims[1]})" in status["reason"]
    page = Path(path, "report.html").read_text()
    assert "failed, the workers gave up" in page and "; 1 restart;" in page
    assert page.count(f"2 workers started after step {status['starts'][1]['step']}<") == 3
    assert_same_course(run_so_far(path, done), trained_longer, OTHER_ORDER)
