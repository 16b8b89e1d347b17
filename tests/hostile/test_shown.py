"""Hostile texts are shown and not obeyed."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from renee_ray.cli.main import main
from renee_ray.config.schema import RunConfig
from renee_ray.errors import printable
from renee_ray.report.inspection import inspection_text
from renee_ray.report.run import examples_text, write_report

from .parts import column, first_part, parquet, replaced, tiny
from .place import Place

ESCAPES = "a\x1b]0;owned\x07\x1b[2J\u202egnp.exe\r\nb"


def shown(renderable: Any) -> str:
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=200)
    console.print(renderable)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def test_inspect_shows_label_texts_and_does_not_obey_them(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny(place)
    table = column("text", [f"[red]{ESCAPES}"] * 7)(first_part(path, "labels"))
    replaced(path, "labels", parquet(table))
    assert main(["inspect", str(path), "--samples", "9"]) == 0
    out = capsys.readouterr().out
    assert "[red]a\\x1b]0;owned\\x07\\x1b[2J\\u202egnp.exe\\r\\nb" in out.replace("\n", "")
    assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", out)


def test_report_shows_texts_and_does_not_obey_them(tmp_path: Path) -> None:
    script = "<script>alert(1)</script>[red]" + ESCAPES
    examples = [
        {
            "text": script,
            "true": [script],
            "predicted": [{"label": script, "score": 0.5, "right": True}],
        }
    ]
    out = shown(examples_text(examples))
    assert out.count("<script>alert(1)</script>[red]a\\x1b]0;owned") == 3
    assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", out)
    run = tmp_path / script.replace("/", "")
    run.mkdir()
    config = RunConfig(data=script, output=script, recipe=script).model_dump()
    data = {"path": script, "num_points": 1, "num_labels": 1}
    (run / "run.json").write_text(json.dumps({"config": config, "dataset": data}))
    status = {"format_version": 1, "state": "finished", "time_s": 0.0}
    (run / "status.json").write_text(json.dumps(status))
    path = write_report(
        str(run), str(tmp_path / "report.html"), facts={script: script}, examples=examples,
        comparison=[{"model": script, "P@1": 1.0}],
    )  # fmt: skip
    page = Path(path).read_text()
    assert page.count("<script") == 1 and page.count("&lt;script&gt;alert(1)") >= 9


def test_printable() -> None:
    assert printable("é 漢 [b]\t\x9b\ud800") == "é 漢 [b]\\t\\x9b\\ud800"
    facts: dict[str, Any] = {"tokens_a_row": {"train": {}}, "labels_a_point": {"train": {}}}
    facts |= {"points": {}, "parts": {"train": 0}, "labels": 1, "bytes": 1, "max_length": 1}
    facts |= {
        "share_of_labels_by_points": {"[b]\x1b": 1.0},
        "share_of_pairs_by_points": {"[b]\x1b": 1.0},
    }
    out = shown(
        inspection_text({**facts, "path": "p\x1b[2J", "tokenizer": "t", "problems": ["\x1bx"]})
    )
    assert "\x1b[2J" not in out and "[b]\\x1b" in out and "\\x1bx" in out
