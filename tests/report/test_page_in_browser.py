"""The page in Chromium: nothing goes wrong in it, tables sort, sliders move, and it fits a phone."""

from __future__ import annotations

from itertools import pairwise

import pytest

from detdistill.report.page import DARK, LIGHT, write_page


@pytest.fixture
def opened(browser, page, tmp_path):
    """A function: the page at a width, in a scheme; afterwards nothing may have been said on the console."""
    write_page(page, tmp_path / "report.html")
    said, contexts = [], []

    def look(width=1200, scheme="light", scripts=True):
        context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, java_script_enabled=scripts
        )
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("dialog", lambda dialog: (said.append("dialog"), dialog.dismiss()))
        tab.on("request", lambda request: said.append(request.url) if "http" in request.url[:4] else None)
        tab.goto((tmp_path / "report.html").as_uri())
        return tab

    yield look
    for context in contexts:
        context.close()
    assert said == []


def test_every_picture_is_shown(opened):
    sizes = opened().eval_on_selector_all("img", "all => all.map(img => img.complete && img.naturalWidth)")
    assert sizes == [480] * 5


def test_a_table_is_sorted_by_click_and_by_key(opened):
    tab = opened()
    table = tab.locator("table").first
    column, heads = table.locator("tbody th"), table.locator("thead th")

    def names():
        return [text[:1] for text in column.all_inner_texts()]

    assert names() == ["b", "a", "<"]
    heads.nth(1).get_by_role("button").click()
    assert names() == ["a", "b", "<"]  # 10 before 9; what has no value is last
    assert heads.nth(1).get_attribute("aria-sort") == "descending"
    tab.keyboard.press("Enter")
    assert names() == ["b", "a", "<"]
    assert heads.nth(1).get_attribute("aria-sort") == "ascending"
    heads.nth(0).get_by_role("button").focus()
    tab.keyboard.press("Space")
    assert names() == ["<", "a", "b"]
    assert heads.nth(1).get_attribute("aria-sort") is None


def test_a_slider_moves_by_key_and_by_dragging(opened):
    tab = opened()
    slide = tab.locator(".slide").first
    after, range_ = slide.locator(".after"), slide.locator("input")

    def cut():
        return after.evaluate("e => getComputedStyle(e).clipPath")

    assert "50%" in cut()
    range_.focus()
    tab.keyboard.press("ArrowRight")
    assert "51%" in cut()
    tab.keyboard.press("Home")
    assert "inset(0px)" in cut() or "0%" in cut()
    assert range_.get_attribute("aria-valuetext").startswith("0% baseline, 100% ")
    slide.locator(".two").evaluate("e => e.scrollIntoView({behavior: 'instant', block: 'center'})")
    box = slide.locator(".two").bounding_box()
    tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + 20)
    tab.mouse.down()
    tab.mouse.move(box["x"] + box["width"] * 0.8, box["y"] + 20)
    tab.mouse.up()
    assert int(range_.input_value()) == pytest.approx(80, abs=1)
    assert "baseline" in range_.get_attribute("aria-label")


def test_without_scripts_the_pictures_stand_side_by_side(opened):
    tab = opened(scripts=False)
    first, second = (tab.locator(".slide img").nth(i).bounding_box() for i in (0, 1))
    assert first["x"] + first["width"] <= second["x"]
    assert tab.locator("input, thead button").count() == 0


@pytest.mark.parametrize("width", [320, 360, 768])
def test_nothing_but_wide_tables_scrolls_sideways(opened, width):
    tab = opened(width)
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    scrolls = tab.eval_on_selector_all(".scroll", "all => all.map(e => e.scrollWidth > e.clientWidth)")
    assert scrolls[1] is True


@pytest.mark.parametrize(("name", "scheme"), [("light", LIGHT), ("dark", DARK)])
def test_the_page_follows_the_scheme(opened, name, scheme):
    tab = opened(scheme=name)
    ground, ink, line = (
        tab.locator(css).first.evaluate(f"e => getComputedStyle(e).{key}")
        for css, key in (("body", "backgroundColor"), ("h1", "color"), ("polyline.c0", "stroke"))
    )
    for said, color in ((ground, scheme.paper), (ink, scheme.ink), (line, scheme.series[0])):
        assert said == "rgb({}, {}, {})".format(*(int(color[i : i + 2], 16) for i in (1, 3, 5)))


def test_on_paper_both_pictures_are_seen_and_nothing_is_cut_off(opened):
    tab = opened(width=700)
    tab.emulate_media(media="print")
    first, second = (tab.locator(".slide img").nth(i).bounding_box() for i in (0, 1))
    assert first["x"] + first["width"] <= second["x"]
    assert "inset" not in tab.locator(".slide .after").first.evaluate("e => getComputedStyle(e).clipPath")
    assert tab.locator(".slide input").first.is_hidden()
    # a browser leaves backgrounds out on paper, and with them the legends' colors, unless told
    assert tab.locator(".legend i").first.evaluate("e => getComputedStyle(e).printColorAdjust") == "exact"


def test_headings_go_down_by_one_and_every_picture_has_words(opened):
    tab = opened()
    levels = tab.eval_on_selector_all("h1, h2, h3", "all => all.map(e => Number(e.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert all(tab.eval_on_selector_all("img", "all => all.map(e => e.alt.length > 0)"))
    assert all(tab.eval_on_selector_all("svg", "all => all.map(e => e.getAttribute('aria-label').length > 0)"))
