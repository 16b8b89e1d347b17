"""The report of a run: one self-contained HTML page, and the same contents for a terminal.

    facts       {"training points": "2,379", ...}, shown in the given order
    history     a run's history.json: {"steps": [{"step", "epoch", "loss", "rows_per_second",
                "padding", "encoder_lr", "classifier_lr", "peak_rss_gib", "gpu_peak_gib", ...}],
                "evals": [{"step", "epoch", "metrics": {"P@1": percent, ...}}]}; a value may be
                missing or None, "padding" is a share of 1
    comparison  [{"model": "renee_ray", "P@1": percent, ...}]; a metric may be missing from a row
    examples    [{"text": str, "true": [str], "predicted": [{"label": str, "score": float,
                "right": bool}]}]

The charts are inline SVG drawn with placeholder colours that become CSS variables, so that they
follow the reader's light or dark setting as the text does. The page loads nothing from elsewhere.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from renee_ray.errors import ReneeError, printable

if TYPE_CHECKING:
    from markupsafe import Markup

Floats = npt.NDArray[np.float64]

INK, GRID = "#a00001", "#a00002"
SERIES = tuple(f"#a0000{i}" for i in range(3, 9))
CSS_COLOURS = {
    INK: "var(--muted)",
    GRID: "var(--line)",
    **{colour: f"var(--series-{i})" for i, colour in enumerate(SERIES, start=1)},
}
DASHES = ("-", "--", ":", "-.", "-", "--")
MARKERS = ("o", "s", "^", "D", "v", "P")

FORMATS = {"%": ".1f", "rows/s": ".0f", "GiB": ".2f"}
"""Unit of a chart -> format of its values."""

MAX_POINTS = 100
"""Most points of a line; longer histories are averaged in bins, which smooths a sampled loss."""

NOT_KNOWN = "n/a"


@dataclass(frozen=True)
class Chart:
    """A drawn chart."""

    title: str
    note: str
    """The last (or highest) value of each line, in words; also the text for screen readers."""
    svg: Markup


@dataclass(frozen=True)
class Line:
    """One line of a chart: x and y float64 [n], finite, n >= 1."""

    label: str
    x: Floats
    y: Floats


def write_report(
    path: str,
    *,
    title: str,
    facts: Mapping[str, str],
    history: Mapping[str, Any],
    comparison: Sequence[Mapping[str, Any]],
    examples: Sequence[Mapping[str, Any]],
) -> None:
    """Writes the page (arguments in the module's ledger) to the local file `path`.

    Raises:
        ReneeError: jinja2 or matplotlib is not installed, or the file cannot be written.
    """
    check_libraries()
    evals = in_order(history.get("evals", ()))
    write_page(
        path,
        "report.html.j2",
        title=title,
        facts=facts,
        charts=_charts(in_order(history.get("steps", ())), evals),
        comparison=_cells(comparison),
        evaluations=_cells([{"epoch": f"{e['epoch']:.2f}", **e["metrics"]} for e in evals]),
        examples=examples,
    )


def check_libraries() -> None:
    """Raises ReneeError where jinja2 or matplotlib is not installed."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ReneeError(
            f"a report needs {error.name}, which is not installed; "
            f"pip install 'renee_ray[quickstart]'"
        ) from error


def write_page(path: str, template: str, **values: Any) -> None:
    """Fills in a template of report/templates/ and writes it to the local file `path`."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("renee_ray.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(template).render(**values)
    try:
        Path(path).write_text(page, encoding="utf-8")
    except OSError as error:
        raise ReneeError(
            f"{path}: the report cannot be written ({error.strerror}); give a writable path"
        ) from error


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Shows the comparison for a terminal; the best figure of each column is bold."""
    cells = _cells(rows)
    table = Table(title="Test set, percent", title_justify="left")
    for i, name in enumerate(cells.header):
        table.add_column(Text(name), justify="right" if i else "left", no_wrap=bool(i))
    for row in cells.rows:
        table.add_row(*(Text(cell.text, style="bold green" if cell.best else "") for cell in row))
    return table


