"""An export's report as a page; the figures are made up, those of real exports are tested with them."""

from dataclasses import replace
from pathlib import Path

import pytest

import oftfx
from oftfx.onnx.checks.verify import Verification

CHECK = Verification({"x": (2, 3)}, 3e-7, 1e-6, 0.25, "adapter a")
REPORT = oftfx.ExportReport(
    Path("/somewhere/private/model.onnx"),
    {"x": {0: "batch"}, "0.oft.blocks": {}},
    ("y",),
    20,
    {"MatMul": 4, "com.microsoft::MatMulNBits": 7},
    3 << 20,
    ("a",),
    (CHECK, replace(CHECK, relative_error=2e-7)),
)


@pytest.mark.parametrize(
    ("checks", "state", "label"),
    [
        (REPORT.checks, "green", "The file computes what the model does"),
        ((), "amber", "Not verified"),
        ((replace(CHECK, relative_error=0.02),), "amber", "The file computes nearly what the model does"),
        ((replace(CHECK, relative_error=0.2),), "red", "Its error is larger than half of what the adapter does"),
        ((replace(CHECK, adapter_effect=None),), "green", "The file computes what the model does"),
    ],
)
def test_verdicts(checks, state, label):
    banner = replace(REPORT, checks=checks)._page().banner
    assert (banner.state, banner.label) == (state, label)


def test_markdown():
    text = REPORT.to_markdown()
    assert "relative 3.0e-07 at most, on 2 inputs of other shapes" in text
    assert "| `com.microsoft::MatMulNBits` | 7 |" in text
    assert "| `x` | 1 | 0: batch |" in text
    assert "/somewhere/private" not in text
    assert (
        "| Largest relative error | not measured | export with verify=True |"
        in replace(REPORT, checks=()).to_markdown()
    )


@pytest.mark.needs("jinja2", "itables", "vl_convert")
def test_the_page(tmp_path):
    REPORT.to_html(tmp_path / "e.html")
    text = (tmp_path / "e.html").read_text()
    assert "com.microsoft::MatMulNBits" in text
    assert "none: fixed" in text
