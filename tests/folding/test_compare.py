"""Several folds on one page."""

import json
from dataclasses import replace

import pytest

from oftfx import CompareReport, FoldReport
from oftfx.errors import FoldError
from oftfx.folding.measure import Measured
from oftfx.folding.provenance import Provenance
from tests.folding.test_report import site


def fold(share, size, *, perplexity=10.0, adapter="a"):
    measured = Measured((1 - share) ** 0.5, 9.0, perplexity, 1.0, 12.0)
    origin = Provenance("Small", {"default": adapter * 64}, {"oftfx": "0"})
    sites = (site("layers.0.up", bytes_after=size), site("layers.1.up", bytes_after=size, survival=share))
    return FoldReport(sites, ("default",), measured=measured, provenance=origin)


FOLDS = {"keep": fold(1.0, 400), "calibrate": fold(0.95, 100), "requantize": fold(0.3, 100), "float": fold(1.0, 900)}


def test_the_smallest_in_which_the_adapter_arrived():
    both = CompareReport(FOLDS)
    assert both.best == "calibrate"
    assert (
        str(both)
        == "The smallest fold in which the adapter arrived (95.0% by the model outputs, 200\N{NO-BREAK SPACE}B)."
    )
    assert CompareReport({n: FOLDS[n] for n in ("keep", "requantize", "float")}).best == "keep"
    same_size = {"less": fold(0.91, 100), "more": fold(0.99, 100)}
    assert CompareReport(same_size).best == "more"


def test_where_it_arrived_in_none():
    both = CompareReport({"a": fold(0.3, 100), "b": fold(0.7, 100)})
    assert both.best is None
    assert "Most of it did by 'b': The adapter arrived in part: 70.0%" in str(both)


def test_json_both_ways_and_rows():
    both = CompareReport(FOLDS)
    assert CompareReport.from_json(both.to_json()) == both
    assert json.loads(both.to_json())["best"] == "calibrate"
    assert [row[:4] for row in both.rows()][1] == ("calibrate", "The adapter arrived", "95.0", "model outputs")
    with pytest.raises(FoldError, match="got no reports"):
        CompareReport({})
    with pytest.raises(FoldError, match="is not what CompareReport"):
        CompareReport.from_json("[]")


def test_what_does_not_compare_is_said():
    other = replace(FOLDS["keep"], measured=None)
    text = CompareReport({"a": FOLDS["calibrate"], "b": other}).to_markdown()
    assert "judged by different measures (model outputs, weights)" in text
    text = CompareReport({"a": FOLDS["calibrate"], "b": fold(1.0, 10, adapter="b")}).to_markdown()
    assert "folds of different adapters" in text
    assert "different" not in CompareReport(FOLDS).to_markdown()


@pytest.mark.needs("jinja2", "itables", "vl_convert")
def test_the_page_has_every_fold(tmp_path):
    CompareReport(FOLDS).to_html(tmp_path / "c.html")
    text = (tmp_path / "c.html").read_text()
    for name in FOLDS:
        assert f"Survival, {name}" in text
        assert f"{name}: survival" in text


@pytest.mark.parametrize("text", ["", "[]", "{}", "3", '{"sites": [{}], "adapters": []}', '{"report": 5}', "null"])
def test_a_text_that_is_no_report(text):
    with pytest.raises(FoldError, match="this text is no report of a fold"):
        FoldReport.from_json(text)


def test_a_note_of_an_older_version_is_read():
    """Fields that came later have their defaults; what follows from the figures is made anew."""
    old = {
        "sites": [{"fqn": "a", "format": "bnb4", "action": "kept"}],
        "adapters": ["x"],
        "survival": 0.3,
        "warnings": 7,
    }
    report = FoldReport.from_json(json.dumps({"oftfx_fold": 1, "report": old}))
    assert (report.adapters, report.survival, report.provenance) == (("x",), 1.0, Provenance())
    assert "not recorded" in report.to_markdown()
