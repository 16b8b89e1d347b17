"""A conversion that is cut off at each of its steps in turn, and the next one."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tenacity
from tokenizers import Tokenizer, models

from renee_ray.config.schema import ConvertConfig
from renee_ray.data.dataset import Dataset
from renee_ray.errors import ReneeError
from renee_ray.service.cluster.tasks import attempt
from renee_ray.service.convert import conversion
from renee_ray.service.convert import convert as service

from ..data.test_destination import tree, write

POINTS, LABELS = 20, 20


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks one after another instead of on Ray, and several of each stage."""

    def stream(
        work: Callable[..., Any], plan: Any, tasks: int, journal: str | None = None
    ) -> Iterator[Any]:
        for i in range(tasks):
            yield json.loads(attempt(work, plan, i, journal))

    monkeypatch.setattr(conversion, "stream", stream)
    monkeypatch.setattr(conversion, "BUCKET_ROWS", 16)
    monkeypatch.setattr(service, "ensure_ray", lambda *arguments, **settings: None)


class Interrupting:
    """Raises KeyboardInterrupt before one of the operations on storage, counted from 0."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        self.left = number
        call = tenacity.Retrying.__call__

        def counted(retrying: Any, operation: Callable[[], Any]) -> Any:
            self.left -= 1
            if self.left == -1:
                raise KeyboardInterrupt
            return call(retrying, operation)

        monkeypatch.setattr(tenacity.Retrying, "__call__", counted)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    rng = np.random.default_rng(3)
    rows = [sorted({int(i) for i in rng.integers(0, LABELS, 3)}) for _ in range(POINTS)]
    pairs = "".join(" ".join(f"{i}:1" for i in row) + "\n" for row in rows)
    files = {
        "trn_X.txt": "".join(f"red {i}\n" for i in range(POINTS)),
        "trn_X_Y.txt": f"{POINTS} {LABELS}\n{pairs}",
        "trn_filter_labels.txt": "3 4\n",
        "Y.txt": "".join(f"label {i}\n" for i in range(LABELS)),
    }
    for name, text in files.items():
        write(tmp_path / "src" / name, text.encode())
    return tmp_path / "src"


@pytest.fixture(autouse=True)
def tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = {"[UNK]": 0, "red": 1, "label": 2}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    (tmp_path / "model").mkdir()
    made.save(str(tmp_path / "model" / "tokenizer.json"))
    monkeypatch.chdir(tmp_path)


def config(**changes: Any) -> ConvertConfig:
    fixed = {"tokenizer": "./model", "validation": 0.2, "part_rows": 16, "max_length": 8, "test": 0}
    return ConvertConfig(**{**fixed, **changes})


def converted(source: Path, dst: Path, settings: ConvertConfig) -> dict[str, bytes | None]:
    service.convert(str(source), str(dst), settings)
    assert Dataset.open(str(dst))
    return tree(dst)


def test_a_refusal_ends_the_tasks_that_have_not_begun(tmp_path: Path) -> None:
    begun: list[int] = []

    def work(plan: Any, i: int) -> dict[str, Any]:
        begun.append(i)
        if i == 1:
            raise ReneeError("row 7 is bad")
        return {"i": i}

    assert json.loads(attempt(work, None, 0, str(tmp_path))) == {"i": 0}
    for i in (1, 2, 0):
        with pytest.raises(ReneeError, match=r"^row 7 is bad$"):
            attempt(work, None, i, str(tmp_path))
    assert begun == [0, 1]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_source_is_never_its_own_destination(
    source: Path, tmp_path: Path, overwrite: bool
) -> None:
    """`convert X X` and `convert ANYTHING X`, where X holds a user's training file."""
    theirs = tmp_path / "theirs"
    (theirs / "train").mkdir(parents=True)
    table = pa.table({"text": ["a"], "labels": [[0]]})
    pq.write_table(table, theirs / "train" / "part-0.parquet")
    before = tree(theirs)
    for src in theirs, source:
        with pytest.raises(
            ReneeError, match=r"are the same|part-0\.parquet is in the way|holds other"
        ):
            service.convert(str(src), str(theirs), config(overwrite=overwrite))
    assert tree(theirs) == before


def test_a_source_of_links_into_the_destination(source: Path, tmp_path: Path) -> None:
    dst = tmp_path / "dst"
    converted(source, dst, config())
    before = tree(dst)
    linked = tmp_path / "linked" / "train.parquet"
    linked.parent.mkdir()
    linked.symlink_to(dst / "train" / "part-00000.parquet")
    with pytest.raises(ReneeError, match=r"linked/train\.parquet and .*/dst are the same, or"):
        service.convert(str(linked.parent), str(dst), config(overwrite=True))
    assert tree(dst) == before


def before_nothing(source: Path, dst: Path) -> bool:
    return False


def before_dataset(source: Path, dst: Path) -> bool:
    converted(source, dst, config(part_rows=10))
    write(dst / "train" / "notes.txt")
    return True


def before_other(source: Path, dst: Path) -> bool:
    """Another conversion was cut off when it had written its parts."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(service.layout, "write_manifest", interrupt)
        service.convert(str(source), str(dst), config(part_rows=10))
    return False


def interrupt(*arguments: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("before", "first", "step"),
    [
        (before_nothing, 0, 1),
        pytest.param(before_dataset, 0, 2, marks=pytest.mark.slow),
        pytest.param(before_other, 1, 2, marks=pytest.mark.slow),
    ],
)
def test_at_each_operation_on_storage(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: Callable[[Path, Path], bool],
    first: int,
    step: int,
) -> None:
    wanted = {seed: converted(source, tmp_path / f"{seed}", config(seed=seed)) for seed in (0, 1)}
    overwrite = before(source, tmp_path / "before")
    for number in range(first, 10_000, step):
        dst = tmp_path / f"dst-{number}"
        if (tmp_path / "before").exists():
            shutil.copytree(tmp_path / "before", dst)
        with monkeypatch.context() as patch:
            steps = Interrupting(patch, number)
            with contextlib.suppress(KeyboardInterrupt):
                service.convert(str(source), str(dst), config(overwrite=overwrite))
        if steps.left >= 0:
            break
        # Every third time other settings are tried next, so that what was cut off is of no use.
        seed = int(number % 3 == 2 and not (dst / "dataset.json").exists())
        found = converted(source, dst, config(overwrite=overwrite, seed=seed))
        if overwrite:
            assert found.pop("train/notes.txt") == b"the user's"
        assert found == wanted[seed]
    assert number > 30


def test_at_any_moment(source: Path, tmp_path: Path) -> None:
    """A signal, as of Ctrl-C, wherever Python is just then; again and again until it is done."""
    wanted = converted(source, tmp_path / "wanted", config())
    rng = np.random.default_rng(seed := time.time_ns())
    print("seed", seed)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for number in range(10):
            dst = tmp_path / f"dst-{number}"
            for _ in range(5):
                try:
                    try:
                        signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-4, 0.1))
                        service.convert(str(source), str(dst), config(overwrite=True))
                    finally:
                        signal.setitimer(signal.ITIMER_REAL, 0)
                except KeyboardInterrupt:
                    continue
            assert converted(source, dst, config(overwrite=True)) == wanted
    finally:
        signal.signal(signal.SIGALRM, before)
