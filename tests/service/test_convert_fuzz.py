"""Random small folders, whole or damaged, converted over destinations that hold other files.

Some more of them are converted on Ray in test_convert.py.
"""

from __future__ import annotations

import contextlib
import gzip
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models

from renee_ray.config.schema import ConvertConfig
from renee_ray.data.dataset import DATASET, MANIFEST, SPLITS, Dataset, Manifest
from renee_ray.data.destination import SCRATCH
from renee_ray.errors import ReneeError
from renee_ray.service.convert.convert import convert

from ..data.test_destination import NEEDED, OTHERS, tree
from .test_convert_parquet import in_this_process

__all__ = ["in_this_process", "tokenizer"]
CASES = 170
Rng = np.random.Generator
Rows = list[list[int]]


# --------------------------------------------------------------------------------------- sources


def draw_texts(rng: Rng, n: int) -> list[str]:
    return [" ".join(rng.choice(["red", "blue", "é", "\U0001f600"], rng.integers(0, 5)))
            for _ in range(n)]  # fmt: skip


def draw_rows(rng: Rng, n: int, labels: int) -> Rows:
    return [rng.integers(0, labels, rng.integers(0, 4)).tolist() for _ in range(n)]


def repository(rng: Rng, folder: Path) -> None:
    labels, end = int(rng.integers(1, 9)), str(rng.choice(["\n", "\r\n"]))
    for split in ["trn", "tst"][: rng.integers(1, 3)]:
        n = int(rng.integers(1, 12))
        rows = [" ".join(f"{i}:1" for i in row) for row in draw_rows(rng, n, labels)]
        header = [f"{n} {labels}"] if rng.random() < 0.7 else []
        write(rng, folder / f"{split}_X.txt", end.join([*draw_texts(rng, n), ""]))
        write(rng, folder / f"{split}_X_Y.txt", end.join([*header, *rows, ""]))
        if rng.random() < 0.5:
            pairs = [f"{rng.integers(0, n)} {rng.integers(0, labels)}" for _ in range(3)]
            write(rng, folder / f"{split}_filter_labels.txt", end.join([*pairs, ""]))
    if rng.random() < 0.7:
        write(rng, folder / "Y.txt", end.join([*draw_texts(rng, labels), ""]))


def objects(rng: Rng, folder: Path) -> None:
    labels = int(rng.integers(1, 9))
    for name in ["trn.json", "tst.json", "lbl.json"][: rng.integers(1, 4)]:
        texts = draw_texts(rng, labels if name == "lbl.json" else int(rng.integers(1, 12)))
        rows = draw_rows(rng, len(texts), labels)
        lines = [json.dumps({"title": text, "content": "x", "target_ind": row})
                 for text, row in zip(texts, rows, strict=True)]  # fmt: skip
        write(rng, folder / name, "\n".join([*lines, ""]))


def write(rng: Rng, path: Path, text: str) -> None:
    if rng.random() < 0.2:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(text.encode()))
    else:
        path.write_bytes(text.encode())


KINDS = [pa.int64(), pa.int32(), pa.uint8(), pa.string(), pa.large_string(), pa.float32()]


def parquet(rng: Rng, folder: Path) -> None:
    labels, kind = int(rng.integers(1, 9)), KINDS[rng.integers(len(KINDS))]
    texts = pa.types.is_string(kind) or pa.types.is_large_string(kind)

    def lists(n: int, of: pa.DataType) -> pa.Array:
        rows = draw_rows(rng, n, labels)
        return pa.array([[str(i) if texts else i for i in row] for row in rows], pa.list_(of))

    for split in ["train", "test"][: rng.integers(1, 3)]:
        for part in range(rng.integers(1, 3)):
            n = int(rng.integers(1, 12))
            if rng.random() < 0.1:
                kind = KINDS[rng.integers(len(KINDS))]
                texts = pa.types.is_string(kind) or pa.types.is_large_string(kind)
            table = {"text": pa.array(draw_texts(rng, n)), "labels": lists(n, kind)}
            if rng.random() < 0.2:
                table["text"] = pa.array([bytes(rng.bytes(4)) for _ in range(n)], pa.binary())
            if rng.random() < 0.2:
                table["filter_labels"] = lists(n, kind)
            if rng.random() < 0.1:
                table.pop(str(rng.choice(list(table))))
            (folder / split).mkdir(exist_ok=True)
            path = folder / split / f"{part}.parquet"
            pq.write_table(pa.table(table), path, row_group_size=5)
    if rng.random() < 0.5:
        names = pa.array([str(i) for i in range(labels)])
        columns = {"label": names, "text": names}
        pq.write_table(pa.table(columns), folder / "labels.parquet")


# ---------------------------------------------------------------------------------------- faults


def cut(rng: Rng, path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.integers(0, len(content) + 1)])


def remove(rng: Rng, path: Path) -> None:
    path.unlink()


def spoil(rng: Rng, path: Path) -> None:
    """Other bytes in one place, which no UTF-8 may have."""
    content = bytearray(path.read_bytes())
    at = int(rng.integers(0, len(content) + 1))
    content[at : at + int(rng.integers(0, 3))] = bytes(rng.integers(128, 256, 3).tolist())
    path.write_bytes(bytes(content))


def insert(rng: Rng, path: Path) -> None:
    """A token that is no id, or none that may be, in one place."""
    words = [b" -1:1 ", b" 99999999999999999999 ", b"x", b"\n", b"\r", b"\0", b" 7:nan ", b"{"]
    content = path.read_bytes()
    at = int(rng.integers(0, len(content) + 1))
    path.write_bytes(content[:at] + words[rng.integers(len(words))] + content[at:])


