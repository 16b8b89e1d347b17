"""The page holds what a run's files say, escaped, and asks for nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import binomtest

from renee_ray.checkpoint.registry import Checkpoints
from renee_ray.checkpoint.state import Manifest, State
from renee_ray.cli.main import main
from renee_ray.config.schema import RunConfig
from renee_ray.errors import ReneeError
from renee_ray.report.charts import LEFT, RIGHT, Axis
from renee_ray.report.checkpoints import checkpoint_table, list_checkpoints
from renee_ray.report.index import write_sweep
from renee_ray.report.run import comparison_table, examples_text, interval, write_report

from .service.browser import browser

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
            "time_s": 1000.0 + step,
            "total_steps": 2 * num_steps,
            "skipped": 3 * (step > num_steps // 2),
            "seconds_left": 60.0,
        }
        for step in range(1, num_steps + 1)
    ]
    names = ("P@1", "P@3", "P@5", "PSP@1", "PSP@5")
    evals = [
        {
            "step": 100 * i, "epoch": float(i), "metrics": {name: 10.5 + i % 80 for name in names},
            "time_s": 1000.0 + 100 * i,
            "points": 400.0, "by_frequency": {"2-5": {"labels": 1234.0, "recall@5": 60.25 + i}},
        }
        for i in range(1, num_evals + 1)
    ]  # fmt: skip
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


def run_at(path: Path, curves: dict[str, Any] | None, **status: Any) -> str:
    """A run directory with these curves, whose workers were started twice; its path."""
    path.mkdir(exist_ok=True)
    config = RunConfig(data="-", output="-", epochs=7).model_dump(mode="json")
    config["recipe"] = HOSTILE
    data = {
        "num_labels": 4321,
        "num_points": 98765,
        "path": str(path / "gone"),
        "manifest_hash": "",
    }
    plan = {"total_bytes": 3 << 30, "step_s": 0.25, "run_hours": 2.0, "num_workers": 2,
            "device": "h200"}  # fmt: skip
    starts = [{"step": 0, "time_s": 990.0, "workers": 2}, {"step": 96, "time_s": 1100.0,
              "workers": 1}]  # fmt: skip
    state = {
        "format_version": 1, "state": "stopped", "reason": "", "time_s": 2000.0, "step": 900,
        "starts": starts, "num_workers": 1, "command": "renee-ray train " + HOSTILE,
        "environment": {"device": "a device", "versions": {"torch": "9.8.7"}}, "skipped": 3,
        "record": curves["steps"][-1] if curves and curves["steps"] else None, **status,
    }  # fmt: skip
    files = {"run": {"config": config, "dataset": data, "plan": plan}, "status": state}
    files |= {} if curves is None else {"history": curves}
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return str(path)


def page_of(tmp_path: Path, curves: dict[str, Any] | None = None, **changes: Any) -> str:
    contents: dict[str, Any] = {
        "title": "A run of <b>" + HOSTILE,
        "facts": {"time to train": "2,379 s", "more " + HOSTILE: HOSTILE},
        "comparison": COMPARISON,
        "examples": EXAMPLES,
    }
    run = run_at(tmp_path, history(900, 4) if curves is None else curves)
    return Path(write_report(run, **{**contents, **changes})).read_text(encoding="utf-8")


def test_figures_are_shown(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    for figure in (
        "9.5", "3.1", "76.0", "n/a", "2,379", "0.88", "-12.50", "200 rows/s",
        "peak rss 1.50 GiB, gpu peak 6.25 GiB", "stopped; step 900 of 1,800; 15:10 since",
        "1 restart; 3 skipped steps", "1,234", "64.2", "3.00 GiB", "6.25 GiB", "250.0 ms",
        "2:00:00", "15:10 so far, 1:00 left", "2 x h200", "4,321 labels", "98,765",
        "a device", "9.8.7", "<td>7</td>", ">epochs<", "command",
    ):  # fmt: skip
        assert figure in page, figure
    for evaluation in ("11.5", "14.5"):
        assert evaluation in page
    # Equal after rounding is equally good; a missing figure is not a figure.
    assert page.count("<strong>24.0</strong>") == 2
    assert "<strong>48.2</strong>" in page and "<strong>n/a</strong>" not in page
    assert len(re.findall(r'class="mark" aria-hidden="true">✓<', page)) == 1
    assert "Right: </span>first label" in page


def test_every_point_of_a_chart_says_its_values(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    titles = re.findall(r"<circle [^>]*><title>(.*?)</title></circle>", page)
    assert page.count("<circle") == len(titles)
    for title in ("P@1 14.5 %, step 400", "2-5 64.2 %, step 400", "P@1 14.5 %, after 6:50"):
        assert titles.count(title) == 1, title
    # The workers' second start and the skipped steps, in each chart over time.
    marks = page.split("Over time")[1].count("<figure")
    assert titles.count("after 1:50: 1 worker started after step 96") == marks == 3
    assert titles.count("3 skipped by step 451") == marks


@pytest.mark.parametrize("values", [[0.0, 7.0], [0.03, 0.0301], [1e6, 5e6], [-3.0, -3.0]])
@pytest.mark.parametrize("unit", [1, 60])
def test_ticks_are_round_numbers_where_they_belong(values: list[float], unit: int) -> None:
    axis = Axis.of(np.array(values), LEFT, RIGHT, zero=False)
    ticks = axis.ticks(unit)
    assert 2 <= len(ticks) <= 7
    for place, text in ticks:
        number = float(text.replace("k", "e3").replace("M", "e6")) * unit
        expected = LEFT + (number - axis.low) / (axis.high - axis.low) * (RIGHT - LEFT)
        assert place == pytest.approx(expected, abs=0.06)
    assert LEFT < axis.at(values)[0] <= axis.at(values)[1] < RIGHT


@pytest.mark.parametrize(("percent", "points"), [(0.0, 10), (48.9361702, 47), (100.0, 900)])
def test_the_interval_of_a_share(percent: float, points: int) -> None:
    right = round(points * percent / 100)
    expected = binomtest(right, points).proportion_ci(method="wilson")
    found = re.findall(r"[\d.]+", interval(percent, points))
    assert [float(each) for each in found] == pytest.approx(
        [100 * expected.low, 100 * expected.high], abs=0.06
    )


def test_hostile_text_is_only_text(tmp_path: Path) -> None:
    elements = Elements(page_of(tmp_path))
    tags = [tag for tag, _ in elements.found]
    assert not {*tags} & {"img", "link", "iframe", "object"} and tags.count("script") == 1
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
    assert "@import" not in style and "url(" not in page
    script = page[page.index("<script>") + len("<script>") : page.index("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in page


def test_charts_follow_the_colour_scheme(tmp_path: Path) -> None:
    for svg in re.findall(r"<svg .*?</svg>", page_of(tmp_path), flags=re.DOTALL):
        assert 'class="line s1' in svg and not re.search(r"fill|stroke|style|#[0-9a-f]{3}", svg)


@pytest.mark.parametrize("empty", [{}, {"steps": [], "evals": []}])
def test_empty_history(tmp_path: Path, empty: dict[str, Any]) -> None:
    page = page_of(tmp_path, empty, comparison=[], examples=[], facts={})
    assert "No training steps are recorded" in page and "<svg" not in page


def test_one_step_and_values_that_are_not_numbers(tmp_path: Path) -> None:
    steps = [history(1, 0)["steps"][0] | {"loss": math.nan, "encoder_lr": 0.0, "padding": 0.5}]
    page = page_of(tmp_path, {"steps": steps, "evals": []})
    assert "Training loss" not in page and "50.0 %" in page


def test_the_page_of_a_long_history_stays_small(tmp_path: Path) -> None:
    page = page_of(tmp_path, history(30_000, 200))
    assert len(page) < 500_000 and page.count("<circle") < 3000


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    assert page_of(tmp_path) == page_of(tmp_path)


def test_errors_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_at(tmp_path / "run", history(3, 1))
    taken = tmp_path / "notes.html"
    taken.write_text("mine")
    for arguments, words in (
        ((run, tmp_path / "missing" / "a.html"), "cannot be written"),
        ((run, taken), "is no report of renee_ray"),
        ((tmp_path,), "is not a run"),
    ):
        assert main(["report", *map(str, arguments)]) == 1
        assert words in capsys.readouterr().err
    assert taken.read_text() == "mine" and not Path(run, "report.html").exists()
    assert main(["report", run, "--json"]) == 0 == main(["report", run])
    assert json.loads(capsys.readouterr().out.splitlines()[0]) == {"report": f"{run}/report.html"}
    Path(run, "history.json").write_text('{"steps": [{"step": 1}], "evals": []}')
    with pytest.raises(ReneeError, match=r"is damaged"):
        write_report(run)


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    curves = history(20, 1)
    for each in curves["evals"]:
        del each["points"], each["by_frequency"], each["time_s"]
    run = Path(run_at(tmp_path / "run", curves))
    saved = json.loads((run / "run.json").read_text())
    del saved["plan"]
    (run / "run.json").write_text(json.dumps(saved))
    page = Path(write_report(str(run))).read_text()
    assert "11.5" in page and "Settings" in page
    for title in ("Plan", "By label", "interval"):
        assert title not in page, title


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1440])
def test_the_values_of_a_point_in_a_browser(tmp_path: Path, width: int) -> None:
    """By mouse, touch and keyboard; without them, and on paper, nothing is in the way."""
    page_of(tmp_path, title="A run")
    shown = "[...document.querySelectorAll('output')].filter(o => !o.hidden).map(o => o.innerText)"
    with browser(tmp_path, width) as page:
        page.open(f"file://{tmp_path}/report.html")
        assert page.value("document.documentElement.scrollWidth") <= width
        assert page.value(shown) == []
        assert page.value("document.querySelector('circle title')") is None, "shown twice"
        place = """(() => { const svg = document.querySelectorAll('figure.chart svg')[1];
            svg.scrollIntoView({block: 'center'});
            const box = svg.querySelectorAll('g.line')[1].lastElementChild.getBoundingClientRect();
            return [box.x + box.width / 2 + 2, box.y + box.height / 2 - 1]; })()"""
        x, y = page.value(place)
        if width < 600:
            page.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
            page.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        else:
            page.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        # All three metrics are alike here: the first of them that is nearest is shown.
        page.until(f"{shown}.length === 1")
        assert re.fullmatch(r"P@[135] 14\.5 %, step 400", page.value(shown)[0])
        if width > 600:
            page.call("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
            page.until(f"{shown}.length === 0")
        page.value("document.querySelectorAll('figure.chart svg')[6].focus()")
        for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
            page.call("Input.dispatchKeyEvent", type="keyDown", key=key)
        assert page.value(shown) == ["gpu peak 6.25 GiB, step 13"]
        assert page.value("document.documentElement.scrollWidth") <= width
        page.call("Input.dispatchKeyEvent", type="keyDown", key="Escape")
        page.value("document.activeElement.blur()")
        page.call("Emulation.setEmulatedMedia", media="print")
        assert page.value("getComputedStyle(document.querySelector('output')).display") == "none"
        assert page.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert page.asked == [f"file://{tmp_path}/report.html"]


def test_terminal_shows_the_same() -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(comparison_table(COMPARISON))
    console.print(examples_text(EXAMPLES))
    console.print(comparison_table([]))
    shown = console.export_text()
    for expected in ("48.2", "24.0", "3.1", "n/a", "✓ 0.88", "· -12.50", "first label; <script>"):
        assert re.search(expected.replace(" ", r"\s+").replace(".", r"\."), shown), expected
    assert "[bold]" in shown  # a text's brackets are not the terminal library's markup


def test_the_best_checkpoint_is_marked_and_never_the_untrained_one() -> None:
    rows = [
        {"name": f"step-{step}", "step": step, "problem": None, "metrics": {"P@1": value},
         "revision": 0}
        for step, value in ((20, 58.0), (10, 58.0), (0, 60.0))
    ]  # fmt: skip
    rows.insert(0, {"name": "step-30", "step": 30, "problem": "damaged", "revision": 0})
    table = checkpoint_table(rows, "P@1", verified=False)
    assert list(table.columns[4].cells) == ["", "58.00", "58.00 best", "60.00"]


@pytest.mark.parametrize(
    ("changes", "later", "best"),
    [
        ([], {}, "step-000000010-00000000"),
        ([{"retired": [1]}], {}, "step-000000030-00000000@1"),
        ([{"retired": [1]}], {40: 41.0, 50: 40.0}, "step-000000040-00000000@1"),
        ([{"retired": [1]}, {"num_labels": 9}], {}, "step-000000030-00000000@2"),
        ([{"num_labels": 9}], {}, "step-000000030-00000000@1"),
    ],
)
def test_the_best_checkpoint_is_the_registrys(
    tmp_path: Path, changes: list[dict[str, Any]], later: dict[int, float], best: str
) -> None:
    """Changes are of the newest checkpoint's labels; those that follow have the same revision."""
    found = Checkpoints(str(tmp_path))

    def publish(step: int, value: float, facts: dict[str, Any]) -> None:
        manifest = Manifest(State(step=step, facts=facts), {"P@1": value}, {}, 1.0)
        name = f"step-{step:09d}-00000000"
        Path(found.root, name).mkdir(parents=True, exist_ok=True)
        found.publish(name, manifest)

    for step, value in {0: 60.0, 10: 58.0, 20: 58.0, 30: 57.0}.items():
        publish(step, value, {})
    for facts in changes:
        newest = found.newest()
        assert newest is not None
        found.revise(newest, facts, {})
    for step, value in later.items():
        publish(step, value, {"revision": 1})
    chosen = found.best("P@1")
    assert chosen is not None and chosen.name == best
    rows = list_checkpoints(str(tmp_path), verify=False)
    names, *_, metric, _ = checkpoint_table(rows, "P@1", verified=False).columns
    marked = zip(names.cells, metric.cells, strict=True)
    assert [name for name, cell in marked if "best" in str(cell)] == [best]


