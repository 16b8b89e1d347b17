"""Charts as inline SVG, which templates/chart.html.j2 draws in the colours of the page.

An SVG is 360 x 215 units, about the pixels of a phone, so that its text is readable there. Each
point of a line is a circle whose title has its values; templates/hover.js.j2 shows the one that is
nearest to the pointer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from renee_ray.report.status import duration

Floats = npt.NDArray[np.float64]
Entries = Sequence[Mapping[str, Any]]

LEFT, RIGHT, TOP, BOTTOM = 44, 348, 20, 188
"""The lines' rectangle in the SVG."""
MAX_LINES = 6
"""Most lines of a chart: the page has so many colours."""
MAX_POINTS = 100
"""Most points of a line; longer histories are averaged in bins, which smooths a sampled loss."""
TICKS = 4
FORMATS = {"%": ".1f", "rows/s": ",.0f", "GiB": ".2f", "epoch": ",.2f", "step": ",.0f"}
"""Unit -> format of values; others have three digits."""
CLOCKS = ((300, 1, "seconds"), (10_800, 60, "minutes"), (400_000, 3600, "hours"),
          (np.inf, 86_400, "days"))  # fmt: skip
"""(longest time, seconds of the unit, unit) of a time axis."""


class Line(NamedTuple):
    """One line of a chart: x and y float64 [n], finite, n >= 1."""

    label: str
    x: Floats
    y: Floats


class Mark(NamedTuple):
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

    def at(self, values: Any) -> list[float]:
        """Returns where values are drawn."""
        scale = np.log10 if self.log else np.asarray
        places, low, high = map(scale, (values, self.low, self.high))
        share = (places - low) / (high - low)
        return list(np.round(self.start + share * (self.stop - self.start), 1).tolist())

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
        places = self.at([each * unit for each in inside])
        return list(zip(places, map(_short, inside), strict=True))


@dataclass(frozen=True)
class Chart:
    """A chart for the template, in units of the SVG.

    note: the last value of each line, in words, for screen readers too; lines: (label, points),
    points: (x, y, values in words); marks: (x, kind, text).
    """

    title: str
    note: str
    unit: str
    over: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[tuple[str, list[tuple[float, float, str]]]]
    dots: bool
    marks: list[tuple[float, str, str]]


def chart(
    title: str, unit: str, lines: Iterable[Line], *, over: str = "step", dots: bool = False,
    zero: bool = False, log: bool = False, marks: Sequence[Mark] = (),
) -> Chart | None:  # fmt: skip
    """Draws lines over steps, epochs, seconds ("s") or something else; None if there are none.

    dots: whether points show; zero: whether the y axis starts at 0; log: whether x is logarithmic.
    """
    if not (lines := list(lines)):
        return None
    binned = [Line(each.label, _binned(each.x), _binned(each.y)) for each in lines]
    x, y = (np.concatenate(each) for each in list(zip(*binned, strict=True))[1:])
    events = [mark.x for mark in marks]
    across = Axis.of(np.append(x, events), LEFT, RIGHT, zero=not log, log=log)
    up = Axis.of(y, BOTTOM, TOP, zero=zero, log=False)
    size, name = 1.0, over
    if over == "s":
        size, name = next(each[1:] for each in CLOCKS if across.high < each[0])
    drawn = []
    for label, own_x, own_y in binned:
        texts = (
            f"{label} {_value(value, unit)}, {_where(at, over)}"
            for at, value in zip(own_x.tolist(), own_y.tolist(), strict=True)
        )
        drawn.append((label, list(zip(across.at(own_x), up.at(own_y), texts, strict=True))))
    return Chart(
        title, _note(lines, unit), unit, name, across.ticks(size), up.ticks(), drawn,
        dots or len(x) == len(lines),
        [(at, kind, text) for at, (kind, _, text) in zip(across.at(events), marks, strict=True)],
    )  # fmt: skip


def in_order(entries: Entries) -> list[Mapping[str, Any]]:
    """Sorts by step and keeps the last of each: a resumed run has repeated some steps."""
    by_step = {entry["step"]: entry for entry in entries}
    return [by_step[step] for step in sorted(by_step)]


def lines_of(entries: Entries, *keys: str, over: str = "step", scale: float = 1) -> Iterator[Line]:
    """Yields a line for each key that has a finite value somewhere."""
    for key in keys:
        pairs = [(entry.get(over), entry.get(key)) for entry in entries]
        array = np.array(pairs, dtype=np.float64).reshape(-1, 2)  # None becomes NaN
        array = array[np.isfinite(array).all(axis=1)]
        if len(array):
            label = key.removesuffix("_gib").replace("_", " ")
            yield Line(label, array[:, 0], array[:, 1] * scale)


def _binned(values: Floats) -> Floats:
    """Averages in at most MAX_POINTS bins of nearly equal size, in order."""
    if len(values) <= MAX_POINTS:
        return values
    edges = np.linspace(0, len(values), MAX_POINTS + 1).astype(np.int64)
    return np.add.reduceat(values, edges[:-1]) / np.diff(edges)


def _note(lines: Sequence[Line], unit: str) -> str:
    ends = [line.y[-1] for line in lines]
    if len(lines) > 3:
        return f"Last: {_value(min(ends), unit)} to {_value(max(ends), unit)}"
    names = [f"{line.label} " if len(lines) > 1 else "" for line in lines]
    return "Last: " + ", ".join(a + _value(b, unit) for a, b in zip(names, ends, strict=True))


def _value(value: float, unit: str) -> str:
    return f"{value:{FORMATS.get(unit, '.3g')}}{f' {unit}' if unit in FORMATS else ''}"


def _where(x: float, over: str) -> str:
    if over == "s":
        return f"after {duration(x)}"
    return f"{over} {x:{FORMATS[over]}}" if over in FORMATS else f"{x:,.0f} {over}"


def _short(value: float) -> str:
    for least, unit, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / unit:g}{letter}"
    return f"{value:.10g}"
