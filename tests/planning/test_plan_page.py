"""A plan as a page."""

import pytest
import torch.nn as nn

import oftfx
from oftfx import OFT, Rule


@pytest.fixture
def plan():
    layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(12, 6), "down": nn.Linear(6, 12)}) for _ in range(3))
    model = nn.ModuleDict({"layers": layers, "table": nn.Embedding(9, 12), "head": nn.Linear(12, 9)})
    return oftfx.plan(model, [Rule("*.up", OFT(4)), Rule("table", OFT(3))])


def test_markdown_says_what_is_rotated(plan):
    text = plan.to_markdown()
    assert text.startswith("# Plan\n\nrotations for ModuleDict")
    assert "4 sites with 4 rotations, 66 trainable numbers" in text
    assert f"{plan.coverage.share:.1%} of the bytes" in text
    assert "The program was not captured" in text


@pytest.mark.needs("jinja2", "itables", "vl_convert")
def test_the_page(plan, tmp_path):
    plan.to_html(tmp_path / "p.html")
    text = (tmp_path / "p.html").read_text()
    assert text.count("<th scope=row") == 4
    assert "layers.{0..2}.down.weight" in text  # not reached, in one bar
    assert "<td>output</td>" in text  # the embedding
    assert "3 blocks of 4" in text


def test_a_plan_of_nothing(plan):
    from oftfx.planning.plan_page import plan_page

    page = plan_page("Empty", [], [], [], plan.trace, plan.coverage)
    assert page.banner.state == "red"
    assert "Nothing is rotated" in page.banner.label
