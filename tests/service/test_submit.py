"""`renee-ray submit` to a real head that demands a token, everything on storage that does too."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from renee_ray.data.dataset import Dataset

from .conftest import Command, end, finish, start
from .gateway import ACCESS_KEY, BUCKET, SECRET_KEY, Gateway
from .head import TOKEN, Head, Proxy

pytestmark = pytest.mark.slow
DATA, RUN = f"s3://{BUCKET}/dataset", f"s3://{BUCKET}/runs/submitted"
NUMBERS = 300
QUESTION = "stop the job (otherwise it runs on)?"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    server = Gateway(tmp_path_factory.mktemp("weed"))
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="module")
def head(gateway: Gateway) -> Iterator[Head]:
    # Sockets lie in it, whose paths may have 107 bytes: pytest's own directories are too long.
    directory = Path("/tmp") / f"renee-head-{os.getpid()}"
    directory.mkdir()
    server = Head(directory, gateway.env)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        subprocess.run(["rm", "-rf", str(directory)], check=True)


@pytest.fixture(scope="module")
def client_env(gateway: Gateway) -> dict[str, str]:
    """What a laptop has: the token and where storage is, but no key to it."""
    where = {name: gateway.env[name] for name in ("AWS_ENDPOINT_URL", "AWS_REGION")}
    nothing = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
    return (
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "HF_HUB_OFFLINE": "1"} | where | nothing
    )


@pytest.fixture(scope="module")
def submit(head: Head, client_env: dict[str, str]) -> Callable[..., Command]:
    def call(*arguments: str, env: dict[str, str] | None = None) -> Command:
        words = ("submit", "--address", head.address, *arguments)
        return finish(start(*words, env=client_env | (env or {})))

    return call


@pytest.fixture(scope="module")
def dataset_on_s3(gateway: Gateway, source: Path, submit: Callable[..., Command]) -> str:
    remote = gateway.filesystem()
    pafs.copy_files(str(source), f"{BUCKET}/source", pafs.LocalFileSystem(), remote)
    done = submit(
        "--submission-id", "converting", "convert", f"s3://{BUCKET}/source", DATA,
        "validation=0.1", "part_rows=64",
    )  # fmt: skip
    assert done.status == 0, done.stderr + done.stdout
    assert "job converting is submitted to" in done.stderr
    assert "job converting succeeded after" in done.stderr
    return DATA


def test_the_log_is_the_jobs(
    head: Head, dataset_on_s3: str, submit: Callable[..., Command]
) -> None:
    log = head.log("converting")
    assert f"dataset {dataset_on_s3}" in log or dataset_on_s3 in log
    job = head.job("converting")
    assert job["status"] == "SUCCEEDED"
    assert job["entrypoint"].startswith("python -m renee_ray convert s3://")
    assert job["metadata"]["command"] == "convert"
    shown = json.dumps(job)
    assert ACCESS_KEY not in shown and SECRET_KEY not in shown and TOKEN not in shown
    variables = job["runtime_env"]["env_vars"]
    assert variables["AWS_REGION"] == "us-east-1" and variables["HF_HUB_OFFLINE"] == "1"
    assert variables["RAY_JOB_STOP_SIGNAL"] == "SIGINT"
    assert variables["RAY_JOB_STOP_WAIT_TIME_S"] == "60"


def test_training_follows_converting(
    gateway: Gateway,
    head: Head,
    dataset_on_s3: str,
    bag_recipe: str,
    submit: Callable[..., Command],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in gateway.env.items():
        monkeypatch.setenv(name, value)
    assert Dataset.open(dataset_on_s3).manifest.num_points("train") > 200
    done = submit(
        "--json", "train", "--json", bag_recipe, f"data={dataset_on_s3}", f"output={RUN}",
        "num_workers=1", "placement_strategy=SPREAD", "epochs=1", "checkpoint.every_steps=0",
    )  # fmt: skip
    assert done.status == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["status"] == "SUCCEEDED" and found["seconds"] > 1
    assert "training on" in done.stderr, "with --json the log is beside the result"
    assert TOKEN not in done.stderr and SECRET_KEY not in done.stderr
    with gateway.filesystem().open_input_file(f"{BUCKET}/runs/submitted/history.json") as file:
        assert json.loads(file.read())["steps"]
    names = {"recipe.yaml", f"data={dataset_on_s3}"}
    assert names < set(head.job(found["submission_id"])["entrypoint"].split())


def test_a_job_that_fails_is_status_1(submit: Callable[..., Command], head: Head) -> None:
    # The job fails once it has found the recipe, in the package that was taken along.
    failing = ("train", "lf-debian-40k", f"data=s3://{BUCKET}/no-data", f"output={RUN}-never")
    done = submit("--submission-id", "failing", *failing)
    assert done.status == 1
    assert "is not a renee_ray dataset" in done.stdout
    assert done.stdout == head.log("failing")
    assert "renee-ray: job failing failed: " in done.stderr.splitlines()[-1]
    again = submit("--no-wait", "--submission-id", "failing", *failing)
    assert again.status == 1 and "give another --submission-id" in again.stderr
    assert again.stderr.count("\n") == 1


def test_no_wait_returns_at_once(submit: Callable[..., Command], head: Head) -> None:
    done = submit("--no-wait", "export", f"s3://{BUCKET}/no-run", f"s3://{BUCKET}/never")
    assert done.status == 0 and done.stdout.startswith("renee-export-")
    assert head.job(done.stdout.strip())["status"] in ("PENDING", "RUNNING", "FAILED")
    head.stop_job(done.stdout.strip())


def test_without_the_token_everything_is_refused(
    head: Head, submit: Callable[..., Command], tmp_path: Path
) -> None:
    for path in ("/api/jobs/", "/api/version", "/nodes?view=summary", "/api/packages/gcs/x.zip"):
        assert head.get(path, token=None).status_code == 401, path
        assert head.get(path, token="f" * 64).status_code == 403, path
    attempt = ("export", f"s3://{BUCKET}/no-run", f"s3://{BUCKET}/never")
    before = head.get("/api/jobs/").json()
    for env in (
        {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": ""},
        {"RAY_AUTH_TOKEN": "", "HOME": str(tmp_path)},
        {"RAY_AUTH_TOKEN": "f" * 64},
    ):
        done = submit(*attempt, env=env)
        assert done.status == 1 and "demands its cluster's token" in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1 and done.stdout == ""
    assert len(head.get("/api/jobs/").json()) == len(before)


FOLLOW = """
import sys
from renee_ray.service.submit import submit
address, name, patience = sys.argv[1], sys.argv[2], float(sys.argv[3])
numbers = f"[(print('line', i, flush=True), time.sleep(0.04)) for i in range({sys.argv[4]})]"
client = submit.connect(address)
client.submit_job(entrypoint=f'python -c "import time; {numbers}"', submission_id=name)
submit.SILENCE_TIMEOUT_S, submit.ANSWER_TIMEOUT_S = 3.0, 10.0
say = lambda text: print(text, file=sys.stderr, flush=True)
write = lambda text: print(text, end="", flush=True)
follower = submit.Follower(client, name, write, say, patience)
try:
    say(follower.follow().status)
