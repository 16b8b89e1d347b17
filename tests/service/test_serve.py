"""The whole service beside `renee-ray predict`: overload, killed processes, starts, changes."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.dataset as pads
import pytest
from ray.serve._private import deployment_state
from ray.serve._private.common import DeploymentStatus, DeploymentStatusTrigger
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, DeploymentStatusOverview

import renee_ray
from renee_ray.config.score import TOKEN, ExportConfig, ServeConfig
from renee_ray.errors import ReneeError
from renee_ray.service.serve import serve
from renee_ray.service.serve.deploy import FAILED, PLACING_S, UNPLACED, Application, Start
from renee_ray.signals import at_signals

from .conftest import Run, descendants, end, start, until
from .load import bench_load
from .test_listening import LOOPBACK, listening
from .test_serve_http import (
    AUTHORISED,
    HOSTILE,
    JSON,
    LIMITS,
    SECRET,
    Answer,
    ask,
    check_closed_without_token,
    metrics,
    question,
    refused,
    still_answers,
)


class Service:
    """A running service. link: what it was told to serve, a link to a run."""

    def __init__(self, link: Path) -> None:
        self.link = link
        settings = [f"{key}={value}" for key, value in LIMITS.items()]
        self.process = start(
            "serve", str(link), "port=0", "num_shards=2", "num_encoders=2", "max_waiting=4",
            "threads=1", "max_batch_size=8", *settings, "timeout_s=300", "--json",
            env={TOKEN: SECRET},
        )  # fmt: skip
        self.facts = self.ready()
        self.port = int(self.facts["url"].rpartition(":")[2])

    def ready(self) -> dict[str, Any]:
        """The next line that says what is served."""
        assert self.process.stdout is not None and self.process.stderr is not None
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read()
        return dict(json.loads(line))

    def replicas(self, name: str) -> set[int]:
        """The processes of replicas whose name begins so."""
        family = descendants(self.process.pid).items()
        return {pid for pid, line in family if f":{name}" in line.partition(":renee_ray-")[2]}


@pytest.fixture(scope="module")
def service(trained: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    link = tmp_path_factory.mktemp("serve") / "now"
    link.symlink_to(trained.path)
    made = Service(link)
    yield made
    end(made.process)


@contextlib.contextmanager
def asking(service: Service, clients: int) -> Iterator[list[Answer]]:
    """Clients that ask all the time; the answers that they have so far."""
    found: list[Answer] = []
    stop = threading.Event()

    def client() -> None:
        while not stop.is_set():
            found.append(ask(service.port, question("perl module"), timeout=400))

    with ThreadPoolExecutor(clients) as pool:
        clients_of = [pool.submit(client) for _ in range(clients)]
        try:
            yield found
        finally:
            stop.set()
    for each in clients_of:
        each.result()


@pytest.mark.slow
def test_equals_predict(service: Service, source: Path, raw_predictions: Path) -> None:
    lines = (source / "tst_X.txt").read_text(encoding="utf-8").splitlines()[:24]
    expected = pads.dataset(raw_predictions).to_table().slice(0, len(lines)).to_pylist()

    def rows(first: int) -> list[list[dict[str, Any]]]:
        # Requests of different k, at once, so that they share batches.
        k = 20 if first % 8 else 7
        status, answer, _ = ask(service.port, question(*lines[first : first + 4], k=k))
        assert status == 200 and answer["step"] == service.facts["step"]
        return answer["predictions"]

    with ThreadPoolExecutor(2) as pool:
        found = [row for group in pool.map(rows, range(0, 24, 4)) for row in group]
    assert {len(row) for row in found} == {7, 20}
    for row, wanted in zip(found, expected, strict=True):
        n = len(row)
        assert [each["label"] for each in row] == wanted["label_ids"][:n]
        assert [each["text"] for each in row] == wanted["label_texts"][:n]
        scores = [each["score"] for each in row]
        assert scores == pytest.approx(wanted["scores"][:n], rel=1e-5, abs=1e-5)


@pytest.mark.slow
def test_the_door_of_the_service(service: Service) -> None:
    check_closed_without_token(service.port)
    for status, words, body in HOSTILE.values():
        refused(ask(service.port, body), status, words)
    still_answers(service.port)


@pytest.mark.slow
def test_what_is_late_is_not_scored(service: Service) -> None:
    """Behind a shard that stands still, and a batch for each encoder that waits for it."""
    (shard,) = service.replicas("shard-1")
    before = metrics(service.port)

    def later(*texts: str, **headers: str) -> Future[Answer]:
        sent = {**AUTHORISED, **JSON, **headers}
        answer = pool.submit(ask, service.port, question(*texts), sent)
        time.sleep(1)  # so that Serve knows of each encoder how much it has
        return answer

    with ThreadPoolExecutor(6) as pool:
        os.kill(shard, signal.SIGSTOP)
        try:
            first = [later("a"), later("a")]
            late = later(*"abcd", **{"X-Timeout-Ms": "300"}).result()
            second = [later("a"), later("a")]
            excess = later("a").result()
        finally:
            os.kill(shard, signal.SIGCONT)
        assert [each.result()[0] for each in first + second] == [200] * 4
    refused(late, 504, "no answer within 0.3 s")
    refused(excess, 429, "4 requests are waiting")
    assert excess[2]["retry-after"] == "1"
    after = metrics(service.port)
    # Of the five questions, four have one text: only a batch with the late one has more than four.
    batches = ("_count", '_bucket{le="4.0"}')
    names = [f"renee_ray_serve_batch_texts{each}" for each in batches]
    assert [after[name] - before[name] for name in names] == [4, 4]


@pytest.mark.slow
def test_beyond_its_rate_it_answers_or_refuses(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN, SECRET)
    found = bench_load(service.facts["url"], seconds=3, clients=4, factor=3.0)
    assert set(found["answers"]) == {"200", "429"} and found["answers"]["200"] > 10
    assert 0 < found["p50_ms"] <= found["p99_ms"] < 60_000


@pytest.mark.slow
def test_a_change_to_an_export_fails_no_request(
    service: Service, trained: Run, tmp_path: Path
) -> None:
    """The run's export is served in its place, while it is asked; a damaged run is not."""
    damaged, other = tmp_path / "damaged", tmp_path / "other"
    shutil.copytree(trained.path, damaged)
    renee_ray.export(trained.path, str(other), ExportConfig())
    for file in damaged.glob("checkpoints/*/encoder.safetensors"):
        file.write_bytes(bytes(file.stat().st_size))
    old = service.replicas("")

    def point(path: Path) -> None:
        temporary = tmp_path / "link"
        temporary.symlink_to(path)
        temporary.rename(service.link)
        service.process.send_signal(signal.SIGHUP)

    point(damaged)
    with asking(service, 2) as found:
        assert service.process.stderr is not None
        words = "encoder.safetensors cannot be read"
        while words not in (line := service.process.stderr.readline()):
            assert line
        until(lambda: service.replicas("") == old, service.process, "the end of the damaged one")
        time.sleep(1)  # until Ray counts its CPUs as free
        point(other)
        assert service.ready()["run"] == str(other)
        until(lambda: not service.replicas("") & old, service.process, "the end")
    assert len(found) > 10 and {status for status, *_ in found} == {200}
    assert len(service.replicas("")) == len(old) == 4
    assert ask(service.port, method="GET", path="/info")[1]["run"] == str(other)
    (answer,) = ask(service.port, question("perl module", k=20))[1]["predictions"]
    (wanted,) = renee_ray.load(str(other)).predict(["perl module"], 20)
    assert [(each["label"], each["text"]) for each in answer] == [each[:2] for each in wanted]


