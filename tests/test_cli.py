"""The command line: help, exit status, one sentence for a user's error."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from renee_ray.cli import main as cli
from renee_ray.cli import train
from renee_ray.errors import ReneeError
from renee_ray.report.inspection import conversion_text


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
        (("quickstart", "epochs=0"), "epochs='0' on the command line is wrong"),
        (("quickstart", "data=somewhere"), "use `renee-ray train"),
        (("quickstart", "output=s3://bucket/x"), "is no local directory"),
        (("quickstart", "num_workers=65"), "raise batch_size"),
        (("convert", "", "dst"), "SRC is empty"),
        (("convert", "src", ""), "DST is empty"),
        (("train", ""), "CONFIG is empty"),
        (("predict", "run", "src", " "), "DST is empty"),
        (("inspect", ""), "DATASET is empty"),
        (("status", ""), "RUN is empty"),
        (("quickstart", "output="), "output='' is no local directory"),
        (("convert", "src", "dst", "tokenizer="), "tokenizer='' on the command line is wrong"),
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
    monkeypatch.setattr(train, "read_yaml", _raise(ReneeError(text)))
    assert run(capsys, "train", "x.yaml") == (1, "", f"renee-ray: {text}\n")


def test_wrong_usage_is_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "predict", "run")
    assert status == 2 and "Missing argument" in err
    assert run(capsys, "no-such-command")[0] == 2


def test_an_interrupt_is_status_130(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "read_yaml", _raise(KeyboardInterrupt()))
    status, out, err = run(capsys, "train", "x.yaml")
    assert (status, out, err.strip()) == (130, "", "renee-ray: interrupted")


def test_a_users_error_that_ray_wrapped_is_found(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    wrapped = RuntimeError("a task failed")
    wrapped.__cause__ = ReneeError("part 3 is damaged; convert the source again")
    monkeypatch.setattr(train, "read_yaml", _raise(wrapped))
    sentence = "renee-ray: part 3 is damaged; convert the source again\n"
    assert run(capsys, "train", "x.yaml") == (1, "", sentence)


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "read_yaml", _raise(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["train", "x.yaml"])


def test_evaluate_prints_json_or_a_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from renee_ray.service.score import evaluate

    found = {"split": "test", "step": 7, "points": 3, "metrics": {"P@1": 50.0, "recall@100": 75.5}}
    monkeypatch.setattr(evaluate, "evaluate_run", lambda *_: found)
    status, out, _ = run(capsys, "evaluate", "run", "data", "--json")
    assert status == 0 and json.loads(out) == found
    status, out, _ = run(capsys, "evaluate", "run", "data")
    assert status == 0 and "50.00" in out and "75.50" in out and "test split, step 7" in out


def test_convert_ends_with_a_table_of_what_is_in_it_and_what_was_odd() -> None:
    train = {"points": 2840, "tokens_mean": 24.4, "tokens_max": 47, "at_max_length": 0}
    train |= {"labels_mean": 1.926, "labels_max": 10, "label_pairs": 5470, "filter_pairs": 9}
    labels = {"points": 800, "tokens_mean": 22.9, "tokens_max": 45, "replaced_lines": 0}
    facts = {
        "dataset": "sets/x",
        "labels": 800,
        "statistics": {
            "train": train | {"duplicate_pairs": 0, "replaced_lines": 1234, "zero_values": 0},
            "labels": labels | {"share_of_labels_by_train_count": {"0": 0.5}},
        },
        "hints": ["label 0 has no point; are the ids one-based?"],
    }
    with Console(file=io.StringIO(), width=80) as console, console.capture() as captured:
        console.print(conversion_text(facts), highlight=False)
    text = captured.get()
    assert "sets/x: 800 labels" in text
    assert re.search(r"train .* 2,840 .* 24.4 .* 47 .* 0 .* 1.926 .* 10 ", text)
    last = text.rstrip().splitlines()[-2:]
    assert [line.strip() for line in last] == ["train: 1,234 replaced lines", facts["hints"][0]]
    assert not re.search("duplicate|zero|share|filter", text)


def _raise(error: BaseException) -> Any:
    def function(*_: object) -> None:
        raise error

    return function
