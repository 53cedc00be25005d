"""Reports in a real browser: nothing fails, everything works, by keyboard as well, and can be read."""

import json
from itertools import pairwise

import pytest
import torch

import oftfx
from oftfx import OFT
from tests.reference import randomize

pytestmark = [pytest.mark.slow, pytest.mark.needs("jinja2", "itables", "vl_convert", "transformers")]
LOOKS = {"light": {}, "dark": {"dark": True}, "narrow": {"width": 390}, "narrow and dark": {"width": 390, "dark": True}}
OTHERS = ("compare", "plan", "nothing")
ROWS = "table.live tbody tr:not(.dtrg-group)"


@pytest.fixture(scope="module")
def report():
    """A fold of 30 layers with 7 sites each, in bfloat16, so that something is rounded."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=97, num_hidden_layers=30, max_position_embeddings=64, pad_token_id=0, **sizes)
    model = LlamaForCausalLM(config).eval().bfloat16()
    model = randomize(oftfx.transform(model, {"re:.*_proj": OFT(16)}), std=0.02)
    ids = torch.randint(1, 97, (2, 16))
    made = oftfx.fold(model, calibration=[{"input_ids": ids}], inplace=True).report
    assert len(made) == 210
    return made


@pytest.fixture(scope="module")
def pages(report, tmp_path_factory):
    """One file of each kind of page."""
    folder = tmp_path_factory.mktemp("pages")
    report.to_html(folder / "fold.html")
    oftfx.CompareReport({"one": report, "other": report}).to_html(folder / "compare.html")
    model = torch.nn.Sequential(*(torch.nn.Linear(12, 12) for _ in range(3)), torch.nn.Conv2d(12, 3, 3))
    oftfx.plan(model, {"re:[0-2]": OFT(4)}).to_html(folder / "plan.html")
    untrained = oftfx.transform(model, {"re:[0-2]": OFT(4)})
    oftfx.fold(untrained).report.to_html(folder / "nothing.html")
    return folder


@pytest.fixture
def fold(browser, pages):
    """The page of the fold, anew."""
    return browser.open(pages / "fold.html")


def numbers(tab, column):
    """What a column's shown cells are sorted by."""
    heads = tab.texts("table.live thead th")
    index = next(i for i, h in enumerate(heads) if h == column)
    cells = f"[...document.querySelectorAll({json.dumps(ROWS)})].filter(r => r.checkVisibility())"
    visible = "[...r.cells].filter(c => c.checkVisibility())"
    return tab.run(f"{cells}.map(r => Number({visible}[{index}].dataset.order))")


@pytest.mark.parametrize(("name", "look"), [("fold", each) for each in LOOKS] + [(n, "narrow") for n in OTHERS])
def test_a_page_is_whole_quiet_and_as_wide_as_its_screen(browser, pages, name, look):
    file = pages / f"{name}.html"
    assert file.stat().st_size < 3_000_000
    tab = browser.open(file, **LOOKS[look])
    assert tab.messages() == []
    assert all(url.startswith(("data:", f"file://{file}")) for url in tab.requests())
    assert tab.run("document.documentElement.scrollWidth") == LOOKS[look].get("width", 1200)
    charts = tab.run("[...document.querySelectorAll('.chart')].map(c => c.querySelectorAll('svg.marks').length)")
    assert set(charts) <= {1}
    assert (len(charts) > 0) == (name != "nothing")


def test_it_is_there_within_two_seconds(browser, pages):
    """The best of a few: other tests run beside this one."""
    assert min(browser.open(pages / "fold.html").seconds for _ in range(3)) < 2


def test_charts_have_a_square_for_each_site(fold):
    squares = (
        "[...document.querySelectorAll('.chart')].map(c => c.querySelectorAll('.mark-rect.role-mark path').length)"
    )
    assert [n for n in fold.run(squares) if n > 100] == [210, 210, 210]


def test_sorting_by_keyboard(fold, report):
    errors = [s.relative_error for s in report]
    head = "[...document.querySelectorAll('table.live thead th')].find(h => h.textContent.trim() === 'error')"
    for wanted, said in ((sorted(errors), "ascending"), (sorted(errors, reverse=True), "descending")):
        fold.run(f"{head}.querySelector('[role=button]').focus()")
        fold.press("Enter")
        fold.wait_for(f"{head}.getAttribute('aria-sort') === '{said}'")
        assert numbers(fold, "error") == pytest.approx(wanted[:25])
    assert fold.texts(".pager [role=status]") == ["Rows 1 to 25 of 210"]


def test_search_filter_and_pages(fold):
    fold.choose("Search", "layers.7.mlp")
    assert [t for t in fold.texts(f"{ROWS} th") if "layers.7.mlp" not in t] == []
    assert len(fold.texts(ROWS)) == 3
    assert fold.texts(".pager [role=status]") == ["Rows 1 to 3 of 3 (of 210)"]
    fold.choose("Search", "no such site")
    assert fold.texts(".pager [role=status]") == ["No row matches"]
    fold.choose("Search", "")
    fold.choose("kind", "v_proj")
    assert fold.texts(".pager [role=status]") == ["Rows 1 to 25 of 30 (of 210)"]
    fold.run("[...document.querySelectorAll('.pager button')].find(b => b.textContent === 'Next').click()")
    assert len(fold.texts(ROWS)) == 5
    fold.choose("kind", "all")
    fold.run("[...document.querySelectorAll('.pager button')].find(b => b.textContent === 'Show all').click()")
    assert len(fold.texts(ROWS)) == 210
    assert fold.messages() == []