@pytest.mark.slow
def test_killed_replicas_lose_no_request(service: Service) -> None:
    killed = [min(service.replicas(name)) for name in ("shard-0", "encoder")]
    with asking(service, 3) as found:
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        at = len(found)
        until(lambda: len(found) > at + 50, service.process, "answers")
    assert {status for status, *_ in found} == {200}

    def ready() -> bool:
        return ask(service.port, b"", {}, "GET", "/ready")[0] == 200

    until(ready, service.process, "readiness")


@pytest.mark.slow
def test_listens_on_loopback_and_shows_no_token_and_ends(service: Service) -> None:
    process, family = service.process, descendants(service.process.pid)
    pids = {process.pid, *family}
    found = listening(pids)
    assert found and found <= LOOPBACK, found
    assert not any(SECRET in name for name in family.values())
    inherited = [
        Path(f"/proc/{pid}/environ").read_bytes()
        for pid in family
        if os.path.exists(f"/proc/{pid}")
    ]
    assert inherited and not any(SECRET.encode() in each for each in inherited)
    links = [link for pid in family for link in Path(f"/proc/{pid}/fd").glob("*")]
    opened = {os.readlink(link) for link in links if link.is_symlink()}
    directory = next(Path(*Path(name).parts[:4]) for name in opened if "/ray/session_" in name)
    logs = [path for path in directory.rglob("*") if path.is_file() and "logs" in path.parts]
    assert logs and not any(SECRET.encode() in path.read_bytes() for path in logs)

    before = service.replicas("")
    process.send_signal(signal.SIGHUP)
    until(lambda: service.replicas("") - before, process, "a change, which the end gives up")
    family |= descendants(process.pid)
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=120)
    assert (process.returncode, out) == (0, "") and SECRET not in error
    assert "Traceback" not in error and "answers:" not in error
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in family):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    with pytest.raises(OSError):
        ask(service.port, question("a"))


