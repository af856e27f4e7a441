"""One HTML file that tells a result: no network, no framework, light and dark, from a phone's width on.

A page is sections of texts, charts, tables, pairs of pictures and code; what they say is decided elsewhere
(:mod:`detdistill.report.report`). All words are data (names of classes, files, arms) and are escaped; the
page's content security policy, too, lets no script run but its own, and nothing be fetched.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from detdistill.report.charts import Chart
from detdistill.report.pictures import Drawing, Pair
from detdistill.visualization.plots import COLORS, ERROR_COLORS


@dataclass(frozen=True)
class Scheme:
    """Colors of the page: ink and muted are for text on paper or card; edges are for lines."""

    paper: str
    card: str
    ink: str
    muted: str
    edge: str
    accent: str
    warning: str
    series: tuple[str, ...]
    errors: tuple[str, ...]


LIGHT = Scheme(
    paper="#fbfbfa", card="#ffffff", ink="#22252b", muted="#565d69", edge="#dfe2e7", accent="#00588a",
    warning="#8a4300", series=COLORS, errors=tuple(ERROR_COLORS.values()),
)  # fmt: skip
# The same hues, light enough for a dark page.
DARK = Scheme(
    paper="#14161a", card="#1c1f25", ink="#e8e9ec", muted="#a4abb8", edge="#343943", accent="#7cc4f0",
    warning="#f5b168",
    series=("#4FA8DE", "#F08A4B", "#2FC49A", "#E29DC4", "#8CCBF0", "#F0B73F", "#B983C6", "#A8A8A8"),
    errors=("#566072", "#7f8a9c", "#56B4E9", "#E69F00", "#CC79A7", "#9A5BA8", "#D55E00"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell of a table; the value is what it is sorted by, the text where there is none."""

    text: str
    value: float | None = None


def number(value: float, digits: int = 1) -> Cell:
    """A cell with a number; empty where it is not finite."""
    return Cell("") if not math.isfinite(value) else Cell(f"{value:.{digits}f}", round(value, 5))


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells below the columns' titles; the first column names the row, numbers follow."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""
    folded: bool = False

    def is_of_words(self, column: int) -> bool:
        """Whether a column's cells are words, which stand at its left."""
        told = [row[column] for row in self.rows if row[column].text]
        return bool(told) and all(cell.value is None for cell in told)


@dataclass(frozen=True, slots=True)
class Code:
    """Something to copy, as a recipe or commands."""

    title: str
    text: str
    folded: bool = False


@dataclass(frozen=True, slots=True)
class Slide:
    """Two drawings of one image, laid one over the other."""

    name: str
    caption: str
    pair: Pair


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture."""

    name: str
    drawing: Drawing


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page.

    Attributes:
        title: its heading.
        text: paragraphs before the rest.
        notes: what is missing, and why.
        charts, tables, pictures, codes: its content, in this order.
        slides: pairs of pictures; ``sides`` says what is on either.
        swatches: the colors in the pictures, as #rrggbb, and what they stand for.
    """

    title: str
    text: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    charts: tuple[Chart, ...] = ()
    tables: tuple[Table, ...] = ()
    sides: tuple[str, str] = ("", "")
    slides: tuple[Slide, ...] = ()
    swatches: tuple[tuple[str, str], ...] = ()
    pictures: tuple[Picture, ...] = ()
    codes: tuple[Code, ...] = ()

    @property
    def anchor(self) -> str:
        return re.sub(r"\W+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True, slots=True)
class Page:
    """What a page says.

    Attributes:
        title: of the whole.
        headline: the result in a sentence.
        findings: the rest of it, a line for each arm or number.
        warnings: what makes the result less than it seems.
        notes: what is missing altogether.
        sections: in order.
        foot: who wrote it.
    """

    title: str
    headline: str
    findings: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    sections: Sequence[Section] = ()
    foot: str = ""


def render(page: Page) -> str:
    """The page as one HTML document."""
    environment = Environment(
        loader=PackageLoader("detdistill.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = _data_uri
    style = environment.get_template("page.css").render(light=LIGHT, dark=DARK)
    script = environment.get_template("page.js").render()
    return environment.get_template("page.html").render(
        page=page, style=Markup(style), script=Markup(script), script_hash=_hash(script)
    )


def write_page(page: Page, out: Path) -> None:
    """Write the page; its folder is made. Characters that UTF-8 lacks (of file names) become ``?``."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(render(page).encode("utf-8", errors="replace"))


def _data_uri(drawing: Drawing) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(drawing.jpeg).decode('ascii')}"


def _hash(script: str) -> str:
    """As a content security policy names a script that may run."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