@pytest.mark.parametrize(
    ("name", "reached", "words"),
    [
        ("nprobe", True, "The least nprobe that finds it, of those tried: 2."),
        ("nprobe", False, "No nprobe that was tried reaches it; the nearest is 2."),
        ("none", True, "there is no effort to choose; it reaches this."),
        ("none", False, "there is no effort to choose; it does not reach this."),
    ],
)
def test_the_page_of_an_index(tmp_path: Path, name: str, reached: bool, words: str) -> None:
    sweep = [
        {"effort": i, "candidates": 1, "recall@10": 0.5 * i, "queries/s one core": speed}
        for i, speed in ((1, 3000.0), (2, 0.75))
    ]
    facts = {
        "effort": 2, "effort_name": name, "candidates": 1, "recall": 0.9, "reached": reached,
        "factory": "F", "num_labels": 12, "sweep": sweep, "exact": {"queries/s one core": 0.5},
    }  # fmt: skip
    write_sweep(f"{tmp_path}/recall.html", facts)
    page = (tmp_path / "recall.html").read_text()
    assert words in page and page.count("reach") + page.count("finds it") == 1
    assert (">none<" in page, "Every effort" in page) == (False, name != "none")
    titles = re.findall(r"<circle [^>]*><title>(.*?)</title></circle>", page)
    assert titles == [
        "recall@10 0.5, 0.333 ms a query, one core", "recall@10 1, 1330 ms a query, one core"
    ]  # fmt: skip
