"""Which files of a destination a conversion takes for its own."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from renee_ray.data.dataset import DATASET, MANIFEST, Dataset
from renee_ray.data.destination import SCRATCH, Destination, refuse_overlap
from renee_ray.data.storage import overlap
from renee_ray.errors import ReneeError

from .tiny import write_tiny

PARTS = ["train/part-00000.parquet", "labels/part-00000.parquet"]
CLAIM = DATASET.claim
SIGNATURE = "ab" * 32


@pytest.fixture
def dst(tmp_path: Path) -> Path:
    return tmp_path / "dst"


def destination(dst: Path, *, overwrite: bool = False) -> Destination:
    made = Destination(str(dst), DATASET, overwrite)
    made.check()
    return made


def write(path: Path, content: bytes = b"the user's") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def tree(root: Path) -> dict[str, bytes | None]:
    """Contents of all files below a directory; None for directories, targets of links."""
    found: dict[str, bytes | None] = {}
    for path in root.rglob("*"):
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = os.readlink(path).encode()
        else:
            found[name] = path.read_bytes() if path.is_file() else None
    return found


NEEDED = [*PARTS, "test/part-0.parquet", MANIFEST, f"{MANIFEST}.tmp", "_scratch/x", "train"]
OTHERS = ["notes.txt", "train/notes.txt", "validation/part-1.parquet.bak", "more/x.parquet"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", NEEDED)
def test_a_place_that_is_needed(dst: Path, name: str, overwrite: bool) -> None:
    write(dst / name)
    before = tree(dst)
    with pytest.raises(ReneeError, match=f"/dst/{name.removesuffix('/x')} is in the way"):
        destination(dst, overwrite=overwrite)
    assert tree(dst) == before


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_refused_or_left_alone(dst: Path, name: str) -> None:
    write(dst / name)
    with pytest.raises(
        ReneeError, match=rf"holds other files \('{name.removesuffix('/x.parquet')}"
    ):
        destination(dst)
    kept = destination(dst, overwrite=True)
    kept.claim(SIGNATURE)
    kept.declare(PARTS)
    for part in PARTS:
        write(dst / part, b"ours")
    kept.abandon()
    assert {path: text for path, text in tree(dst).items() if text is not None} == {
        name: b"the user's"
    }


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b'{"name": "my data"}',
    ],
)
def test_a_manifest_that_is_not_ours(dst: Path, text: bytes) -> None:
    path = write(dst / MANIFEST, text)
    for overwrite in False, True:
        with pytest.raises(ReneeError, match=f"/{MANIFEST} is in the way"):
            destination(dst, overwrite=overwrite)
    assert path.read_bytes() == text


def test_a_claim_that_was_cut_off_while_it_was_written(dst: Path) -> None:
    write(dst / CLAIM, b"")
    made = destination(dst)
    assert not made.claim(SIGNATURE)
    made.release()
    assert tree(dst) == {}


def test_what_was_written_before_the_source_changed_goes(dst: Path) -> None:
    """Also where the command that goes on from another source is refused in turn."""
    made = destination(dst)
    made.claim(SIGNATURE)
    made.declare(["train/part-00000.parquet"])
    write(dst / "train" / "part-00000.parquet")
    made = destination(dst)
    assert not made.claim("another")
    made.abandon()
    assert not [path for path in tree(dst) if path.endswith((".parquet", ".json"))]


def test_overwriting_replaces_what_the_manifest_names(dst: Path) -> None:
    write_tiny(dst)
    notes = write(dst / "train" / "notes.txt")
    (dst / "empty").mkdir()
    with pytest.raises(ReneeError, match="already holds a dataset"):
        destination(dst)
    old = {part.path for parts in Dataset.open(str(dst)).manifest.splits.values() for part in parts}
    made = destination(dst, overwrite=True)
    made.claim(SIGNATURE)
    assert Dataset.open(str(dst)), "as long as the source is being read"
    made.declare(["train/part-00000.parquet"])
    assert not any((dst / name).exists() for name in [*old, MANIFEST])
    made.release()
    assert notes.read_bytes() == b"the user's" and (dst / "empty").is_dir()
    assert not (dst / CLAIM).exists() and not (dst / SCRATCH).exists()


def test_a_part_that_the_manifest_does_not_name_is_refused(dst: Path) -> None:
    write_tiny(dst)
    write(dst / "train" / "part-00077.parquet")
    before = tree(dst)
    with pytest.raises(ReneeError, match=r"train/part-00077\.parquet is in the way"):
        destination(dst, overwrite=True)
    assert tree(dst) == before


def test_a_result_that_was_published_before_a_kill_is_released_by_the_next(dst: Path) -> None:
    killed = destination(dst)
    killed.claim(SIGNATURE)
    killed.declare(PARTS)
    assert not destination(dst).is_published(SIGNATURE)
    write_tiny(dst)
    made = destination(dst)
    assert not made.is_published("another") and made.is_published(SIGNATURE)
    made.release()
    assert not (dst / CLAIM).exists() and Dataset.open(str(dst))


def test_a_manifest_of_another_version_names_its_parts(dst: Path) -> None:
    write_tiny(dst)
    manifest = json.loads((dst / MANIFEST).read_text()) | {"format_version": 2}
    (dst / MANIFEST).write_text(json.dumps(manifest))
    made = destination(dst, overwrite=True)
    made.claim(SIGNATURE)
    made.declare([])
    assert not list(dst.rglob("*.parquet"))


def inside(place: Path) -> tuple[str, str]:
    return str(place / "a"), str(place / "a" / "b" / "c")


def by_a_link(place: Path) -> tuple[str, str]:
    (place / "a").mkdir()
    (place / "link").symlink_to(place / "a")
    return f"{place}/a", f"{place}/link/b"


def by_a_url(place: Path) -> tuple[str, str]:
    return f"file://{place}/a/../a/b", f"{place}/a"


def in_a_bucket(place: Path) -> tuple[str, str]:
    return "memory://bucket/a/", "memory://bucket/a//b"


@pytest.mark.parametrize("paths", [inside, by_a_link, by_a_url, in_a_bucket])
def test_paths_that_overlap(tmp_path: Path, paths: Callable[[Path], tuple[str, str]]) -> None:
    one, other = paths(tmp_path)
    assert overlap(one, other) and overlap(other, one) and overlap(one, one)
    assert not overlap(one, f"{one.rstrip('/')}-other") and not overlap("memory://a", "/a")
    with pytest.raises(ReneeError, match="are the same, or one is in the other"):
        refuse_overlap(one, other)
