"""What predict and export may delete and overwrite."""

from __future__ import annotations

import json
from pathlib import Path

import cloudpickle
import pytest

from renee_ray.data import storage
from renee_ray.data.destination import SCRATCH, Destination
from renee_ray.data.targets import part_name
from renee_ray.errors import ReneeError
from renee_ray.service.score.export import EXPORT
from renee_ray.service.score.predictions import PREDICTIONS

FILES = [part_name(0), part_name(7)]
CONTENT = {"k": 3, "step": 5}
CLAIM, MANIFEST = PREDICTIONS.claim, PREDICTIONS.manifest


def output(path: Path, *, overwrite: bool = False) -> Destination:
    made = Destination(str(path / "out"), PREDICTIONS, overwrite)
    made.check()
    return made


def export(path: Path, *, overwrite: bool = False) -> Destination:
    made = Destination(str(path / "out"), EXPORT, overwrite)
    made.check()
    return made


def write(path: Path, *names: str) -> None:
    for name in names:
        (path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (path / "out" / name).write_text("rows")


def names(path: Path) -> list[str]:
    return sorted(str(each.relative_to(path)) for each in (path / "out").rglob("*"))


def finish(path: Path) -> None:
    made = output(path)
    made.claim()
    made.declare(FILES)
    write(path, *FILES)
    made.publish(CONTENT)


def test_what_was_interrupted_is_begun_anew(tmp_path: Path) -> None:
    made = output(tmp_path)
    made.claim()
    write(tmp_path, f"{SCRATCH}/test/part-00000.parquet")
    cloudpickle.loads(cloudpickle.dumps(made)).declare(FILES)  # as a worker does
    assert Path(made.scratch()).is_dir()
    write(tmp_path, FILES[0], f"{MANIFEST}.tmp")  # as a killed process leaves it
    made = output(tmp_path)
    made.claim()
    made.declare([FILES[1]])
    write(tmp_path, FILES[1])
    made.publish(CONTENT)
    assert names(tmp_path) == [f"out/{MANIFEST}", f"out/{FILES[1]}"]
    written = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert written == {**CONTENT, "files": [FILES[1]]}


def test_a_claim_of_the_version_before(tmp_path: Path) -> None:
    write(tmp_path, FILES[0])
    (tmp_path / "out" / CLAIM).write_text(json.dumps({"files": FILES}))
    made = output(tmp_path)
    made.claim()
    made.declare([FILES[1]])
    assert names(tmp_path) == [f"out/{CLAIM}"]


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        ("empty", part_name(3)),
        ("empty", "_claim.json.mine"),
        ("empty", f"{MANIFEST}.tmp"),
        ("empty", "encoder/mine"),
        ("claimed", "notes.txt"),
        ("complete", "part-00000-00000.parquet"),
        ("complete", part_name(3)),
        ("complete", f"{MANIFEST}.tmp"),
        ("complete", f"{SCRATCH}/mine"),
        ("complete", "notes.txt"),
    ],
)
def test_a_file_that_is_not_ours_is_refused_and_survives(
    tmp_path: Path, stage: str, name: str
) -> None:
    if stage == "complete":
        finish(tmp_path)
    elif stage == "claimed":
        made = output(tmp_path)
        made.claim()
        made.declare(FILES)
    write(tmp_path, name)
    before = names(tmp_path)
    with pytest.raises(ReneeError, match=r"holds other files|is in the way"):
        output(tmp_path, overwrite=True)
    assert names(tmp_path) == before


def test_a_file_put_into_an_export_is_refused_and_survives(tmp_path: Path) -> None:
    made = export(tmp_path)
    made.claim()
    made.declare(["encoder/config.json", "head.safetensors"])
    write(tmp_path, "encoder/config.json", "head.safetensors")
    made.publish({"format_version": 1, "step": 5, "ranges": []})
    export(tmp_path, overwrite=True)
    write(tmp_path, "encoder/notes.txt")
    before = names(tmp_path)
    with pytest.raises(ReneeError, match=r"encoder/notes\.txt is in the way, and no export\.json"):
        export(tmp_path, overwrite=True)
    assert names(tmp_path) == before


