"""The command line: help, exit status, one sentence for a user's error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from renee_ray import cli
from renee_ray.config import ReneeError


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """(exit status, standard output, standard error)."""
    status = cli.main(list(arguments))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_help_lists_every_command_and_key(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--help")
    assert status == 0
    assert all(name in out for name in ("quickstart", "convert", "train", "evaluate", "predict"))
    status, out, _ = run(capsys, "train", "--help")
    assert status == 0
    assert "encoder.learning_rate: float = " in out and "data: str" in out
    assert "Peak learning rate of AdamW." in " ".join(out.split())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("train", "no-such-file.yaml"), "cannot read no-such-file.yaml"),
        (("convert", "src", "dst", "max_lenght=9"), "did you mean 'max_length'?"),
        (("convert", "src", "dst", "max_length"), "not of the form key=value"),
        (("convert", "no-such-folder", "dst"), "no-such-folder"),
        (("quickstart", "epoch=3"), "did you mean 'epochs'?"),
        (("quickstart", "epochs=0"), "epochs=0 in quickstart is wrong"),
        (("quickstart", "data=somewhere"), "use `renee-ray train"),
        (("quickstart", "output=s3://bucket/x"), "is no local directory"),
        (("quickstart", "num_workers=65"), "raise batch_size"),
        (("evaluate", "no-such-run", "no-such-dataset"), "no-such-run is not a run of renee_ray"),
    ],
)
def test_a_users_error_is_one_sentence_on_one_line(
    arguments: tuple[str, ...],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, *arguments)
    assert status == 1 and out == ""
    assert sentence in err
    assert err.startswith("renee-ray: ") and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []  # nothing was begun


def test_long_sentences_are_not_wrapped(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "a [red]sentence[/red] of " + "many " * 60 + "words"
    monkeypatch.setattr(cli, "read_yaml", _raise(ReneeError(text)))
    assert run(capsys, "train", "x.yaml") == (1, "", f"renee-ray: {text}\n")


def test_wrong_usage_is_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "predict", "run")
    assert status == 2 and "Missing argument" in err
    assert run(capsys, "no-such-command")[0] == 2


def test_an_interrupt_is_status_130(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "read_yaml", _raise(KeyboardInterrupt()))
    status, out, err = run(capsys, "train", "x.yaml")
    assert (status, out, err.strip()) == (130, "", "renee-ray: interrupted")


def test_a_users_error_that_ray_wrapped_is_found(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    wrapped = RuntimeError("a task failed")
    wrapped.__cause__ = ReneeError("part 3 is damaged; convert the source again")
    monkeypatch.setattr(cli, "read_yaml", _raise(wrapped))
    sentence = "renee-ray: part 3 is damaged; convert the source again\n"
    assert run(capsys, "train", "x.yaml") == (1, "", sentence)


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "read_yaml", _raise(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["train", "x.yaml"])


def test_evaluate_prints_json_or_a_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import renee_ray.service.predict as predict

    found = {"split": "test", "step": 7, "points": 3, "metrics": {"P@1": 50.0, "recall@100": 75.5}}
    monkeypatch.setattr(predict, "evaluate_run", lambda *_: found)
    status, out, _ = run(capsys, "evaluate", "run", "data", "--json")
    assert status == 0 and json.loads(out) == found
    status, out, _ = run(capsys, "evaluate", "run", "data")
    assert status == 0 and "50.00" in out and "75.50" in out and "test split, step 7" in out


def _raise(error: BaseException) -> Any:
    def function(*_: object) -> None:
        raise error

    return function