def examples_text(examples: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Shows the examples for a terminal: a title, then its predictions, the right ones ticked."""
    blocks: list[RenderableType] = []
    for example in examples:
        predictions = Table.grid(padding=(0, 1), pad_edge=True)
        for prediction in example["predicted"]:
            right = prediction["right"]
            predictions.add_row(
                Text("✓" if right else "·", style="bold green" if right else "dim"),
                Text(f"{prediction['score']:.2f}", style="dim"),
                Text(printable(prediction["label"]), style="green" if right else ""),
            )
        true = printable("; ".join(example["true"])) or "none"
        predictions.add_row("", Text("true", style="dim"), Text(true, style="dim"))
        blocks += [Text(printable(example["text"]), style="bold"), predictions, Text()]
    return Group(*blocks)


@dataclass(frozen=True)
class Cell:
    text: str
    best: bool


@dataclass(frozen=True)
class Cells:
    """A table as text: its first column names the row, the others hold percentages."""

    header: list[str]
    rows: list[list[Cell]]


def _cells(rows: Sequence[Mapping[str, Any]]) -> Cells:
    """Formats rows whose first key names them; columns in order of first appearance."""
    header = list(dict.fromkeys(key for row in rows for key in row))
    if not header:
        return Cells([], [])
    # Rounded first: figures that read the same are equally good.
    texts = {
        name: [f"{row[name]:.1f}" if row.get(name) is not None else NOT_KNOWN for row in rows]
        for name in header[1:]
    }
    best = {
        name: max((text for text in column if text != NOT_KNOWN), key=float, default="")
        for name, column in texts.items()
    }
    return Cells(
        header,
        [
            [Cell(str(row[header[0]]), False)]
            + [Cell(texts[name][i], texts[name][i] == best[name]) for name in header[1:]]
            for i, row in enumerate(rows)
        ],
    )


def in_order(entries: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Sorts by step and keeps the last of each: a resumed run has repeated some steps."""
    by_step = {entry["step"]: entry for entry in entries}
    return [by_step[step] for step in sorted(by_step)]


def _charts(steps: Sequence[Mapping[str, Any]], evals: Sequence[Mapping[str, Any]]) -> list[Chart]:
    scores = [{"epoch": e["epoch"], **e["metrics"]} for e in evals]
    memory = _lines(steps, "peak_rss_gib", "gpu_peak_gib")
    drawn = (
        chart("Training loss", "loss", _lines(steps, "loss")),
        chart("Precision on validation", "%", _lines(scores, "P@1", "P@3", "P@5"), mark=True),
        chart("Propensity-scored precision", "%", _lines(scores, "PSP@1", "PSP@5"), mark=True),
        chart("Throughput", "rows/s", _lines(steps, "rows_per_second"), zero=True),
        chart("Padding, share of tokens", "%", _lines(steps, "padding", scale=100.0), zero=True),
        chart("Peak memory of a worker", "GiB", memory, zero=True),
        chart("Learning rates", "", _lines(steps, "encoder_lr", "classifier_lr"), log=True),
    )
    return [each for each in drawn if each]


def _lines(entries: Sequence[Mapping[str, Any]], *keys: str, scale: float = 1.0) -> list[Line]:
    """Makes a line for each key that has a finite value somewhere."""
    found = []
    for key in keys:
        x, y = finite(entries, key)
        if len(x):
            label = key.removesuffix("_lr").removesuffix("_gib").replace("_", " ")
            found.append(Line(label, x, y * scale))
    return found


def finite(entries: Sequence[Mapping[str, Any]], key: str) -> tuple[Floats, Floats]:
    """Returns epochs and values of the entries with a finite `key`: float64 [n], [n]."""
    pairs = [(entry["epoch"], entry.get(key)) for entry in entries]
    array = np.array(pairs, dtype=np.float64).reshape(-1, 2)  # None becomes NaN
    array = array[np.isfinite(array).all(axis=1)]
    return array[:, 0], array[:, 1]


def _binned(values: Floats) -> Floats:
    """Averages in at most MAX_POINTS bins of nearly equal size, in order."""
    if len(values) <= MAX_POINTS:
        return values
    edges = np.linspace(0, len(values), MAX_POINTS + 1).astype(np.int64)
    return np.add.reduceat(values, edges[:-1]) / np.diff(edges)


def chart(
    title: str,
    unit: str,
    lines: Sequence[Line],
    *,
    mark: bool = False,
    zero: bool = False,
    log: bool = False,
) -> Chart | None:
    """Draws lines over epochs; None if there are none. zero: the y axis starts at 0."""
    if not lines:
        return None
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none",  # real text: small, selectable, in the page's font
        "svg.hashsalt": title,  # the same page for the same run
        "font.size": 10,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": GRID,
        "xtick.color": INK,
        "ytick.color": INK,
        "grid.color": GRID,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(4.9, 2.75), layout="constrained")
        axes = figure.add_subplot()
        for i, line in enumerate(lines):
            marker = MARKERS[i] if mark or len(line.x) == 1 else None
            x, y = _binned(line.x), _binned(line.y)
            axes.plot(x, y, DASHES[i], color=SERIES[i], marker=marker, ms=4, label=line.label)
        axes.set_xlabel("epoch")
        axes.set_ylabel(unit)
        if log and all((line.y > 0).any() for line in lines):
            axes.set_yscale("log")
            # A warm-up from and a decay to nearly 0 would take the whole height.
            axes.set_ylim(bottom=min(line.y.max() for line in lines) / 300)
        if zero:
            axes.set_ylim(bottom=0)
        axes.grid(axis="y", linewidth=0.6)
        axes.tick_params(length=0)
        if len(lines) > 1:
            axes.legend(
                loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, borderpad=0
            )
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    note = _note(lines, unit, peak=log)
    return Chart(title, note, _inline(out.getvalue(), title, note))


def _note(lines: Sequence[Line], unit: str, peak: bool) -> str:
    places = FORMATS.get(unit, ".3g")
    values = [
        f"{line.label if len(lines) > 1 else ''} {line.y.max() if peak else line.y[-1]:{places}}"
        for line in lines
    ]
    shown_unit = f" {unit}" if unit in FORMATS else ""
    return f"{'Highest' if peak else 'Last'}: {', '.join(map(str.strip, values))}{shown_unit}"


def _inline(svg: str, title: str, note: str) -> Markup:
    """Turns an SVG file into an element of a page: own ids, the page's colours, no metadata."""
    from markupsafe import Markup, escape

    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Ids are global to a page, and matplotlib numbers them alike in every figure.
    prefix = re.sub(r"\W+", "-", title.lower())
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'href="#', f'href="#{prefix}-', svg)
    svg = svg.replace("url(#", f"url(#{prefix}-")
    svg = re.sub(r'(<svg [^>]*?)\s+width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?)\s+height="[^"]*"', r"\1", svg, count=1)
    for placeholder, colour in CSS_COLOURS.items():
        svg = svg.replace(placeholder, colour)
    label = escape(f"{title} over epochs. {note}.")
    return Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1))
