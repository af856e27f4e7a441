"""Charts as inline SVG for a page: they take its colors, light or dark, and its text is text.

Plain ElementTree: every name in a chart is data, and is escaped when the tree is written. Colors are classes
(``c0``, ``c1``, … of the palette, ``k0``, … of the kinds of error), which the page's style sheet defines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element, SubElement, tostring

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from detdistill.evaluation.errors import KINDS, RECALLS, ErrorCurves

Scale = Callable[[float], float]

# Units of the drawings. They are narrow, so that their text can be read on a phone, too.
WIDTH, HEIGHT = 360, 215
LEFT, RIGHT, TOP, BOTTOM = 38, 14, 8, 36
NAMES = 122  # units for the names beside bars and intervals
LONGEST_NAME = 15  # characters of them
POINTS = 160  # of a line: more than a drawing of this size can show
MARKS = 5  # on a line without dots, so that lines can be told apart without their colors
# Circle, square, triangle, diamond, triangle on its point: by corners, around (0, 0), of a circle's size.
SHAPES: tuple[tuple[tuple[float, float], ...], ...] = (
    (),
    ((-2.7, -2.7), (2.7, -2.7), (2.7, 2.7), (-2.7, 2.7)),
    ((0, -3.8), (3.5, 2.6), (-3.5, 2.6)),
    ((0, -3.9), (3.9, 0), (0, 3.9), (-3.9, 0)),
    ((0, 3.8), (3.5, -2.6), (-3.5, -2.6)),
)


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart.

    Attributes:
        name: what it shows.
        x, y: its points; those that are not finite are left out.
        color: index into the palette.
        thin: beside the point, as one seed's line is beside the mean.
        dashed: to tell two lines of one color apart.
        dots: mark the points.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: int
    thin: bool = False
    dashed: bool = False
    dots: bool = False


@dataclass(frozen=True, slots=True)
class Key:
    """An entry of a legend: the color's class, what it stands for, a value, if any, and a line's mark."""

    color: str
    name: str
    value: str = ""
    dashed: bool = False
    shape: int | None = None


def key_of(line: Line, value: str) -> Key:
    """The legend's entry of a line."""
    return Key(f"c{line.color}", line.name, value, line.dashed, line.color % len(SHAPES))


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawing with what is said about it."""

    title: str
    svg: Markup
    legend: tuple[Key, ...] = ()
    caption: str = ""


def line_chart(
    lines: Sequence[Line],
    label: str,
    *,
    x_title: str = "step",
    log: bool = False,
    limits: tuple[float, float, float, float] | None = None,
) -> Markup:
    """Lines over a common axis.

    Args:
        lines: in the order in which they are drawn.
        label: what a screen reader says instead of the drawing.
        x_title: below the axis.
        log: a logarithmic axis, if all values are positive.
        limits: lowest and highest x and y; of the lines, y from 0 on, by default.

    Raises:
        ValueError: no line has a point.
    """
    points = [_finite_points(line) for line in lines]
    every = np.concatenate(points)
    if not len(every):
        raise ValueError("no line has a point")
    x0, x1, y0, y1 = limits or (every[:, 0].min(), every[:, 0].max(), 0.0, every[:, 1].max() * 1.05)
    log = log and bool((every[:, 1] > 0).all())
    if log:
        y0, y1 = math.log10(every[:, 1].min()), math.log10(every[:, 1].max())
    y_marks = _log_marks(y0, y1) if log else _marks(y0, y1)
    across = _scale(x0, x1, LEFT, WIDTH - RIGHT)
    up = _scale(y0, y1, HEIGHT - BOTTOM, TOP)
    svg = _canvas(HEIGHT, label)
    for value in y_marks:
        height = up(value)
        _line(svg, "grid", LEFT, height, WIDTH - RIGHT, height)
        _text(svg, _short(10**value if log else value), LEFT - 6, height + 4, anchor="end")
    _x_axis(svg, _marks(x0, x1), across, x_title)
    for line, points_P2 in zip(lines, points, strict=True):
        if not len(points_P2):
            continue
        chosen = np.unique(np.linspace(0, len(points_P2) - 1, POINTS).astype(int))
        shown = points_P2[chosen]
        heights = np.log10(shown[:, 1]) if log else shown[:, 1]
        spots = [(across(x), up(y)) for x, y in zip(shown[:, 0], heights, strict=True)]
        styles = f"line c{line.color}" + " thin" * line.thin + " dashed" * line.dashed
        path = SubElement(svg, "polyline", {"class": styles, "points": _pairs(spots)})
        SubElement(path, "title").text = line.name
        if line.thin:
            continue
        marked = range(len(spots)) if line.dots else _some(len(spots), line.color)
        for i in marked:
            (step, value), dot = shown[i].tolist(), _mark(svg, line.color, *spots[i])
            said = f"{value:.3g}" if log else f"{value:.1f}"
            SubElement(dot, "title").text = f"{line.name}, {x_title} {_short(step)}: {said}"
    return _written(svg)


def bar_chart(names: Sequence[str], series: Sequence[tuple[str, int, Sequence[float]]], label: str) -> Markup:
    """Horizontal bars: for each name one of each series (its name, color and values); NaN has no bar."""
    values = np.array([values for _, _, values in series], dtype=np.float64)
    highest = float(np.nanmax(values, initial=0.0)) or 1.0
    thick = 9 if len(series) == 1 else 7
    row = thick * len(series) + 9
    height = TOP + row * len(names) + BOTTOM
    along = _scale(0, highest, NAMES, WIDTH - RIGHT)
    svg = _canvas(height, label)
    for mark in _marks(0, highest):
        _line(svg, "grid", along(mark), TOP, along(mark), height - BOTTOM + 4)
        _text(svg, _short(mark), along(mark), height - BOTTOM + 18, anchor="middle")
    for i, name in enumerate(names):
        top = TOP + i * row + 4
        _name(svg, name, top + thick * len(series) / 2 + 4)
        for j, (of, color, own) in enumerate(series):
            if math.isfinite(own[i]):
                box = _numbers(x=NAMES, y=top + j * thick, width=along(own[i]) - NAMES, height=thick - 1)
                bar = SubElement(svg, "rect", {"class": f"fill c{color}", **box})
                SubElement(bar, "title").text = f"{name}, {of}: {own[i]:.1f}"
    return _written(svg)


def interval_chart(rows: Sequence[tuple[str, float, tuple[float, float] | None]], label: str) -> Markup:
    """A mean and its interval for each name, beside the line of no difference."""
    reach = [end for _, mean, interval in rows for end in (mean, *(interval or ()))]
    low, high = min(0.0, *reach), max(0.0, *reach)
    if low == high:
        high = 1.0
    row = 26
    height = TOP + row * len(rows) + BOTTOM
    along = _scale(low, high, NAMES + 8, WIDTH - RIGHT - 4)
    svg = _canvas(height, label)
    for mark in _marks(low, high):
        _line(svg, "grid", along(mark), TOP, along(mark), height - BOTTOM + 4)
        said = "0" if mark == 0 else signed(mark, 0 if mark == int(mark) else 1)
        _text(svg, said, along(mark), height - BOTTOM + 18, anchor="middle")
    _line(svg, "zero", along(0), TOP, along(0), height - BOTTOM + 4)
    for i, (name, mean, interval) in enumerate(rows):
        middle = TOP + (i + 0.5) * row
        _name(svg, name, middle + 4)
        if interval is not None:
            ends = [along(end) for end in interval]
            _line(svg, "line c0", ends[0], middle, ends[1], middle)
            for end in ends:
                _line(svg, "line c0", end, middle - 4, end, middle + 4)
        dot = SubElement(svg, "circle", {"class": "dot c0", **_numbers(cx=along(mean), cy=middle, r=4.5)})
        SubElement(dot, "title").text = f"{name}: {signed(mean)}"
    return _written(svg)


def error_chart(curves: ErrorCurves, label: str) -> Markup:
    """Precision over recall with one kind of error after another forgiven: an area for what each costs.

    Raises:
        ValueError: no class has an object.
    """
    if np.isnan(curves.curve("FN")).any():
        raise ValueError("no class has an object")
    across, up = _scale(0, 100, LEFT, WIDTH - RIGHT), _scale(0, 100, HEIGHT - BOTTOM, TOP)
    svg = _canvas(HEIGHT, label)
    for mark in (0, 25, 50, 75, 100):
        _text(svg, str(mark), LEFT - 6, up(mark) + 4, anchor="end")
    below = np.zeros_like(RECALLS)
    for i, kind in enumerate(KINDS):
        # Loosening the overlap can take a hit away, so that a curve dips under the one before it.
        above = np.maximum(100 * curves.curve(kind), below)
        if (above > below).any():
            over = [(across(100 * x), up(y)) for x, y in zip(RECALLS, above, strict=True)]
            under = [(across(100 * x), up(y)) for x, y in zip(RECALLS, below, strict=True)]
            area = SubElement(
                svg, "polygon", {"class": f"fill k{i}", "points": _pairs([*over, *reversed(under)])}
            )
            SubElement(area, "title").text = kind
        below = above
    hit = [(across(100 * x), up(100 * y)) for x, y in zip(RECALLS, curves.curve("C50"), strict=True)]
    SubElement(svg, "polyline", {"class": "line ink", "points": _pairs(hit)})
    _x_axis(svg, [0, 25, 50, 75, 100], across, "recall, %")
    return _written(svg)


def signed(value: float, digits: int = 1) -> str:
    """+1.5, with a true minus sign."""
    return f"{value:+.{digits}f}".replace("-", "−")


def _finite_points(line: Line) -> NDArray[np.float64]:
    points_P2 = np.array([line.x, line.y], dtype=np.float64).T.reshape(-1, 2)
    return points_P2[np.isfinite(points_P2).all(axis=1)]


def _scale(low: float, high: float, start: float, end: float) -> Scale:
    """From a value to a place in the drawing."""
    unit = (end - start) / ((high - low) or 1.0)
    return lambda value: start + (value - low) * unit


def _marks(low: float, high: float, count: int = 5) -> list[float]:
    """About so many round numbers between two values."""
    span = high - low
    if not span > 0:
        return [low]
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _log_marks(low: float, high: float) -> list[float]:
    """Logarithms of 1, 2, 5, 10, … between two; of 1, 10, … where these are many, of 1.2, 1.4, … where few."""
    factors = (1,) if high - low > 2.5 else (1, 2, 5)
    powers = range(math.floor(low), math.ceil(high) + 1)
    marks = [math.log10(factor) + power for power in powers for factor in factors]
    inside = [mark for mark in marks if low <= mark <= high]
    return inside if len(inside) > 2 else [math.log10(mark) for mark in _marks(10**low, 10**high)]


def _short(value: float) -> str:
    """1500, 90k, 0.05."""
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.3g}" if abs(value) < 1 else f"{value:g}"


def _canvas(height: float, label: str) -> Element:
    return Element("svg", {"viewBox": f"0 0 {WIDTH} {height:g}", "role": "img", "aria-label": label})


def _x_axis(svg: Element, marks: Sequence[float], across: Scale, title: str) -> None:
    floor = HEIGHT - BOTTOM
    _line(svg, "axis", LEFT, floor, WIDTH - RIGHT, floor)
    for mark in marks:
        _text(svg, _short(mark), across(mark), floor + 16, anchor="middle")
    _text(svg, title, (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, anchor="middle")


def _line(svg: Element, styles: str, x1: float, y1: float, x2: float, y2: float) -> None:
    SubElement(svg, "line", {"class": styles, **_numbers(x1=x1, y1=y1, x2=x2, y2=y2)})


def _text(svg: Element, text: str, x: float, y: float, anchor: str = "start") -> Element:
    element = SubElement(svg, "text", {"text-anchor": anchor, **_numbers(x=x, y=y)})
    element.text = text
    return element


def _name(svg: Element, name: str, y: float) -> None:
    """A name left of its bars, cut where it is too long; the whole one is told on hovering."""
    cut = name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"
    element = _text(svg, cut, NAMES - 8, y, anchor="end")
    if cut != name:
        SubElement(element, "title").text = name


def _mark(svg: Element, color: int, x: float, y: float) -> Element:
    """A point, in the color and the shape of its line."""
    corners = SHAPES[color % len(SHAPES)]
    if not corners:
        return SubElement(svg, "circle", {"class": f"dot c{color}", **_numbers(cx=x, cy=y, r=2.9)})
    points = _pairs([(x + dx, y + dy) for dx, dy in corners])
    return SubElement(svg, "polygon", {"class": f"dot c{color}", "points": points})


def _some(count: int, shift: int) -> list[int]:
    """A few places of so many, the last among them for the first line, and others for the next."""
    if count <= MARKS:
        return list(range(count))
    apart = count / MARKS
    return sorted(
        {
            max(0, round(count - 1 - i * apart - (shift % len(SHAPES)) * apart / len(SHAPES)))
            for i in range(MARKS)
        }
    )


def _pairs(spots: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)


def _numbers(**values: float) -> dict[str, str]:
    return {name: f"{value:.1f}" for name, value in values.items()}


def _written(svg: Element) -> Markup:
    return Markup(tostring(svg, encoding="unicode"))