def directory(rng: Rng, path: Path) -> None:
    path.unlink()
    path.mkdir()


FAULTS = [cut, remove, spoil, insert, insert, directory]


def draw_source(rng: Rng, folder: Path) -> None:
    folder.mkdir()
    kinds: list[Callable[[Rng, Path], None]] = [repository, objects, parquet]
    kinds[rng.integers(len(kinds))](rng, folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in rng.permutation(np.array(files))[: rng.choice([0, 0, 1, 2])]:
        FAULTS[rng.integers(len(FAULTS))](rng, path)


# ---------------------------------------------------------------------------------- destinations


class Stop(BaseException):
    """As KeyboardInterrupt."""


def stopping(rng: Rng) -> Callable[[str], None]:
    """Progress that is cut off after a stage of tasks."""
    left = int(rng.integers(0, 5))

    def say(message: str) -> None:
        nonlocal left
        done, _, total = message.rpartition(": ")[2].partition(" of ")
        left -= done == total or not total
        if left < 0:
            raise Stop

    return say


def good_source(folder: Path) -> str:
    folder.mkdir()
    (folder / "trn_X.txt").write_text("red\n" * 9)
    (folder / "trn_X_Y.txt").write_text("0:1 1:1\n" * 9)
    return str(folder)


def draw_destination(rng: Rng, place: Path, config: ConvertConfig) -> Path:
    """What is there before: nothing, a dataset, or what an interrupted conversion left."""
    dst = place / "dst"
    if rng.random() < 0.3:
        convert(good_source(place / "before"), str(dst), config)
    if rng.random() < 0.3:
        source = str(place / "src") if rng.random() < 0.5 else good_source(place / "cut")
        change = config.model_copy(update={"overwrite": True})
        with contextlib.suppress(Stop, ReneeError):
            convert(source, str(dst), change, stopping(rng))
    return dst


def plant(rng: Rng, dst: Path) -> dict[str, bytes | None]:
    """Puts some files of a user's there, and returns them."""
    names = [*OTHERS * 4, "empty/", "train/", "deep/er/", f"{SCRATCH}/", "link", *NEEDED]
    ours = (dst / DATASET.claim).exists() or (dst / MANIFEST).exists()
    mine: dict[str, bytes | None] = {}
    for name in rng.permutation(np.array(names))[: rng.choice([0, 0, 1, 2, 3])]:
        path = dst / str(name)
        taken = ours and (name in NEEDED or str(name).startswith(SCRATCH))
        if path.exists() or taken or any(each.is_file() for each in path.parents):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir()
        elif name == "link":
            path.symlink_to([dst / "there", "/etc/hostname", dst / "labels"][rng.integers(3)])
        else:
            path.write_bytes(rng.bytes(8))
        mine[str(path.relative_to(dst))] = tree(dst)[str(path.relative_to(dst))]
    return mine


# ------------------------------------------------------------------------------------------ test


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    made = Tokenizer(models.WordLevel({"[UNK]": 0, "red": 1, "blue": 2}, unk_token="[UNK]"))
    folder = tmp_path_factory.mktemp("model")
    made.save(str(folder / "tokenizer.json"))
    return str(folder)


def check(dst: Path, mine: dict[str, bytes | None], refusal: ReneeError | None) -> None:
    after = tree(dst) if dst.exists() else {}
    assert {name: after.get(name, "gone") for name in mine} == mine
    ours = {name: text for name, text in after.items() if name not in mine}
    if refusal is not None:
        assert "\n" not in str(refusal) and len(str(refusal)) < 2000
    if refusal is None or MANIFEST in ours:  # the one that was there already
        named = Manifest.from_json(str(ours[MANIFEST], "utf-8"), "it").splits  # type: ignore[arg-type]
        parts = {part.path for each in named.values() for part in each}
        assert parts <= ours.keys()
    if refusal is None:
        assert Dataset.open(str(dst))
        assert {name for name, text in ours.items() if text is not None} == {MANIFEST, *parts}


def case(seed: int, place: Path, tokenizer: str) -> str:
    rng = np.random.default_rng(seed)
    fixed: dict[str, Any] = {"tokenizer": tokenizer, "part_rows": int(rng.choice([0, 2, 5]))}
    config = ConvertConfig(**fixed, validation=float(rng.choice([0, 0.3])))
    draw_source(rng, place / "src")
    dst = draw_destination(rng, place, config)
    claimed, mine = (dst / DATASET.claim).exists(), plant(rng, dst)
    overwrite = bool(rng.random() < 0.6)
    refusal = None
    try:
        convert(str(place / "src"), str(dst), config.model_copy(update={"overwrite": overwrite}))
    except ReneeError as error:
        refusal = error
    check(dst, mine, refusal)
    if not claimed and not any(name.startswith((SCRATCH, DATASET.claim)) for name in mine):
        assert not (dst / SCRATCH).exists() and not (dst / DATASET.claim).exists(), refusal
        left = {path for name in SPLITS for path in dst.glob(f"{name}/part-*")}
        assert (dst / MANIFEST).exists() or {str(p.relative_to(dst)) for p in left} <= set(mine)
    return "converted" if refusal is None else str(refusal)[-40:]


def check_cases(seeds: range, tmp_path: Path, tokenizer: str) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    for seed in seeds:
        place = tmp_path / str(seed)
        place.mkdir()
        try:
            outcomes[case(seed, place, tokenizer)] += 1
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise
    return outcomes


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_random_folders_over_other_files(tmp_path: Path, tokenizer: str) -> None:
    outcomes = check_cases(range(CASES), tmp_path, tokenizer)
    assert CASES / 8 < outcomes["converted"] < CASES * 7 / 8
    assert len(outcomes) > 12, "many kinds of refusals were met"
