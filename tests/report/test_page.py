"""The page as a document: well-formed, escaped, complete in itself, and legible in both schemes."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from detdistill.report.page import DARK, LIGHT, Page, Section, render, write_page

VOID = {"meta", "img", "input", "link", "br", "hr"}


class Outline(HTMLParser):
    """Which elements there are, whether each is closed by its own end, and the text of each."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: dict[str, list[str]] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.words.setdefault(self.open[-1], []).append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def test_the_document_is_well_formed_and_every_part_is_there(page):
    outline = Outline(render(page))
    assert outline.open == []
    tags = [tag for tag, _ in outline.elements]
    assert tags[:2] == ["html", "head"]
    assert [tags.count(tag) for tag in ("h1", "section", "svg", "table", "details")] == [1, 3, 4, 2, 1]
    assert len(outline.all("img")) == 5  # two pairs, and one by itself
    ids = [attributes["id"] for _, attributes in outline.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [attributes["href"] for attributes in outline.all("a")]
    assert {link.removeprefix("#") for link in links} <= set(ids)


def test_hostile_words_stay_words(page):
    outline = Outline(render(page))
    assert len(outline.all("script")) == len(outline.all("style")) == 1
    assert "alert(1)" not in "".join(outline.words["script"] + outline.words["style"])
    assert not any(name.startswith("on") for _, attributes in outline.elements for name in attributes)
    assert all(attributes["src"].startswith("data:image/jpeg;base64,") for attributes in outline.all("img"))
    for tag in ("h1", "li", "p", "th", "h3", "pre", "summary", "title", "span", "b"):
        said = "".join(outline.words[tag])
        assert ("<script>alert(1)</script></style>" in said) == (tag != "summary"), tag
        assert "49" not in said
    assert outline.words["h1"][0].endswith("{{ 7*7 }} &amp; \x00 \udcff")  # escaped once


def test_nothing_is_fetched(page):
    text = render(page)
    for tag, attributes in Outline(text).elements:
        for name in ("src", "href", "action", "data", "srcset"):
            value = attributes.get(name) or ""
            assert value.startswith(("data:", "#")) or not value, (tag, value)
    assert not re.search(r"(src|href)\s*=\s*[\"']?\s*(https?:)?//", text)
    assert not re.search(r"@import|url\(", text)
    policy = next(a["content"] for a in Outline(text).all("meta") if "http-equiv" in a)
    assert "default-src 'none'" in policy
    assert "unsafe-inline" not in re.search(r"script-src[^;]*", policy)[0]


def test_bytes_that_are_no_text_are_written(page, tmp_path):
    write_page(page, tmp_path / "new" / "report.html")
    assert "�" not in (tmp_path / "new" / "report.html").read_text(encoding="utf-8")


def test_both_schemes_are_in_the_style(page):
    style = "".join(Outline(render(page)).words["style"])
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    assert f"--ink: {LIGHT.ink}" in light
    assert f"--ink: {DARK.ink}" in dark
    for scheme, part in ((LIGHT, light), (DARK, dark)):
        assert all(f"--c{i}: {color};" in part for i, color in enumerate(scheme.series))
        assert all(f"--k{i}: {color};" in part for i, color in enumerate(scheme.errors))


def contrast(one: str, other: str) -> float:
    """WCAG 2.2's contrast ratio."""

    def luminance(color: str) -> float:
        channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
def test_text_has_the_contrast_of_wcag_aa(scheme):
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    for text in (scheme.ink, scheme.muted, scheme.accent, scheme.warning):
        for ground in (scheme.paper, scheme.card):
            assert contrast(text, ground) >= 4.5, (text, ground)


def test_lines_can_be_told_from_a_dark_page():
    assert min(contrast(color, DARK.card) for color in DARK.series) >= 3


def test_a_page_of_words_only():
    outline = Outline(render(Page("t", "h", sections=[Section("A b, c")])))
    assert outline.all("section")[0]["id"] == "a-b-c"
    assert not outline.all("table")
