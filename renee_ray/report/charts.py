"""Charts as inline SVG, which templates/chart.html.j2 draws in the colours of the page.

An SVG is WIDTH x HEIGHT units, about the pixels of a phone, so that its text is readable there.
Each point of a line is a circle whose title has its values; templates/hover.js.j2 shows the one
that is nearest to the pointer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from renee_ray.report.status import duration

Floats = npt.NDArray[np.float64]

WIDTH, HEIGHT = 360, 215
LEFT, RIGHT, TOP, BOTTOM = 44, 348, 20, 188
"""The lines' rectangle in the SVG."""
MAX_LINES = 6
"""Most lines of a chart: the page has so many colours."""
MAX_POINTS = 100
"""Most points of a line; longer histories are averaged in bins, which smooths a sampled loss."""
TICKS = 4
FORMATS = {"%": ".1f", "rows/s": ",.0f", "GiB": ".2f"}
"""Unit of a chart -> format of its values."""
CLOCKS = ((300, 1, "seconds"), (10_800, 60, "minutes"), (400_000, 3600, "hours"),
          (np.inf, 86_400, "days"))  # fmt: skip
"""(longest time, seconds of the unit, unit) of a time axis."""


@dataclass(frozen=True)
class Line:
    """One line of a chart: x and y float64 [n], finite, n >= 1."""

    label: str
    x: Floats
    y: Floats


@dataclass(frozen=True)
class Mark:
    """Something that happened at x: `kind` names it in the legend, `text` says all of it."""

    kind: str
    x: float
    text: str


@dataclass(frozen=True)
class Axis:
    """An axis that shows [low, high] in [start, stop], units of the SVG."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    @classmethod
    def of(cls, values: Floats, start: float, stop: float, *, zero: bool, log: bool) -> Axis:
        """Fits an axis to values, with a margin; from 0 on where `zero` is set."""
        low, high = (0.0 if zero else float(values.min())), float(values.max())
        if log:
            return cls(low / 1.2, high * 1.2, start, stop, log)
        margin = 0.05 * (high - low) or abs(high) / 2 or 0.5
        return cls(low if zero else low - margin, high + margin, start, stop)

    def at(self, values: Any) -> Floats:
        """Returns where values are drawn; those outside at the nearest end."""
        scale = np.log10 if self.log else np.asarray
        low, high = scale(self.low), scale(self.high)
        share = (scale(np.clip(values, self.low, self.high)) - low) / (high - low)
        return np.asarray(np.round(self.start + share * (self.stop - self.start), 1))

    def ticks(self, unit: float = 1.0) -> list[tuple[float, str]]:
        """Returns places and texts of round numbers of `unit`."""
        low, high = self.low / unit, self.high / unit
        if self.log:
            powers = np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)))
            steps = (1, 2, 5) if len(powers) < 3 else (1,)
            numbers = [float(f"{step}e{power:.0f}") for power in powers for step in steps]
        else:
            power = 10.0 ** np.floor(np.log10((high - low) / TICKS))
            step = next(m * power for m in (1, 2, 5, 10) if m * power * TICKS >= high - low)
            numbers = [i * step for i in range(int(np.ceil(low / step)), int(high / step) + 1)]
        inside = [each for each in numbers if low <= each <= high]
        return [(float(self.at(each * unit)), _short(each)) for each in inside]


@dataclass(frozen=True)
class Drawn:
    """A line in units of the SVG, with the values of its points in words."""

    label: str
    path: str
    points: list[tuple[float, float, str]]


@dataclass(frozen=True)
class Chart:
    """A chart for the template; marks are (place, kind, text)."""

    title: str
    note: str
    """The last (or highest) value of each line, in words; also the text for screen readers."""
    unit: str
    over: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[Drawn]
    dots: bool
    marks: list[tuple[float, str, str]]


def chart(
    title: str,
    unit: str,
    lines: Sequence[Line],
    *,
    over: str = "step",
    dots: bool = False,
    zero: bool = False,
    log: str = "",
    marks: Sequence[Mark] = (),
) -> Chart | None:
    """Draws lines over steps, epochs, seconds or something else; None if there are none.

    Args:
        dots: whether points show; zero: whether the y axis starts at 0; log: axes ("x", "y").
    """
    if not lines:
        return None
    binned = [Line(each.label, _binned(each.x), _binned(each.y)) for each in lines]
    x, y = (np.concatenate([getattr(line, name) for line in binned]) for name in ("x", "y"))
    if "y" in log and all((line.y > 0).any() for line in lines):
        # A warm-up from and a decay to nearly 0 would take the whole height.
        y = np.maximum(y, min(line.y.max() for line in lines) / 300)
    else:
        log = log.replace("y", "")
    across = Axis.of(
        np.append(x, [mark.x for mark in marks]), LEFT, RIGHT, zero="x" not in log, log="x" in log
    )
    up = Axis.of(y, BOTTOM, TOP, zero=zero, log="y" in log)
    clock = next(each for each in CLOCKS if x.max() < each[0]) if over == "s" else (0, 1, over)
    return Chart(
        title, _note(lines, unit, peak="y" in log), unit, clock[2], across.ticks(clock[1]),
        up.ticks(), [_drawn(line, across, up, unit, over) for line in binned],
        dots or len(x) == len(lines),
        [(float(across.at(mark.x)), mark.kind, mark.text) for mark in marks],
    )  # fmt: skip


def in_order(entries: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Sorts by step and keeps the last of each: a resumed run has repeated some steps."""
    by_step = {entry["step"]: entry for entry in entries}
    return [by_step[step] for step in sorted(by_step)]


