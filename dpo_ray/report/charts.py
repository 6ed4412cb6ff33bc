"""The geometry of charts: numbers in, paths and ticks out; templates draw them as SVG.

Of the libraries that draw SVG none leaves the colours to the page's style sheet, its text selectable and its scripts
out, and a chart here is two scales and a path.

A curve of many steps is drawn by its extremes: the steps are put into columns, and of each the first, the smallest, the
largest and the last value are kept, so that no spike is lost. A thicker line shows the columns' means.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Of the drawing, in its own units; a phone shows it at about one unit a pixel.
WIDTH, HEIGHT = 360.0, 210.0
LEFT, RIGHT, TOP, BOTTOM = 48.0, 8.0, 10.0, 30.0
COLUMNS, MEANS = 160, 60
PROBES, TABLE_ROWS = 40, 20
# With more curves than this each gets its share of these four, and at least so many: a page of many runs stays small.
WHOLE_SERIES, LEAST_SHARE = 16, 4
# A circle takes as much of a page as so many points of a line.
DOT_POINTS = 4
# Of the page's colours, the grey one.
FRONTIER_SLOT = 7
# A scale that ends at this quantile is used where the largest value is so many times that.
CUT_QUANTILE, CUT_FACTOR, CUT_ROOM = 0.98, 4.0, 1.25


@dataclass(frozen=True, slots=True)
class Series:
    """Values to draw.

    Attributes:
        name: For the legend.
        slot: Which of the page's colours.
        x: Shape (N,), ascending.
        y: Shape (N,); what is not finite is not drawn.
        dots: Drawn as points, not as a line.
    """

    name: str
    slot: int
    x: np.ndarray
    y: np.ndarray
    dots: bool = False

    @property
    def finite(self) -> Series:
        """Without what cannot be drawn."""
        there = np.isfinite(self.y)
        return Series(self.name, self.slot, self.x[there].astype(np.float64), self.y[there], self.dots)


@dataclass(frozen=True, slots=True)
class Interval:
    """A number with the ends of its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{number(self.value)} ({number(self.low)} to {number(self.high)})"


@dataclass(frozen=True, slots=True)
class Spot:
    """A point to draw: its name, which of the page's colours, and where, with intervals in both directions."""

    name: str
    slot: int
    x: Interval
    y: Interval


@dataclass(frozen=True, slots=True)
class Tick:
    """A mark of an axis: where it stands in the drawing, and its text."""

    at: float
    label: str


@dataclass(frozen=True, slots=True)
class Mark:
    """A vertical line through the drawing, or where one is pointed at: its left end, width, and what it says."""

    at: float
    width: float
    text: str


