"""A page's HTML: whole, closed against what stands in it, and honest about what was not measured."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from oftfx.errors import MissingExtraError
from oftfx.pages import libraries
from oftfx.pages.html import html, order, ranks_of
from tests.pages.example import EVIL, PAGE, TABLE

needs_report = pytest.mark.needs("jinja2", "itables", "vl_convert")


class Seen(HTMLParser):
    """Elements with their attributes, scripts with their text, and what was left open."""

    VOID = ("meta", "link", "input", "br", "wbr", "path", "rect")

    def __init__(self, text):
        super().__init__()
        self.elements, self.scripts, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append([dict(attrs).get("type"), ""])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1][1] += data

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


@needs_report
def test_what_stands_in_a_page_stays_text():
    seen = Seen(html(PAGE))
    assert seen.open == []
    assert [kind for kind, _ in seen.scripts] == ["application/json"] * 2 + ["module"] * 2
    specs = [json.loads(text) for kind, text in seen.scripts if kind == "application/json"]
    assert specs[0]["encoding"]["color"]["title"] == EVIL
    assert specs[1]["data"]["values"][0]["label"] == EVIL
    assert not any("alert(1)" in text for kind, text in seen.scripts if kind == "module")


@needs_report
def test_nothing_is_loaded_from_elsewhere():
    seen = Seen(html(PAGE))
    places = [
        v for _, attrs in seen.elements for n, v in attrs.items() if n in ("src", "href", "data", "srcset", "action")
    ]
    assert places
    assert all(p.startswith(("#", "data:")) for p in places)
    css = (libraries.Path(libraries.__file__).parent / "templates/page.css").read_text()
    assert "url(" not in css
    assert "@import" not in css


@needs_report
def test_what_was_not_measured_says_so():
    text = html(PAGE)
    tiles = re.findall(
        r"<dt>unknown</dt><dd class=\"missing\">(.*?)</dd>\s*<dd class=\"note\">(.*?)</dd>", text, re.DOTALL
    )
    assert tiles == [("not measured", "measure it")]
    assert text.count('<span class="out">not measured</span>') == 2
    assert '<dt>empty</dt><dd><span class="missing">not recorded</span>' in text


def test_cells_are_sorted_by_their_numbers_and_texts_in_the_order_of_rows():
    assert sorted([order(3), order(-2.5), order(None), order(float("nan"))], key=float)[2:] == ["-2.5", "3"]
    assert ranks_of(TABLE) == [{}, {}, {"x": 0, EVIL: 1}]


@needs_report
@pytest.mark.parametrize("missing", ["jinja2", "itables", "vl_convert"])
def test_a_missing_package_is_named(missing):
    code = f"""
import sys
sys.modules[{missing!r}] = None
from oftfx.pages import libraries
if {missing!r} == "itables":
    libraries.importlib.util.find_spec = lambda name: None
from oftfx.pages.html import html
from tests.pages.example import PAGE
from oftfx.errors import MissingExtraError
try:
    html(PAGE)
except MissingExtraError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "oftfx[report]" in done.stdout
    assert missing.replace("vl_convert", "vl-convert-python") in done.stdout
    assert issubclass(MissingExtraError, ImportError)