def lines_of(
    entries: Sequence[Mapping[str, Any]], *keys: str, over: str = "step", scale: float = 1.0
) -> list[Line]:
    """Makes a line for each key that has a finite value somewhere."""
    found = []
    for key in keys:
        pairs = [(entry.get(over), entry.get(key)) for entry in entries]
        array = np.array(pairs, dtype=np.float64).reshape(-1, 2)  # None becomes NaN
        array = array[np.isfinite(array).all(axis=1)]
        if len(array):
            label = key.removesuffix("_lr").removesuffix("_gib").replace("_", " ")
            found.append(Line(label, array[:, 0], array[:, 1] * scale))
    return found


def _binned(values: Floats) -> Floats:
    """Averages in at most MAX_POINTS bins of nearly equal size, in order."""
    if len(values) <= MAX_POINTS:
        return values
    edges = np.linspace(0, len(values), MAX_POINTS + 1).astype(np.int64)
    return np.add.reduceat(values, edges[:-1]) / np.diff(edges)


def _drawn(line: Line, across: Axis, up: Axis, unit: str, over: str) -> Drawn:
    x, y = across.at(line.x).tolist(), up.at(line.y).tolist()
    values = zip(line.x.tolist(), line.y.tolist(), strict=True)
    texts = [f"{line.label} {_value(v, unit)}, {_place(at, over)}" for at, v in values]
    path = "M" + "L".join(f"{a:g} {b:g}" for a, b in zip(x, y, strict=True))
    return Drawn(line.label, path, list(zip(x, y, texts, strict=True)))


def _note(lines: Sequence[Line], unit: str, peak: bool) -> str:
    ends = [line.y.max() if peak else line.y[-1] for line in lines]
    word = "Highest" if peak else "Last"
    if len(lines) > 3:
        return f"{word}: {_value(min(ends), unit)} to {_value(max(ends), unit)}"
    names = [f"{line.label} " if len(lines) > 1 else "" for line in lines]
    values = [f"{name}{_value(end, unit)}" for name, end in zip(names, ends, strict=True)]
    return f"{word}: {', '.join(values)}"


def _value(value: float, unit: str) -> str:
    return f"{value:{FORMATS.get(unit, '.3g')}}{f' {unit}' if unit in FORMATS else ''}"


def _place(x: float, over: str) -> str:
    if over == "s":
        return f"after {duration(x)}"
    number = f"{x:,.2f}" if over == "epoch" else f"{x:,.0f}"
    return f"{over} {number}" if over in ("step", "epoch") else f"{number} {over}"


def _short(value: float) -> str:
    for least, unit, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / unit:g}{letter}"
    return f"{value:.10g}"