def starting(message: str, of_deployment: str = "UPDATING") -> ApplicationStatusOverview:
    """The status of an application whose only deployment says so."""
    trigger, done = DeploymentStatusTrigger.UNSPECIFIED, of_deployment == "HEALTHY"
    each = DeploymentStatusOverview(DeploymentStatus(of_deployment), trigger, {}, message)
    status = ApplicationStatus.RUNNING if done else ApplicationStatus.DEPLOYING
    return ApplicationStatusOverview(status, "", 0.0, {"encoder": each})


def test_a_start_is_given_up_at_the_second_failure() -> None:
    failures = [f"{FAILED} with exception. Error:\n(pid={pid})" for pid in (1, 2)]
    start = Start()
    for message in ("", failures[0], failures[0], "more than 30s to initialize"):
        assert not start.complete(starting(message), 0)
        assert not start.complete(starting(message), 24 * 3600)
    with pytest.raises(RuntimeError, match="pid=2"):
        start.complete(starting(failures[1]), 24 * 3600)
    with pytest.raises(RuntimeError, match="twice"):
        Start().complete(starting("twice", "DEPLOY_FAILED"), 0)
    assert Start().complete(starting("", "HEALTHY"), 0)


def test_a_start_without_room_is_given_up() -> None:
    start, message = Start(), f"1 replicas that have taken more than 30s {UNPLACED}"
    for now, said in (0, message), (1, ""), (2, message), (PLACING_S + 1, message):
        assert not start.complete(starting(said), now)
    with pytest.raises(RuntimeError, match="encoder has found no free CPU or GPU"):
        start.complete(starting(message), PLACING_S + 2)


def test_the_words_of_ray_serve() -> None:
    source = inspect.getsource(deployment_state)
    assert FAILED in source and UNPLACED in source


def test_the_one_before_ends_even_if_nobody_can_be_told() -> None:
    ended: list[str] = []

    class Noted(Application):
        def end(self) -> None:
            ended.append(self.name)

    def closed() -> None:
        raise BrokenPipeError

    old, new = (Noted(name, {}, None) for name in ("old", "new"))  # type: ignore[arg-type]
    serving = serve.Serving("service", "run", ServeConfig(), old, threading.Event())
    with pytest.raises(BrokenPipeError):
        serving.hand_over(new, closed)
    assert (serving.current, ended) == (new, ["old"])


def test_sighup_before_it_is_ready_does_not_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> None:
        signal.raise_signal(signal.SIGHUP)
        raise ReneeError("not found")

    monkeypatch.setattr(serve, "_served_run", load)
    monkeypatch.setenv(TOKEN, SECRET)
    seen: list[int] = []
    with at_signals(lambda number, _: seen.append(number), [signal.SIGHUP]):
        with pytest.raises(ReneeError, match="not found"):
            serve.serve_run("run", ServeConfig(), lambda _: None)
        assert not seen
        signal.raise_signal(signal.SIGHUP)
    assert seen == [signal.SIGHUP]
