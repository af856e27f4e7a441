"""Charts: the geometry by hand, and what is left out."""

from __future__ import annotations

import math
from xml.etree.ElementTree import fromstring

import numpy as np
import pytest

from detdistill.evaluation.errors import AREAS, KINDS, RECALLS, ErrorCurves
from detdistill.report.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    NAMES,
    RIGHT,
    TOP,
    WIDTH,
    Line,
    bar_chart,
    error_chart,
    interval_chart,
    key_of,
    line_chart,
    signed,
)


def points(element):
    return [tuple(map(float, pair.split(","))) for pair in element.get("points").split()]


def words(svg):
    return [element.text for element in svg.iter("text")]


def test_a_line_goes_from_corner_to_corner():
    svg = fromstring(line_chart([Line("a", [0, 50, 100], [0, 5, 10], 3)], "said", limits=(0, 100, 0, 10)))
    assert svg.get("aria-label") == "said"
    (line,) = svg.iter("polyline")
    assert line.get("class") == "line c3"
    middle = ((LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2)
    corners = [(LEFT, HEIGHT - BOTTOM), middle, (WIDTH - RIGHT, TOP)]
    assert np.allclose(points(line), corners, atol=0.06)
    assert {"0", "20", "40", "60", "80", "100", "step"} <= set(words(svg))


def test_on_a_logarithmic_axis_equal_factors_are_equal_steps():
    svg = fromstring(line_chart([Line("a", [0, 1, 2], [0.1, 1, 10], 0)], "", log=True))
    heights = [y for _, y in points(next(svg.iter("polyline")))]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.11)
    assert {"0.1", "1", "10"} <= set(words(svg))
    narrow = fromstring(line_chart([Line("a", [0, 1], [1.1, 1.9], 0)], "", log=True))
    assert len([word for word in words(narrow) if word.startswith("1.")]) >= 3
    zero = fromstring(line_chart([Line("a", [0, 1], [0, 4], 0)], "", log=True))
    assert "0" in words(zero)  # a loss of 0 has no logarithm: the axis is linear then


def test_lines_are_told_apart_without_their_colors():
    lines = [Line(str(i), range(100), [i] * 100, i) for i in range(5)]
    svg = fromstring(line_chart([*lines, Line("thin", range(100), range(100), 0, thin=True)], ""))
    marks = {}
    for element in svg.iter():
        if "dot" in (element.get("class") or ""):
            marks.setdefault(element.get("class"), []).append(element)
    assert {color: len(of) for color, of in marks.items()} == {f"dot c{i}": 5 for i in range(5)}
    shapes = set()
    for color in ("dot c1", "dot c2", "dot c3", "dot c4"):
        (x, y), *others = points(marks[color][0])
        shapes.add(tuple((round(a - x), round(b - y)) for a, b in others))
    assert len(shapes) == 4
    assert [key_of(line, "").shape for line in lines] == [0, 1, 2, 3, 4]


def test_points_that_are_not_finite_are_left_out_and_long_lines_are_thinned():
    svg = fromstring(line_chart([Line("a", [0, 1, 2], [1, math.nan, 3], 0, dots=True)], ""))
    assert len(points(next(svg.iter("polyline")))) == len(list(svg.iter("circle"))) == 2
    long = fromstring(line_chart([Line("a", range(5000), range(5000), 0)], ""))
    drawn = points(next(long.iter("polyline")))
    assert len(drawn) < 200
    assert drawn[-1][0] == WIDTH - RIGHT
    with pytest.raises(ValueError, match="no line has a point"):
        line_chart([Line("a", [1], [math.nan], 0)], "")
    line_chart([Line("a", [5], [0], 0)], "")  # one point at 0


def test_bars_are_as_long_as_their_values():
    svg = fromstring(bar_chart(["cat", "dog"], [("a", 0, [10, 40]), ("b", 1, [math.nan, 20])], ""))
    widths = [float(bar.get("width")) for bar in svg.iter("rect")]
    assert np.allclose(widths, np.array([10, 40, 20]) / 40 * (WIDTH - RIGHT - NAMES), atol=0.06)
    assert [bar.find("title").text for bar in svg.iter("rect")][2] == "dog, b: 20.0"
    assert not list(fromstring(bar_chart(["cat"], [("a", 0, [math.nan])], "")).iter("rect"))


def test_long_names_are_cut_and_told_in_full():
    svg = fromstring(bar_chart(["x" * 40], [("a", 0, [1])], ""))
    (name,) = [text for text in svg.iter("text") if text.text.startswith("x")]
    assert len(name.text) < 25
    assert name.find("title").text == "x" * 40


def test_an_interval_crosses_the_line_of_no_difference_where_it_holds_0():
    svg = fromstring(interval_chart([("a", 2.0, (-1.0, 5.0)), ("b", 3.0, (1.0, 5.0)), ("c", 1.0, None)], ""))
    (zero,) = [float(line.get("x1")) for line in svg.iter("line") if line.get("class") == "zero"]
    lines = [line for line in svg.iter("line") if line.get("class") == "line c0"]
    spans = [(float(line.get("x1")), float(line.get("x2"))) for line in lines]
    first, second = (span for span in spans if span[0] != span[1])
    assert first[0] < zero < first[1]
    assert zero < second[0]
    assert len(list(svg.iter("circle"))) == 3


def area(corners):
    """Gauss's area formula."""
    x, y = np.array(corners).T
    return abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2


def test_each_kind_of_error_has_an_area_of_its_size():
    heights = (0.1, 0.3, 0.4, 0.4, 0.5, 0.8, 1.0)
    precision = np.empty((len(KINDS), len(AREAS), 1, len(RECALLS)))
    precision[:] = np.array(heights)[:, None, None, None]
    svg = fromstring(error_chart(ErrorCurves(("dog",), precision, True), ""))
    whole = (WIDTH - RIGHT - LEFT) * (HEIGHT - BOTTOM - TOP)
    drawn = {shape.get("class")[-1]: area(points(shape)) / whole for shape in svg.iter("polygon")}
    wanted = dict(zip("012456", (0.1, 0.2, 0.1, 0.1, 0.3, 0.2), strict=True))  # nothing for the kind "Sim"
    assert drawn == pytest.approx(wanted, abs=0.005)
    with pytest.raises(ValueError, match="no class"):
        error_chart(ErrorCurves(("dog",), precision * np.nan, True), "")


def test_numbers_with_a_sign():
    assert (signed(1.25), signed(-0.5), signed(3, 0)) == ("+1.2", "−0.5", "+3")
