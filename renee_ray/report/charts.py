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
Chart = dict[str, Any]
"""What the template draws; points and marks are (x, y or kind, words)."""
Mark = tuple[str, float, str]
"""(kind, x, words) of something that happened, such as a restart."""

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


@dataclass(frozen=True)
class Axis:
    """An axis that shows [low, high] in [start, stop], units of the SVG."""

    low: float
    high: float
    start: float
    stop: float

    @classmethod
    def of(cls, values: Floats, start: float, stop: float, *, zero: bool) -> Axis:
        """Fits an axis to values, with a margin; from 0 on where `zero` is set."""
        low, high = (0.0 if zero else float(values.min())), float(values.max())
        margin = 0.05 * (high - low) or abs(high) / 2 or 0.5
        return cls(low if zero else low - margin, high + margin, start, stop)

    def at(self, values: Any) -> list[float]:
        """Returns where values are drawn."""
        share = (np.asarray(values) - self.low) / (self.high - self.low)
        return list(np.round(self.start + share * (self.stop - self.start), 1).tolist())

    def ticks(self, unit: float = 1.0) -> list[tuple[float, str]]:
        """Returns places and texts of round numbers of `unit`."""
        low, high = self.low / unit, self.high / unit
        power = 10.0 ** np.floor(np.log10((high - low) / TICKS))
        step = next(m * power for m in (1, 2, 5, 10) if m * power * TICKS >= high - low)
        numbers = step * np.arange(np.ceil(low / step), np.floor(high / step) + 1) + 0.0  # not -0
        return list(zip(self.at(numbers * unit), map(_short, numbers.tolist()), strict=True))


def chart(
    title: str, unit: str, lines: Iterable[Line], *, over: str = "step", dots: bool = False,
    zero: bool = False, marks: Sequence[Mark] = (),
) -> Chart | None:  # fmt: skip
    """Draws lines over steps, epochs, seconds ("s") or something else; None if there are none.

    dots: whether points show; zero: whether the y axis starts at 0.
    """
    if not (lines := list(lines)):
        return None
    binned = [Line(each.label, _binned(each.x), _binned(each.y)) for each in lines]
    x, y = (np.concatenate(each) for each in list(zip(*binned, strict=True))[1:])
    events = [x for _, x, _ in marks]
    across = Axis.of(np.append(x, events), LEFT, RIGHT, zero=True)
    up = Axis.of(y, BOTTOM, TOP, zero=zero)
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
    places = across.at(events)
    return {
        "title": title, "note": _note(lines, unit), "unit": unit, "over": name, "lines": drawn,
        "x_ticks": across.ticks(size), "y_ticks": up.ticks(), "dots": dots or len(x) == len(lines),
        "marks": [(at, kind, words) for at, (kind, _, words) in zip(places, marks, strict=True)],
    }  # fmt: skip


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
    if over in FORMATS:
        return f"{over} {x:{FORMATS[over]}}"
    return f"{_short(float(f'{x:.3g}'))} {over}"


def _short(value: float) -> str:
    for least, unit, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / unit:g}{letter}"
    return f"{value:.10g}"
