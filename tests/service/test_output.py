"""What a command may delete and overwrite: what a claim or a manifest of ours names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from renee_ray.errors import ReneeError
from renee_ray.service.run.output import CLAIM, Output
from renee_ray.service.score.export import output_at
from renee_ray.service.score.predict import MANIFESTS, OURS
from renee_ray.service.score.predictions import part_name

FILES = [part_name(0), part_name(7)]
CONTENT = {"k": 3, "step": 5}


def output(path: Path) -> Output:
    return Output(str(path / "out"), "predictions", MANIFESTS, frozenset(CONTENT), OURS)


def write(path: Path, *names: str) -> None:
    for name in names:
        (path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (path / "out" / name).write_text("rows")


def names(path: Path) -> list[str]:
    return sorted(str(each.relative_to(path)) for each in (path / "out").rglob("*"))


def finish(path: Path) -> None:
    made = output(path)
    made.claim(FILES)
    write(path, *FILES)
    made.publish(CONTENT, FILES)


def test_what_was_interrupted_is_begun_anew(tmp_path: Path) -> None:
    made = output(tmp_path)
    made.check(False)
    with made.scratch("_texts") as scratch:
        Path(scratch).mkdir()
        made.claim([*FILES, "_texts/"])
        assert Path(scratch).is_dir()
        write(tmp_path, FILES[0], f"{MANIFESTS[0]}.tmp", f"{CLAIM}.tmp")
    write(tmp_path, "_texts/test/part-00000.parquet")  # as a killed process leaves it
    made.check(False)
    made.claim([FILES[1]])
    assert names(tmp_path) == [f"out/{CLAIM}"]
    write(tmp_path, FILES[1])
    made.publish(CONTENT, [FILES[1]])
    assert names(tmp_path) == [f"out/{MANIFESTS[0]}", f"out/{FILES[1]}"]


@pytest.mark.parametrize("stage", ["empty", "claimed", "complete"])
@pytest.mark.parametrize(
    "name",
    ["part-00000-00000.parquet", part_name(3), "notes.txt", "_texts/mine", "encoder/mine",
     "_claim.json.mine"],
)  # fmt: skip
def test_a_file_that_nobody_names_is_refused_and_survives(
    tmp_path: Path, stage: str, name: str
) -> None:
    if stage == "complete":
        finish(tmp_path)
    elif stage == "claimed":
        output(tmp_path).claim(FILES)
    write(tmp_path, name)
    before = names(tmp_path)
    with pytest.raises(ReneeError, match="holds other files"):
        output(tmp_path).check(True)
    assert names(tmp_path) == before


def test_what_is_complete_is_kept_unless_asked(tmp_path: Path) -> None:
    finish(tmp_path)
    with pytest.raises(ReneeError, match="overwrite=true"):
        output(tmp_path).check(False)
    output(tmp_path).check(True)
    with pytest.raises(ValueError, match="bad text"), output(tmp_path).scratch("_texts"):
        raise ValueError("bad text")
    assert names(tmp_path) == [f"out/{name}" for name in sorted([MANIFESTS[0], *FILES])]
    output(tmp_path).claim([FILES[0]])
    assert names(tmp_path) == [f"out/{CLAIM}"]
    assert set(json.loads((tmp_path / "out" / CLAIM).read_text())["files"]) == set(FILES)


def test_predictions_of_the_earlier_name_are_recognised(tmp_path: Path) -> None:
    write(tmp_path, "part-00000-00000.parquet")
    (tmp_path / "out" / "predictions.json").write_text(json.dumps(CONTENT))
    with pytest.raises(ReneeError, match="overwrite=true"):
        output(tmp_path).check(False)
    output(tmp_path).check(True)
    output(tmp_path).claim(FILES)
    assert names(tmp_path) == [f"out/{CLAIM}"]
    write(tmp_path, "predictions.json")  # somebody else's
    with pytest.raises(ReneeError, match="holds other files"):
        output(tmp_path).check(True)


def test_an_export_deletes_what_its_claim_names(tmp_path: Path) -> None:
    made = output_at(str(tmp_path / "out"))
    made.claim(["encoder/config.json", "head.safetensors"])
    write(tmp_path, "encoder/config.json")
    made.check(False)
    write(tmp_path, "encoder/model.safetensors")
    with pytest.raises(ReneeError, match=r"other files \('encoder/model.safetensors'\)"):
        made.check(True)
    (tmp_path / "out/encoder/model.safetensors").unlink()
    made.claim(["head.safetensors"])
    assert names(tmp_path) == [f"out/{CLAIM}", "out/encoder"]


def test_a_claim_names_nothing_elsewhere(tmp_path: Path) -> None:
    write(tmp_path, "thesis.tex")
    (tmp_path / "precious").write_text("mine")
    claim = {"files": ["../precious", "thesis.tex", str(tmp_path / "precious"), 7]}
    (tmp_path / "out" / CLAIM).write_text(json.dumps(claim))
    with pytest.raises(ReneeError, match=r"other files \('thesis.tex'\)"):
        output(tmp_path).check(True)
    output(tmp_path).claim(FILES)
    assert (tmp_path / "precious").exists() and (tmp_path / "out/thesis.tex").exists()


def test_a_temporary_file_without_a_claim_is_somebodys(tmp_path: Path) -> None:
    write(tmp_path, f"{CLAIM}.tmp")
    with pytest.raises(ReneeError, match="holds other files"):
        output(tmp_path).check(True)


def test_a_claim_that_was_cut_off_is_ours(tmp_path: Path) -> None:
    write(tmp_path, CLAIM)
    (tmp_path / "out" / CLAIM).write_bytes(b"")
    output(tmp_path).check(False)
    output(tmp_path).claim(FILES)


def test_an_earlier_export_names_no_file_of_the_users(tmp_path: Path) -> None:
    """Its manifest has no list of files."""
    write(tmp_path, "encoder/config.json", "encoder/onnx/model.onnx", "encoder/README.md")
    made = output_at(str(tmp_path / "out"))
    (tmp_path / "out" / "export.json").write_text(json.dumps(dict.fromkeys(made.keys, 1)))
    with pytest.raises(ReneeError, match=r"encoder/README\.md"):
        made.check(True)
    (tmp_path / "out" / "encoder" / "README.md").unlink()
    with pytest.raises(ReneeError, match="encoder/onnx/"):
        made.check(True)
