"""A small real dataset and one trained run, made once a session by the real command."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import yaml

from renee_ray.cli.main import main
from renee_ray.config.schema import EncoderConfig
from renee_ray.data.models import resolve_model
from renee_ray.service.cluster.connect import ensure_ray
from renee_ray.service.run.directory import RunDirectory

T = TypeVar("T")

SOURCE = Path(__file__).parents[2] / "renee_ray" / "examples" / "LF-DebianPerl-2K.tar.gz"
POINTS, TESTS, LABELS = 320, 120, 800
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "HF_HUB_OFFLINE": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # by default a job's end is seen 2 s late
}
HEALTH = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}
"""Of a cluster's head: a node that is gone is noticed in seconds."""

RECIPE: dict[str, Any] = {
    "num_workers": 2,
    "batch_size": 24,
    "epochs": 2,
    "loss_every": 1,
    "timeout_s": 60,
    "threads": 1,
    "encoder": {"max_length": 10, "autocast": "off", "learning_rate": 1e-3},
    "classifier": {"precision": "fp32"},
    "feed": {"streams": 4, "window": 4},
    "checkpoint": {"every_steps": 5},
}

TINY_DIM = 64
"""Of the embeddings of `tiny_encoder`."""


@dataclass(frozen=True)
class Command:
    """A `renee-ray` process that has ended."""

    status: int
    stdout: str
    stderr: str