def test_a_manifest_that_names_no_files_goes_with_all_of_their_names(tmp_path: Path) -> None:
    write(tmp_path, FILES[0])
    (tmp_path / "out" / MANIFEST).write_text(json.dumps(CONTENT))
    made = output(tmp_path, overwrite=True)
    made.claim()
    made.declare([FILES[1]])
    assert names(tmp_path) == [f"out/{CLAIM}"]


def test_a_command_whose_claim_is_anothers_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "SEEN_S", 0.0)
    first = output(tmp_path)
    first.claim("one")
    first.declare(FILES)
    write(tmp_path, FILES[0])
    second = output(tmp_path)
    assert not second.claim("two") and not second.is_writing()
    for step in (first.hold, lambda: first.declare(FILES), lambda: first.publish(CONTENT)):
        with pytest.raises(ReneeError, match="another command's"):
            step()
    second.declare([FILES[1]])
    write(tmp_path, FILES[1], f"{SCRATCH}/x")
    first.abandon()
    assert not first.is_writing()
    assert names(tmp_path) == [
        f"out/{name}" for name in sorted([CLAIM, SCRATCH, f"{SCRATCH}/x", FILES[1]])
    ]
    cloudpickle.loads(cloudpickle.dumps(second)).hold()  # as a worker does
    second.publish(CONTENT)
    assert names(tmp_path) == [f"out/{MANIFEST}", f"out/{FILES[1]}"]


def test_the_same_command_takes_the_claim_over_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "SEEN_S", 0.0)
    killed = output(tmp_path)
    killed.claim("one")
    killed.declare(FILES)
    write(tmp_path, FILES[0], f"{CLAIM}.tmp")
    again = output(tmp_path)
    assert again.claim("one") and again.is_writing()
    again.declare(FILES)
    with pytest.raises(ReneeError, match="another command's"):
        killed.publish(CONTENT)
    again.publish(CONTENT)
    assert names(tmp_path) == [f"out/{MANIFEST}", f"out/{FILES[0]}"]


def test_what_is_complete_is_kept_unless_asked(tmp_path: Path) -> None:
    finish(tmp_path)
    with pytest.raises(ReneeError, match="overwrite=true"):
        output(tmp_path)
    made = output(tmp_path, overwrite=True)
    made.claim()
    write(tmp_path, f"{SCRATCH}/x")
    made.abandon()
    assert names(tmp_path) == [f"out/{name}" for name in sorted([MANIFEST, *FILES])]
    made.claim()
    made.declare([FILES[0]])
    assert names(tmp_path) == [f"out/{CLAIM}"]


def test_what_was_published_is_complete_though_it_is_claimed(tmp_path: Path) -> None:
    """A command that was killed after its manifest and before its claim was gone."""
    made = output(tmp_path)
    made.claim()
    made.declare(FILES)
    write(tmp_path, *FILES)
    (tmp_path / "out" / MANIFEST).write_text(json.dumps({**CONTENT, "files": FILES}))
    with pytest.raises(ReneeError, match="overwrite=true"):
        output(tmp_path).claim()
    made = output(tmp_path, overwrite=True)
    made.claim()
    made.declare(FILES)
    assert names(tmp_path) == [f"out/{CLAIM}"]


def test_an_export_deletes_what_another_left(tmp_path: Path) -> None:
    made = export(tmp_path)
    made.claim()
    made.declare(["encoder/config.json", "head.safetensors"])
    write(tmp_path, "encoder/config.json")
    made = export(tmp_path)
    made.claim()
    made.declare(["head.safetensors"])
    assert names(tmp_path) == [f"out/{CLAIM}", "out/encoder"]


def test_a_claim_that_was_cut_off_is_ours(tmp_path: Path) -> None:
    write(tmp_path, CLAIM)
    (tmp_path / "out" / CLAIM).write_bytes(b"")
    made = output(tmp_path)
    made.claim()
    made.declare(FILES)


def test_a_slash_at_the_end_is_the_same_directory() -> None:
    """Object storage would take `x//part` for another key."""
    assert Destination("s3://bucket/x/", EXPORT, overwrite=False).path == "s3://bucket/x"
