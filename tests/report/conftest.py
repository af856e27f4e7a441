"""A page with everything on it, and a browser to look at it."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from detdistill.evaluation.errors import AREAS, KINDS, RECALLS, ErrorCurves
from detdistill.report.charts import Chart, Key, Line, bar_chart, error_chart, interval_chart, line_chart
from detdistill.report.page import Cell, Code, Page, Picture, Section, Slide, Table
from detdistill.report.pictures import draw_pairs

HOSTILE = (
    "<script>alert(1)</script></style></title>\"'><img src=x onerror=alert(1)> {{ 7*7 }} &amp; \x00 \udcff"
)
SYSTEM_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def flat_errors() -> ErrorCurves:
    """One class; each kind's precision is the same at every recall."""
    precision = np.empty((len(KINDS), len(AREAS), 1, len(RECALLS)))
    precision[:] = np.linspace(0.1, 1, len(KINDS))[:, None, None, None]
    return ErrorCurves((HOSTILE,), precision, False)


@pytest.fixture
def page() -> Page:
    """Every kind of thing that a page can hold; every word is hostile."""
    word = HOSTILE
    lines = [Line(word, [0, 1, 2], [1, 2, 4], 0, dots=True), Line(word, [0, 1], [3, 1], 7, dashed=True)]
    charts = (
        Chart(word, line_chart(lines, word), (Key("c0", word, "4"), Key("c7", word, dashed=True)), word),
        Chart(word, bar_chart([word, "b"], [(word, 0, [1, 2]), ("x", 1, [3, float("nan")])], word)),
        Chart(word, interval_chart([(word, 1.0, (-1.0, 3.0)), ("one seed", 2.0, None)], word)),
        Chart(word, error_chart(flat_errors(), word)),
    )
    rows = tuple((Cell(name), Cell(text, value)) for name, text, value in (
        ("b", "9.0", 9.0), ("a", "10.0", 10.0), (word, "", None)))  # fmt: skip
    image = torch.full((3, 40, 60), 90, dtype=torch.uint8)
    one = {"boxes": torch.tensor([[5.0, 5, 30, 30]]), "labels": torch.tensor([0]), "scores": torch.ones(1)}
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}
    pairs = draw_pairs([(image, none, one)] * 2, ["cat"])
    wide = Table(
        "wide", ("name", *(f"column {i}" for i in range(30))), ((Cell("a"), *[Cell("1.0", 1.0)] * 30),)
    )
    sections = (
        Section("Numbers", (word,), (word,), charts, (Table(word, ("name", "AP"), rows, word), wide)),
        Section("Pictures", sides=("baseline", word), slides=tuple(Slide(word, word, pair) for pair in pairs),
                swatches=(("#aa2200", word), ("#00aa22", "b")),
                pictures=(Picture(word, pairs[0][0]),)),
        Section("Recipe", codes=(Code(word, word), Code("folded", "x" * 500, folded=True))),
    )  # fmt: skip
    return Page(word, word, (word,), (word,), (word,), sections, word)


@pytest.fixture(scope="module")
def browser():
    """Chromium: the one that playwright has fetched, or one of the system."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed (pip install playwright)"
    )
    paths = [None, *filter(None, map(shutil.which, SYSTEM_BROWSERS))]
    with playwright.sync_playwright() as driver:
        for path in paths:
            try:
                opened = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
            except playwright.Error:
                continue
            yield opened
            opened.close()
            return
    pytest.skip("no Chromium: run `playwright install chromium`, or install the system's")
