"""The page holds what it was given, escaped, and asks for nothing from elsewhere."""

from __future__ import annotations

import builtins
import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from renee_ray.errors import ReneeError
from renee_ray.report.run import comparison_table, examples_text, write_report

HOSTILE = "<script>alert('x')</script>\"><img src=http://evil.example/a> {{ 7*7 }} [bold]"
COMPARISON = [
    {"model": "trained", "P@1": 48.25, "P@5": 24.04, "recall@100": 76.0},
    {"model": "most frequent", "P@1": 9.5, "P@5": 24.01, "PSP@1": 3.125},
]
EXAMPLES = [
    {
        "text": "a text " + HOSTILE,
        "true": ["first label", HOSTILE],
        "predicted": [
            {"label": "first label", "score": 0.875, "right": True},
            {"label": "wrong " + HOSTILE, "score": -12.5, "right": False},
        ],
    }
]


def history(num_steps: int, num_evals: int) -> dict[str, Any]:
    steps = [
        {
            "step": step,
            "epoch": step / 100,
            "loss": 5 / step if step % 2 else None,
            "rows_per_second": 200.0,
            "padding": 0.125,
            "encoder_lr": 1e-4 * step / num_steps,
            "classifier_lr": 0.05,
            "peak_rss_gib": 1.5,
            "gpu_peak_gib": 6.25 if step % 2 else None,
            "time_s": float(step),
        }
        for step in range(1, num_steps + 1)
    ]
    names = ("P@1", "P@3", "P@5", "PSP@1", "PSP@5")
    evals = [
        {"step": i, "epoch": i / 2, "metrics": {name: 10.5 + i for name in names}}
        for i in range(1, num_evals + 1)
    ]
    return {"steps": steps, "evals": evals}


class Elements(HTMLParser):
    """Every element with its attributes, the text outside of styles, and the ids."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(tmp_path: Path, **changes: Any) -> str:
    contents: dict[str, Any] = {
        "title": "A run of <b>" + HOSTILE,
        "facts": {"training points": "2,379", "encoder " + HOSTILE: HOSTILE},
        "history": history(900, 4),
        "comparison": COMPARISON,
        "examples": EXAMPLES,
    }
    path = tmp_path / "report.html"
    write_report(str(path), **{**contents, **changes})
    return path.read_text(encoding="utf-8")


def test_figures_are_shown(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    for figure in (
        "9.5",
        "3.1",
        "76.0",
        "n/a",
        "2,379",
        "0.88",
        "-12.50",
        "200 rows/s",
        "peak rss 1.50, gpu peak 6.25 GiB",
    ):
        assert figure in page, figure
    for evaluation in ("11.5", "14.5"):
        assert evaluation in page
    assert page.count("<svg ") == 7
    # Equal after rounding is equally good; a missing figure is not a figure.
    assert page.count("<strong>24.0</strong>") == 2
    assert "<strong>48.2</strong>" in page and "<strong>n/a</strong>" not in page
    assert len(re.findall(r'class="mark" aria-hidden="true">✓<', page)) == 1
    assert "Right: </span>first label" in page


def test_hostile_text_is_only_text(tmp_path: Path) -> None:
    elements = Elements(page_of(tmp_path))
    tags = {tag for tag, _ in elements.found}
    assert not tags & {"script", "img", "link", "iframe", "object"}
    assert elements.text.count("<script>alert('x')</script>") >= 5
    assert "{{ 7*7 }}" in elements.text and not any(
        name.startswith("on") for _, attributes in elements.found for name in attributes
    )


def test_nothing_is_loaded_from_elsewhere(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    for tag, attributes in Elements(page).found:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
                assert value and value.startswith("#"), (tag, name, value)
    style = page[page.index("<style>") : page.index("</style>")]
    assert "@import" not in style and "url(" not in style
    assert not re.findall(r"url\((?!#)", page)


def test_ids_are_unique_and_references_resolve(tmp_path: Path) -> None:
    elements = Elements(page_of(tmp_path)).found
    ids = [str(attributes["id"]) for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in elements:
        for value in attributes.values():
            for reference in re.findall(r"^#(\S+)$|url\(#([^)]+)\)", value or ""):
                assert "".join(reference) in ids


def test_charts_follow_the_colour_scheme(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    for svg in re.findall(r"<svg .*?</svg>", page, flags=re.DOTALL):
        assert "var(--series-1)" in svg and "#a0000" not in svg
        painted = set(re.findall(r"(?:fill|stroke): (#\w+)", svg))
        assert not painted, painted


@pytest.mark.parametrize("empty", [{}, {"steps": [], "evals": []}])
def test_empty_history(tmp_path: Path, empty: dict[str, Any]) -> None:
    page = page_of(tmp_path, history=empty, comparison=[], examples=[], facts={})
    assert "No training steps are recorded" in page and "<svg" not in page


def test_one_step_and_values_that_are_not_numbers(tmp_path: Path) -> None:
    steps = [{"step": 1, "epoch": 0.1, "loss": math.nan, "encoder_lr": 0.0, "padding": 0.5}]
    page = page_of(tmp_path, history={"steps": steps, "evals": []})
    assert "Training loss" not in page and "50.0 %" in page


def test_a_long_history_stays_small_and_a_resumed_one_in_order(tmp_path: Path) -> None:
    long = history(30_000, 200)
    long["steps"] += [{**step, "rows_per_second": 777.0} for step in long["steps"][-5:]]
    page = page_of(tmp_path, history=long)
    assert len(page) < 1_500_000
    assert "Last: 777 rows/s" in page


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    assert page_of(tmp_path) == page_of(tmp_path)


def test_errors_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ReneeError, match=r"cannot be written .* give a writable path"):
        page_of(tmp_path / "missing")

    real_import = builtins.__import__

    def without_jinja(name: str, *rest: Any) -> Any:
        if name == "jinja2":
            raise ModuleNotFoundError("No module named 'jinja2'", name="jinja2")
        return real_import(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_jinja)
    with pytest.raises(ReneeError, match=r"needs jinja2.*pip install 'renee_ray\[quickstart\]'"):
        page_of(tmp_path)


def test_terminal_shows_the_same() -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(comparison_table(COMPARISON))
    console.print(examples_text(EXAMPLES))
    console.print(comparison_table([]))
    shown = console.export_text()
    for expected in ("48.2", "24.0", "3.1", "n/a", "✓ 0.88", "· -12.50", "first label; <script>"):
        assert re.search(expected.replace(" ", r"\s+").replace(".", r"\."), shown), expected
    assert "[bold]" in shown  # a text's brackets are not the terminal library's markup