@dataclass(frozen=True, slots=True)
class Drawn:
    """A series as it is drawn.

    Attributes:
        name: For the legend.
        slot: Which of the page's colours.
        thin: Path through all values, or through the extremes of columns; of a point its intervals.
        thick: Path through the columns' means; empty where all values are drawn.
        dots: Points, as x and y.
        cut: Where values lie beyond the upper end of the scale: x of each.
    """

    name: str
    slot: int
    thin: str
    thick: str
    dots: tuple[tuple[float, float], ...]
    cut: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart.

    Attributes:
        title: Its heading.
        unit: Of the values; may be empty.
        caption: What the table of its numbers has.
        summary: What it shows, in words.
        notes: What must be known to read it.
        series: The curves.
        x_name: What runs from left to right.
        x_ticks: Of it.
        y_ticks: Of the values.
        marks: Vertical lines: where attempts began.
        probes: What is told where one points at.
        header: Of the table of its numbers.
        rows: Of that table.
    """

    title: str
    unit: str
    caption: str
    summary: str
    notes: tuple[str, ...]
    series: tuple[Drawn, ...]
    x_name: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    marks: tuple[Mark, ...]
    probes: tuple[Mark, ...]
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def line_chart(
    title: str,
    unit: str,
    series: Sequence[Series],
    marks: Sequence[tuple[int, str]] = (),
    cut: bool = False,
    x_name: str = "step",
    first: float = 0.0,
) -> Chart | None:
    """A chart over optimizer steps, or another whole number.

    Args:
        title: Its heading.
        unit: Of the values.
        series: Curves; those without a finite value are left out.
        marks: Steps with something to tell.
        cut: Whether a few values far above all others may lie beyond the scale; it is marked where they do.
        x_name: What the curves run over.
        first: Where it begins, or with the first value where that is less.

    Returns:
        The chart, or None where there is nothing to draw.
    """
    there = [each.finite for each in series]
    there = [each for each in there if len(each.x)]
    if not there:
        return None
    last = max(float(each.x[-1]) for each in there)
    first = min(first, *(float(each.x[0]) for each in there))
    values = np.concatenate([each.y for each in there])
    low, high = float(values.min()), float(values.max())
    top = float(np.quantile(values, CUT_QUANTILE)) * CUT_ROOM if cut else high
    if not (cut and high > CUT_FACTOR * top / CUT_ROOM and top > low):
        top = high
    y_at = ticks(low, top, 5)
    low, top = min(low, y_at[0]), max(top, y_at[-1])
    x_at = [tick for tick in ticks(first, max(last, first + 1), 5) if first <= tick <= last and tick == int(tick)]
    scale = _Scale(first, max(last, first + 1), low, top)
    columns, means, probes, rows = (_share(each, len(there)) for each in (COLUMNS, MEANS, PROBES, TABLE_ROWS))
    edges = np.linspace(first, last + 1, probes + 1)
    notes = []
    most = max(len(each.x) for each in there if not each.dots) if any(not each.dots for each in there) else 0
    if most > columns:
        notes.append(f"Thin: least and greatest of every {math.ceil(most / columns):,} steps; thick: means")
    if beyond := int((values > top).sum()):
        notes.append(f"▲ {beyond:,} of {len(values):,} values lie beyond the scale, up to {number(high)}")
    table = np.linspace(first, last + 1, rows + 1)
    return Chart(
        title,
        unit,
        caption="Means, with the least and greatest of several values",
        summary="; ".join(_in_words(each, x_name) for each in there),
        notes=tuple(notes),
        series=tuple(scale.drawn(each, columns, means) for each in there),
        x_name=x_name,
        x_ticks=tuple(Tick(scale.x(tick), _steps(tick, last)) for tick in x_at),
        y_ticks=tuple(Tick(scale.y(tick), number(tick)) for tick in y_at),
        marks=tuple(Mark(scale.x(step), 0.0, text) for step, text in marks if first <= step <= last),
        probes=tuple(
            Mark(scale.x(left), scale.x(right) - scale.x(left), f"{row[0]}: " + ", ".join(texts))
            for left, right, row in _rows(there, edges)
            if (texts := [f"{each.name} {cell}" for each, cell in zip(there, row[1:], strict=True) if cell])
        ),
        header=(x_name, *(each.name for each in there)),
        rows=tuple(row for *_, row in _rows(there, table)),
    )


def on_frontier(cost: Sequence[float], gain: Sequence[float]) -> list[bool]:
    """Which points no other one beats: none gains as much or more at as little cost or less, one of both better.

    Args:
        cost: Of each point.
        gain: Of each point.
    """
    points = list(zip(cost, gain, strict=True))
    return [not any(c <= cost and g >= gain and (c, g) != (cost, gain) for c, g in points) for cost, gain in points]


def frontier_chart(title: str, unit: str, x_name: str, spots: Sequence[Spot]) -> Chart:
    """Points with their intervals, and a line through those that no other one beats (see `on_frontier`).

    Args:
        title: Its heading.
        unit: Of what is gained.
        x_name: What it costs, with its unit.
        spots: At least one.
    """
    x_at, y_at = (
        ticks(min(each.low for each in along), max(each.high for each in along), 5)
        for along in ([each.x for each in spots], [each.y for each in spots])
    )
    scale = _Scale(x_at[0], x_at[-1], y_at[0], y_at[-1])
    flags = on_frontier([each.x.value for each in spots], [each.y.value for each in spots])
    best = sorted((each.x.value, each.y.value) for each, flag in zip(spots, flags, strict=True) if flag)
    line = Drawn("frontier", FRONTIER_SLOT, "", scale.path(*zip(*best, strict=True)), (), ())
    edges = [LEFT + at * (WIDTH - LEFT - RIGHT) / PROBES for at in range(PROBES)]
    told: dict[float, list[str]] = {edge: [] for edge in edges}
    for each in spots:
        at = scale.x(each.x.value)
        told[max(edge for edge in edges if edge <= at)].append(f"{each.name}: {x_name} {each.x}, {title} {each.y}")
    names = ", ".join(each.name for each, flag in zip(spots, flags, strict=True) if flag)
    return Chart(
        title,
        unit,
        caption="With 95 % intervals",
        summary=f"On the frontier: {names}",
        notes=(),
        series=(line, *map(scale.spot, spots)),
        x_name=x_name,
        x_ticks=tuple(Tick(scale.x(tick), number(tick)) for tick in x_at),
        y_ticks=tuple(Tick(scale.y(tick), number(tick)) for tick in y_at),
        marks=(),
        probes=tuple(
            Mark(edge, (WIDTH - LEFT - RIGHT) / PROBES, "; ".join(texts)) for edge, texts in told.items() if texts
        ),
        header=("run", x_name, title, "frontier"),
        rows=tuple(
            (each.name, str(each.x), str(each.y), "yes" if flag else "")
            for each, flag in zip(spots, flags, strict=True)
        ),
    )


def extremes(x: np.ndarray, y: np.ndarray, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each of so many columns of values the first, the least, the greatest and the last, in their order.

    Args:
        x: Shape (N,).
        y: Shape (N,).
        columns: How many.

    Returns:
        Shape (M,) each, M at most 4 x columns; all values where there are no more than columns.
    """
    if len(x) <= columns:
        return x, y
    kept = set[int]()
    for left, right in _columns(len(x), columns):
        part = y[left:right]
        kept |= {left, left + int(part.argmin()), left + int(part.argmax()), right - 1}
    at = np.array(sorted(kept))
    return x[at], y[at]


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart), at most two more than `most`, that enclose a range."""
    span = high - low
    largest = max(abs(low), abs(high))
    if not span > 1e-9 * largest or largest < 1e-300:  # Nothing between them that a label could show.
        span = largest if largest >= 1e-300 else 1.0
        low, high = low - span / 2, high + span / 2
        span = high - low
    raw = span / most
    power = 10.0 ** math.floor(math.log10(raw))
    apart = next(each * power for each in (1, 2, 5, 10) if each * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / apart + 1e-9), math.ceil(high / apart - 1e-9)
    return [float(f"{each * apart:.12g}") for each in range(first, last + 1)]


def number(value: float) -> str:
    """A number as people read it."""
    if not math.isfinite(value):
        return "–"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}".replace("-", "−")
    if 1e-4 <= abs(value) < 1e4:
        text = f"{value:.4g}"
    elif abs(value) >= 1e4:
        text = f"{value:,.0f}"
    else:
        digits, power = f"{value:.2e}".split("e")
        text = f"{float(digits):g}e{int(power)}"
    return text.replace("-", "−")


def _steps(step: float, last: float) -> str:
    """A label of the axis of steps: thousands as such where there are many."""
    return f"{step / 1000:,g}k" if last >= 10_000 and step else number(step)


def _share(most: int, series: int) -> int:
    """Of what a curve may take of a page, how much each of so many may take."""
    return most if series <= WHOLE_SERIES else max(LEAST_SHARE, most * WHOLE_SERIES // series)


def _columns(length: int, columns: int) -> list[tuple[int, int]]:
    bounds = [length * at // columns for at in range(columns + 1)]
    return list(zip(bounds[:-1], bounds[1:], strict=True))


@dataclass(frozen=True, slots=True)
class _Scale:
    """From steps and values to the drawing's units."""

    first: float
    last: float
    low: float
    high: float

    def x(self, step: float) -> float:
        share = (min(step, self.last) - self.first) / (self.last - self.first)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        share = (min(value, self.high) - self.low) / (self.high - self.low)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    def drawn(self, each: Series, columns: int, means: int) -> Drawn:
        x, y = extremes(each.x, each.y, columns // DOT_POINTS if each.dots and columns < COLUMNS else columns)
        cut = tuple(sorted({self.x(step) for step in each.x[each.y > self.high].tolist()}))
        if each.dots or len(x) == 1:
            return Drawn(each.name, each.slot, "", "", tuple(map(self._point, x.tolist(), y.tolist())), cut)
        thick = ""
        if len(each.x) > columns:
            parts = _columns(len(each.x), means)
            thick = self.path(*zip(*((each.x[a:b].mean(), each.y[a:b].mean()) for a, b in parts), strict=True))
        return Drawn(each.name, each.slot, self.path(x.tolist(), y.tolist()), thick, (), cut)

    def spot(self, each: Spot) -> Drawn:
        """A point, with a cross of its intervals."""
        x, y = each.x, each.y
        cross = self.path((x.low, x.high), (y.value, y.value)) + self.path((x.value, x.value), (y.low, y.high))
        return Drawn(each.name, each.slot, cross, "", (self._point(x.value, y.value),), ())

    def _point(self, step: float, value: float) -> tuple[float, float]:
        return self.x(step), self.y(value)

    def path(self, steps: Sequence[float], values: Sequence[float]) -> str:
        return "M" + "L".join(f"{x:g} {y:g}" for x, y in map(self._point, steps, values))


def _rows(series: Sequence[Series], edges: np.ndarray) -> list[tuple[float, float, tuple[str, ...]]]:
    """Left edge, right edge and cells (steps, then one of each series) of the stretches in which there is a value."""
    found = list[tuple[float, float, tuple[str, ...]]]()
    bounds = [np.searchsorted(each.x, edges) for each in series]
    for at, (left, right) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)):
        inside = [each.x[bound[at] : bound[at + 1]] for each, bound in zip(series, bounds, strict=True)]
        if not any(len(each) for each in inside):
            continue
        steps = np.concatenate(inside)
        first, last = int(steps.min()), int(steps.max())
        cells = [_cell(each.y[bound[at] : bound[at + 1]]) for each, bound in zip(series, bounds, strict=True)]
        found.append((left, right, (f"{first:,}" if first == last else f"{first:,} to {last:,}", *cells)))
    return found


def _cell(values: np.ndarray) -> str:
    if not len(values):
        return ""
    if len(values) == 1:
        return number(float(values[0]))
    return f"{number(float(values.mean()))} ({number(float(values.min()))} to {number(float(values.max()))})"


def _in_words(each: Series, x_name: str) -> str:
    least, greatest = (number(float(value)) for value in (each.y.min(), each.y.max()))
    if len(each.y) == 1:
        return f"{each.name}: {number(float(each.y[0]))} at {x_name} {number(float(each.x[0]))}"
    first, last = number(float(each.y[0])), number(float(each.y[-1]))
    return f"{each.name}: from {first} to {last}, least {least}, greatest {greatest}"