def test_grouping_by_layers_alike(fold, report):
    fold.choose("Group by", "layers alike")
    groups = fold.texts("tr.dtrg-group button")
    order = [("self_attn", p) for p in "qkvo"] + [("mlp", p) for p in ("gate", "up", "down")]
    assert [g[2:] for g in groups] == [f"model.layers.{{0..29}}.{block}.{part}_proj" for block, part in order]
    assert fold.texts(ROWS) == []
    worst = min(s.survival for s in report if s.fqn.endswith("k_proj"))
    assert "30 rows · highest error: " in fold.texts("tr.dtrg-group")[1]
    assert f"lowest survival: {worst:.1%}" in fold.texts("tr.dtrg-group")[1]
    fold.run("document.querySelectorAll('tr.dtrg-group button')[1].focus()")
    fold.press("Enter")
    fold.wait_for("document.activeElement.getAttribute('aria-expanded') === 'true'")
    assert [t for t in fold.texts(f"{ROWS} th") if "k_proj" not in t] == []
    assert len(fold.texts(ROWS)) == 30
    fold.press("Enter")
    fold.wait_for("document.activeElement.getAttribute('aria-expanded') === 'false'")
    assert fold.texts(ROWS) == []
    fold.choose("Group by", "nothing")
    assert len(fold.texts(ROWS)) == 25
    assert fold.messages() == []


def test_grouping_by_layer_is_in_the_order_of_numbers(fold):
    fold.choose("Group by", "layer")
    assert [g[2:] for g in fold.texts("tr.dtrg-group button")] == [str(i) for i in range(30)]


def test_a_square_looks_its_site_up(fold):
    square = "document.querySelectorAll('.chart .mark-rect path')[100]"
    fold.run(f"{square}.scrollIntoView({{block: 'center'}})")
    place = fold.run(f"(b => [b.x + b.width / 2, b.y + b.height / 2])({square}.getBoundingClientRect())")
    for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
        fold.call("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)
    fold.wait_for("document.querySelector('input[type=search]').value !== ''")
    shown = fold.texts(f"{ROWS} th")
    assert len(shown) == 1
    assert shown[0] == fold.run("document.querySelector('input[type=search]').value")


def test_paper_has_all_rows(fold):
    fold.choose("Group by", "layers alike")
    fold.run("window.dispatchEvent(new Event('beforeprint'))")
    assert len(fold.texts(ROWS)) == 210
    fold.run("window.dispatchEvent(new Event('afterprint'))")
    assert fold.texts(ROWS) == []


def test_without_scripts_the_tables_are_there(browser, pages):
    tab = browser.open(pages / "fold.html", scripts=False)
    assert len(tab.texts(ROWS)) == 210
    assert tab.texts(".tools") == []
    assert tab.run("document.querySelectorAll('.chart svg').length") == 0


CONTRAST = """
(() => {
  const channels = (text) => text.match(/[\\d.]+/g).map(Number);
  const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => [r, g, b].map(v => linear(v / 255))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const back = (e) => { for (; e; e = e.parentElement) { const c = channels(getComputedStyle(e).backgroundColor);
    if (c.length === 3 || c[3] === 1) return c; } return [255, 255, 255]; };
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = [];
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement;
    const apart = e.closest('script, style, .out, option, details, :disabled');
    if (!walk.currentNode.data.trim() || !e.checkVisibility() || apart) continue;
    const style = getComputedStyle(e), ink = channels(e.closest('svg') ? style.fill : style.color);
    const [a, b] = [light(ink), light(back(e))].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), walk.currentNode.data.trim().slice(0, 40)]);
  }
  return found;
})()
"""


@pytest.mark.parametrize("look", ["light", "dark"])
@pytest.mark.parametrize("name", ["fold", "nothing"])
def test_contrast_of_every_text(browser, pages, name, look):
    """As WCAG 2 computes it: 4.5 to 1 at least, its level AA."""
    found = browser.open(pages / f"{name}.html", **LOOKS[look]).run(CONTRAST)
    assert len(found) > 50
    assert [f for f in found if f[0] < 4.5] == []


@pytest.mark.parametrize("name", ["fold", *OTHERS])
def test_what_screen_readers_get(browser, pages, name):
    tab = browser.open(pages / f"{name}.html")
    tab.call("Accessibility.enable")
    nodes = [n for n in tab.call("Accessibility.getFullAXTree")["nodes"] if not n["ignored"]]
    roles = [n.get("role", {}).get("value") for n in nodes]
    for landmark in ("main", "navigation", "banner", "contentinfo"):
        assert roles.count(landmark) == 1
    named = {"button", "link", "searchbox", "combobox", "image", "table", "region", "columnheader", "note", "heading"}
    for node, role in zip(nodes, roles, strict=True):
        if role in named:
            assert node["name"]["value"].strip(), node
    assert tab.run("[...document.querySelectorAll('table')].every(t => t.caption)")
    levels = tab.run("[...document.querySelectorAll('h1,h2,h3,h4')].map(h => Number(h.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    ids = tab.run("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(set(ids)) == len(ids)
    tab.press("Tab")
    tab.wait_for("document.activeElement.textContent === 'Skip to the content'")
    tab.press("Enter")
    tab.wait_for("document.activeElement.id === 'content'")
