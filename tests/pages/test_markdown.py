"""A page's Markdown, read back by a parser of it."""

import pytest

from oftfx.pages.markdown import markdown
from tests.pages.example import EVIL, PAGE

pytestmark = pytest.mark.needs("markdown_it")


def read(text):
    from markdown_it import MarkdownIt

    return MarkdownIt("gfm-like", {"linkify": False}).parse(text)


def text_of(token):
    return "".join(c.content for c in token.children)


def test_texts_come_back_as_they_were():
    tokens = read(markdown(PAGE))
    inside = {c.type for t in tokens for c in t.children or ()}
    assert inside <= {"text", "text_special", "strong_open", "strong_close", "code_inline"}  # no link, no HTML, no rule
    heading = next(t for t in tokens if t.type == "inline")
    assert text_of(heading) == f"Title {EVIL}"
    assert any(t.type == "fence" and t.content.strip() == EVIL for t in tokens)
    shown = [text_of(t) for t in tokens if t.type == "inline"]
    assert EVIL in shown
    assert f"name: {EVIL}" in shown
    assert "empty: not recorded" in shown
    assert not any(t.type == "html_block" for t in tokens)


def test_tables_keep_their_cells():
    tokens = read(markdown(PAGE, tools=True))
    cells = [text_of(tokens[i + 1]) for i, t in enumerate(tokens) if t.type in ("td_open", "th_open")]
    assert cells.count("n|1") == 1
    start = cells.index("site")
    assert cells[start : start + 12] == [
        *("site", "n|1", "kind"),
        *("a.b", "50.0%", "x"),
        *(EVIL, "not measured", EVIL),
        *("c", "not finite", "x"),
    ]
    assert cells[-6:] == ["name", "size", "one", "2.0 KiB", "two|2", "not measured"]


def test_charts_and_long_tables_are_left_out():
    text = markdown(PAGE)
    assert "About charts" not in text
    assert "n\\|1" not in text
    assert markdown(PAGE, heading=2).startswith("## Title")
