"""One table, three ways to write it; pages that escape, know every name, and fit a phone."""

import re
import shutil
from importlib.resources import files

import pytest
from jinja2 import UndefinedError

from arcflow.reports.page import fill, templates, write_page
from arcflow.reports.table import Cell, Line, Table

TABLE = Table(
    ["", "distance", "right"],
    [Line.of("ArcFlow", Cell("0.1379 \u00b1 0.0097", "better"), "9%", ours=True), Line.of("a | <b>", 0.5, "100%")],
)


def test_a_table_as_text_has_numbers_below_one_another():
    assert TABLE.text().splitlines() == [
        "                distance  right",
        "ArcFlow  0.1379 \u00b1 0.0097     9%",
        "a | <b>              0.5   100%",
    ]


def test_a_table_as_markdown_escapes_its_bars():
    assert TABLE.markdown().splitlines() == [
        "| | distance | right |",
        "|---|---|---|",
        "| **ArcFlow** | 0.1379 &plusmn; 0.0097 | 9% |",
        "| a \\| <b> | 0.5 | 100% |",
    ]


def test_a_table_on_a_page_is_escaped_and_marked():
    page = templates().get_template("parts.html").module.table(TABLE)
    assert '<tr class="ours"><td>ArcFlow</td><td class="better">0.1379 \u00b1 0.0097</td><td>9%</td></tr>' in page
    assert "<td>a | &lt;b&gt;</td>" in page


def test_a_page_that_lacks_a_value_is_an_error():
    with pytest.raises(UndefinedError, match="'sources' is undefined"):
        fill("claims.html", published={}, own={}, badges={})


def test_every_page_has_the_one_look():
    pages = [path for path in files("arcflow.reports").joinpath("templates").iterdir() if path.name.endswith(".html")]
    own = {path.name: path.read_text("utf-8") for path in pages}
    base = own.pop("base.html")
    assert "prefers-color-scheme: dark" in fill("claims.html", published={}, own={}, badges={}, sources={})
    assert base.count("<style>") == 1 and 'name="viewport"' in base
    del own["parts.html"]
    assert own and all(
        text.startswith('{% extends "base.html" %}') and 'style="color' not in text for text in own.values()
    )


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
def test_a_page_is_as_wide_as_a_phone_and_dark_where_that_is_liked(tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api")
    wide = Table(["", *(f"column {i}" for i in range(20))], [Line.of(*range(21))])
    about = {"command": "arcflow " + "x" * 300, "threads": 1, "device": "x", "python": "3", "versions": {"torch": "2"}}
    values = {"seeds": 3, "budget": 7, "count": 4} | about
    page = write_page(
        tmp_path / "page.html",
        "comparison.html",
        about=values,
        calls=2,
        first="ArcFlow",
        teacher_steps=50,
        tables=[{"title": "At 2 calls", "table": wide}],
        calls_figure=b"",
        cost_figure=None,
        drawn=[],
    )
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for scheme, paper in (("light", 248), ("dark", 11)):
            context = browser.new_context(viewport={"width": 390, "height": 800}, color_scheme=scheme)
            tab = context.new_page()
            tab.goto(page.as_uri())
            assert tab.evaluate("document.documentElement.scrollWidth") == 390
            assert f"rgb({paper}," in tab.evaluate("getComputedStyle(document.body).backgroundColor")
        browser.close()


def test_every_class_that_a_page_uses_has_a_style():
    folder, used = files("arcflow.reports") / "templates", set[str]()
    style = (folder / "style.css").read_text("utf-8")
    for template in folder.iterdir():
        if template.name.endswith(".html"):
            for words in re.findall(r'class="([^"{]*)', template.read_text("utf-8")):
                used |= set(words.split())
    assert "images" in used
    assert not [name for name in used if f".{name}" not in style]