except submit.ReneeError as error:
    say(f"sentence: {error}")
"""


def follow(
    address: str, name: str, env: dict[str, str], patience: float, log: Path
) -> subprocess.Popen[str]:
    """Follows a job that writes NUMBERS lines, to the file `log`; returns once it has begun."""
    with log.open("w") as sink:
        process = subprocess.Popen(
            [sys.executable, "-c", FOLLOW, address, name, str(patience), str(NUMBERS)],
            stdout=sink,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | env,
        )
    until = time.monotonic() + 300
    while "line" not in log.read_text():
        assert time.monotonic() < until and process.poll() is None, process.communicate()
        time.sleep(0.05)
    return process


@pytest.fixture
def proxy(head: Head) -> Iterator[Proxy]:
    made = Proxy(head.ports["dashboard-port"])
    yield made
    made.close()


def test_a_lost_connection_repeats_and_loses_nothing(
    head: Head, proxy: Proxy, client_env: dict[str, str], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    process = follow(proxy.address, "numbers", client_env, 60, log)
    for interrupt in (proxy.cut, proxy.stall, proxy.cut):
        time.sleep(1)
        interrupt()
        time.sleep(2)
        proxy.restore()
    done = finish(process)
    assert done.stderr.splitlines()[-1].endswith("SUCCEEDED"), done.stderr
    assert log.read_text() == head.log("numbers")
    lines = [each for each in log.read_text().splitlines() if each.startswith("line ")]
    assert lines == [f"line {number}" for number in range(NUMBERS)]
    said = done.stderr.splitlines()[:-1]
    assert 1 <= sum("does not answer" in each for each in said) <= 3, said
    assert sum("does not answer" in each for each in said) == sum(
        "answers again" in each for each in said
    )


def test_a_head_that_stays_away_ends_the_following(
    head: Head, proxy: Proxy, client_env: dict[str, str], tmp_path: Path
) -> None:
    process = follow(proxy.address, "left-alone", client_env, 3, tmp_path / "log")
    proxy.cut()
    done = finish(process)
    assert "has not answered for 3 s; see with `ray job status" in done.stderr.splitlines()[-1]
    head.stop_job("left-alone")


AWAY = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
"""With it a job waits for storage, and starts and ends within seconds."""


def waiting_job(head: Head, name: str) -> list[str]:
    """Of the command that imports least."""
    where = f"s3://{BUCKET}/no-source", f"s3://{BUCKET}/never"
    return ["submit", "--address", head.address, "--submission-id", name, "convert", *where]


def test_an_interrupt_without_a_terminal_leaves_the_job_running(
    head: Head, client_env: dict[str, str]
) -> None:
    process = start(*waiting_job(head, "left"), env=client_env | AWAY)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if "trying again" in line:
                break
        process.send_signal(signal.SIGINT)
        done = finish(process, timeout=120)
    finally:
        end(process)
    assert done.status == 130
    last = done.stderr.splitlines()[-1]
    assert last.startswith("left running; ")
    assert f"`ray job stop --address {head.address} left` stops it" in last
    assert head.job("left")["status"] == "RUNNING"
    head.stop_job("left")
    assert head.job("left")["status"] == "STOPPED"


@contextlib.contextmanager
def at_a_terminal(
    arguments: list[str], env: dict[str, str]
) -> Iterator[tuple[int, subprocess.Popen]]:
    """`renee-ray arguments` at a terminal: (its other end, the process)."""
    mine, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "renee_ray", *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=os.environ | env,
        start_new_session=True,
    )
    os.close(theirs)
    try:
        yield mine, process
    finally:
        process.kill()
        process.wait()
        os.close(mine)


@pytest.mark.parametrize("answer", ["y", "n", "interrupt"])
def test_an_interrupt_at_a_terminal_asks_whether_to_stop_the_job(
    head: Head, client_env: dict[str, str], answer: str
) -> None:
    name = f"told-{answer}"
    with at_a_terminal(waiting_job(head, name), client_env | AWAY) as (terminal, process):
        _read_until(terminal, "trying again")
        process.send_signal(signal.SIGINT)
        _read_until(terminal, QUESTION)
        if answer == "y":
            os.write(terminal, b"y\n")
            _read_until(terminal, f"job {name} stopped")
            assert "renee-ray: interrupted" in head.log(name)
        elif answer == "n":
            os.write(terminal, b"n\n")
            _read_until(terminal, "left running; ")
        else:
            _interrupt_until(terminal, process, "left running; ")
        assert process.wait(120) == 130
    assert head.job(name)["status"] == ("STOPPED" if answer == "y" else "RUNNING")
    head.stop_job(name)


def _interrupt_until(terminal: int, process: subprocess.Popen, text: str) -> None:
    """Again after a while, as people do: readline misses one just before it begins to wait."""
    for attempts_left in reversed(range(5)):
        process.send_signal(signal.SIGINT)
        try:
            return _read_until(terminal, text, 20)
        except AssertionError:
            if not attempts_left:
                raise


def _read_until(terminal: int, text: str, seconds: float = 400) -> str:
    seen, until = "", time.monotonic() + seconds
    while text not in seen:
        assert time.monotonic() < until, seen
        if select.select([terminal], [], [], 1)[0]:
            try:
                seen += os.read(terminal, 65536).decode(errors="replace")
            except OSError as error:  # the other end has gone
                raise AssertionError(seen) from error
    return seen