def start(*arguments: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Starts `renee-ray arguments`, which starts its own Ray."""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    return subprocess.Popen(
        [sys.executable, "-m", "renee_ray", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment | ENVIRONMENT | (env or {}),
        start_new_session=True,  # a process group, as a shell makes one of each command
    )


def finish(process: subprocess.Popen[str], timeout: float = 500) -> Command:
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except BaseException:
        end(process)
        raise
    return Command(process.returncode, stdout, stderr)


def renee_ray(*arguments: str) -> Command:
    """Runs `renee-ray arguments` to its end."""
    return finish(start(*arguments))


def descendants(root: int) -> dict[int, str]:
    """The command line of each process below `root`, by process id."""
    listing = subprocess.run(
        ["ps", "-ww", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True
    ).stdout
    rows = [line.split(None, 2) for line in listing.splitlines()]
    found: dict[int, str] = {}
    parents = {root}
    while parents:
        children = {int(r[0]): r[2] for r in rows if len(r) == 3 and int(r[1]) in parents}
        found |= children
        parents = set(children)
    return found


def end(process: subprocess.Popen[str]) -> None:
    """`kill -9` of the process, and of its Ray as far as that survives it."""
    family = descendants(process.pid)
    process.kill()
    process.communicate()
    for pid in family:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def started(start: Callable[[], T], stop: Callable[[], object] = ray.shutdown) -> T:
    """What starts a Ray or a node of it, in three attempts: Ray has a limit for a busy machine."""
    for _ in range(2):
        try:
            return start()
        except Exception as error:
            print(f"Ray did not start: {error}", file=sys.stderr)
            stop()
    return start()


def until(condition: Callable[[], Any], process: subprocess.Popen[str], what: str) -> Any:
    """What `condition` gives once it is true, while the process lives."""
    limit = time.monotonic() + 300
    while not (found := condition()):
        if process.poll() is not None:
            pytest.fail("\n".join([f"{what}: it ended", *process.communicate()]))
        assert time.monotonic() < limit, f"{what}: nothing after 300 s"
        time.sleep(0.1)
    return found


def stop(process: subprocess.Popen[str], path: str, number: int = signal.SIGINT) -> Run:
    """Tells a run to end, as one of LONGER must be; what it has come to, without a result."""
    process.send_signal(number)
    command = finish(process)
    assert command.status == 130, command.stderr
    return run_so_far(path, command)


@contextlib.contextmanager
def paused(root: int) -> Iterator[None]:
    """Stops the training workers below a process, so that what is done meanwhile is in time."""
    family = descendants(root).items()
    found = [pid for pid, line in family if line.startswith("ray::RayTrainWorker")]
    try:
        for pid in found:
            os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def status_of(run: str) -> dict[str, Any]:
    """status.json of a run; empty while there is none."""
    try:
        return dict(json.loads(Path(run, "status.json").read_text()))
    except (OSError, ValueError):
        return {}


def newest_commit(run: str) -> int:
    """The step of the newest checkpoint that is committed; -1: none."""
    newest = RunDirectory(run).checkpoints().newest()
    return -1 if newest is None else newest.state.step


@pytest.fixture(scope="session", autouse=True)
def environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        yield


@pytest.fixture(scope="module")
def local_ray(environment: None, compiled_loops: dict[str, str]) -> Iterator[None]:
    """Ray in this process, as a command starts it, for a module that calls the service itself."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in compiled_loops.items():
            patch.setenv(name, value)
        ensure_ray(4)
        yield
        ray.shutdown()


def once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A directory filled by `make`, once for all processes of a pytest session."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"shared-{name}"
    done = folder.with_suffix(".done")
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a process that failed to make it
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LF-DebianPerl-2K's first LABELS labels, and the first points of each split that have some."""
    return once(tmp_path_factory, "source", write_subset)


def write_subset(folder: Path) -> None:
    """In `folder`, a repository of POINTS training and TESTS test points."""
    with tarfile.open(SOURCE) as archive:
        lines = {
            Path(member.name).name: file.read().decode().removesuffix("\n").split("\n")
            for member in archive.getmembers()
            if (file := archive.extractfile(member)) is not None
        }
    written = {"Y.txt": lines["Y.txt"][:LABELS]}
    for split, limit in ("trn", POINTS), ("tst", TESTS):
        labels = [
            [pair for pair in row.split() if int(pair.split(":")[0]) < LABELS]
            for row in lines[f"{split}_X_Y.txt"][1:]
        ]
        points = [point for point, found in enumerate(labels) if found][:limit]
        rows = [" ".join(labels[point]) for point in points]
        numbers = {str(point): number for number, point in enumerate(points)}
        filters = [line.split() for line in lines[f"{split}_filter_labels.txt"]]
        written[f"{split}_X.txt"] = [lines[f"{split}_X.txt"][point] for point in points]
        written[f"{split}_X_Y.txt"] = [f"{limit} {LABELS}", *rows]
        written[f"{split}_filter_labels.txt"] = [
            f"{numbers[point]} {label}"
            for point, label in filters
            if point in numbers and int(label) < LABELS
        ]
    for name, kept in written.items():
        (folder / name).write_text("".join(line + "\n" for line in kept))


COMPILING = """
import torch
from renee_ray.xfc.labels import LabelRange
from renee_ray.xfc.shard import Shard
from renee_ray.xfc.topk.select import shard_topk
from renee_ray.xfc.weights.storages import Weights
for precision in "fp32", "bf16_split":
    shard = Shard(LabelRange(0, 80, 80), Weights(precision, 80, 64, True, torch.device("cpu")))
    shard.write(0, torch.ones(80, 64))
    for offset in None, torch.ones(80):
        shard_topk(shard, torch.ones(4, 64), 3, offset=offset)
"""


@pytest.fixture(scope="session")
def compiled_loops(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Where numba keeps the loops of the top-k, which every worker would else take 2 s to compile.

    They are compiled before two processes could write to its cache at a time.
    """

    def make(folder: Path) -> None:
        own = os.environ | {"NUMBA_CACHE_DIR": str(folder)}
        subprocess.run([sys.executable, "-c", COMPILING], check=True, env=own)

    kept = {"NUMBA_CACHE_DIR": str(once(tmp_path_factory, "numba", make))}
    ENVIRONMENT.update(kept)  # of every command that a test starts
    return kept


@pytest.fixture(scope="session")
def dataset(source: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    def make(folder: Path) -> None:
        settings = "validation=0.1", "part_rows=64"
        done = renee_ray("convert", str(source), str(folder / "dataset"), *settings)
        assert done.status == 0, done.stderr

    return str(once(tmp_path_factory, "data", make) / "dataset")


@pytest.fixture(scope="session")
def recipe(tiny_encoder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A configuration file that lacks `data` and `output`."""
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(
        yaml.safe_dump(RECIPE | {"encoder": RECIPE["encoder"] | {"name": tiny_encoder}})
    )
    return str(path)


@pytest.fixture(scope="session")
def bag_recipe(compiled_loops: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """`recipe` with a bag alone: no process of the run imports a transformer's code, for 3 s."""
    bag = {"name": "none", "bag": {"dim": TINY_DIM, "buckets": 4096}}
    path = tmp_path_factory.mktemp("bag") / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE | {"encoder": RECIPE["encoder"] | bag}))
    return str(path)


@pytest.fixture(scope="session")
def tiny_encoder(compiled_loops: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random one-layer encoder with MiniLM's vocabulary, as a directory.

    A worker with it starts, trains and saves in half of the time that it takes with MiniLM.
    """

    def make(folder: Path) -> None:
        import torch
        from transformers import AutoTokenizer, BertConfig, BertModel

        tokenizer = AutoTokenizer.from_pretrained(resolve_model(EncoderConfig().name))
        tokenizer.save_pretrained(folder)
        torch.manual_seed(0)
        BertModel(
            BertConfig(
                vocab_size=len(tokenizer),
                hidden_size=TINY_DIM,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=64,
            )
        ).save_pretrained(folder)

    return str(once(tmp_path_factory, "encoder", make))


@dataclass(frozen=True)
class Run:
    """A run directory, what training it printed, and its history."""

    path: str
    command: Command
    result: dict[str, Any]
    history: dict[str, list[dict[str, Any]]]


def run_of(path: str, command: Command) -> Run:
    assert command.status == 0, command.stderr
    history = json.loads(Path(path, "history.json").read_text())
    return Run(path, command, json.loads(command.stdout), history)


def run_so_far(path: str, command: Command) -> Run:
    """Of a run that did not come to its end, and so has no result."""
    return Run(path, command, {}, json.loads(Path(path, "history.json").read_text()))


def trained_once(tmp_path_factory: pytest.TempPathFactory, name: str, arguments: list[str]) -> Run:
    """The run of `renee-ray train`, which is given `arguments` and an output."""

    def make(folder: Path) -> None:
        done = renee_ray("train", *arguments, f"output={folder}/{name}", "--json")
        assert done.status == 0, done.stderr
        (folder / "command.json").write_text(json.dumps(asdict(done)))

    folder = once(tmp_path_factory, name, make)
    command = Command(**json.loads((folder / "command.json").read_text()))
    return run_of(str(folder / name), command)


@pytest.fixture(scope="session")
def trained(dataset: str, recipe: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An undisturbed run of RECIPE with two workers."""
    return trained_once(tmp_path_factory, "undisturbed", [recipe, f"data={dataset}", "--profile"])


LONGER = ["epochs=1000", "warmup=0", "evaluation.every=8"]
"""Of a run that does not end before its test has seen what it waits for, however fast steps are."""
ENOUGH = 192
"""Steps of the run of LONGER that others are compared with."""
PROCESSES = "processes.txt"


@pytest.fixture(scope="session")
def trained_longer(dataset: str, recipe: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An undisturbed run of RECIPE with LONGER, of ENOUGH steps, by one worker.

    It is told to end by SIGTERM. PROCESSES has the command lines of what ran below it.
    """

    def make(folder: Path) -> None:
        path = str(folder / "longer")
        settings = f"data={dataset}", f"output={path}", "checkpoint.every_steps=0", "num_workers=1"
        process = start("train", recipe, *settings, *LONGER, "checkpoint.grace_s=120", "--json")
        try:
            until(lambda: newest_commit(path) >= ENOUGH, process, "enough steps")
            (folder / PROCESSES).write_text("\n".join(descendants(process.pid).values()))
            stopped = stop(process, path, signal.SIGTERM).command
        finally:
            end(process)
        (folder / "command.json").write_text(json.dumps(asdict(stopped)))

    folder = once(tmp_path_factory, "longer", make)
    command = Command(**json.loads((folder / "command.json").read_text()))
    return run_so_far(str(folder / "longer"), command)


RAW_K = 121
RAW_IDS = [1000 + TESTS - i for i in range(TESTS)]


def predicted_here(*arguments: str) -> None:
    """`renee-ray predict` by one worker, in the Ray of this process or one for this alone."""
    running = ray.is_initialized()
    assert main(["predict", *arguments, "num_workers=1", "texts=true"]) == 0
    if not running:
        ray.shutdown()


@pytest.fixture(scope="session")
def predictions(trained: Run, dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The RAW_K - 1 best labels of each test point, without its filter labels."""

    def make(folder: Path) -> None:
        predicted_here(trained.path, dataset, str(folder / "test"), f"k={RAW_K - 1}")

    return once(tmp_path_factory, "predictions", make) / "test"


@pytest.fixture(scope="session")
def raw_predictions(trained: Run, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The best labels of the test points' texts, which are Parquet and have the ids RAW_IDS."""

    def make(folder: Path) -> None:
        texts = (source / "tst_X.txt").read_text(encoding="utf-8").splitlines()
        ids = pa.array(RAW_IDS, pa.int64())
        table = pa.table({"text": texts, "point_id": ids, "other": ids})
        (folder / "texts").mkdir()
        pq.write_table(table.slice(0, 40), folder / "texts" / "a.parquet", row_group_size=16)
        pq.write_table(table.slice(40), folder / "texts" / "b.parquet")
        predicted_here(trained.path, f"{folder}/texts", f"{folder}/predictions", f"k={RAW_K}")

    return once(tmp_path_factory, "raw", make) / "predictions"
