"""What a fold's report warns of, and its forms."""

import json
import math
from html.parser import HTMLParser

import pytest
import torch
import torch.nn as nn

import oftfx
from oftfx import OFT
from oftfx.folding.measure import Measured
from oftfx.folding.record import SiteFold
from oftfx.folding.report import COLUMNS, FoldReport
from tests.quantized import inputs, original, rotated
from tests.reference import randomize


def site(fqn="a", action="requantized", survival=1.0, **changes):
    values = {
        "update": 0.1,
        "energy": 2.0,
        "relative_error": 0.05,
        "survival": survival,
        "bytes_before": 100,
        "bytes_after": 100,
    }
    return SiteFold(fqn, "bnb4", action, **{**values, **changes})


def test_no_warning_where_the_update_arrived():
    report = FoldReport((site(survival=0.95), site("b", "kept")), ("default",))
    assert report.warnings == []
    assert str(report).splitlines()[:2] == [
        "The adapter arrived: 97.5% of its update is in the weights.",
        "folded default into 2 sites: 1 requantized, 1 kept",
    ]


def test_low_survival_is_the_first_line_and_names_what_helps():
    report = FoldReport((site(survival=0.4), site("b", survival=0.2), site("c")), ("x", "y"))
    assert report.warnings == [
        "The adapter arrived in part: 53.3% of its update is in the weights; quantized='calibrate' with some thousand "
        "tokens of calibration=[inputs, ...] loses least of what leaves no float behind, distil=2 less; 'keep' or "
        "'float' nothing",
        "2 of 3 sites kept less than 90% of their update (worst: b, 20.0%)",
    ]
    told = [f"warning: {w}" for w in report.warnings]
    assert str(report).splitlines()[:3] == [*told, "folded x, y into 3 sites: 3 requantized"]


def test_calibrated_sites_are_judged_by_what_the_model_gives():
    sites = (site(action="calibrated", survival=0.3, output_survival=-0.2),)
    assert FoldReport(sites).warnings == []
    assert FoldReport(sites, measured=Measured(0.015, effect=0.05)).warnings == []
    (warning,) = FoldReport(sites, measured=Measured(0.04, effect=0.05)).warnings
    assert warning.startswith("The adapter did not arrive: 36.0% of its effect on the model's outputs is kept; ")
    (warning,) = FoldReport((*sites, site("c", survival=0.1))).warnings
    assert "worst: c, 10.0%" in warning
    assert "quantized='calibrate'" in warning


def test_few_tokens_are_said():
    few = [site(n, "calibrated", tokens=t, few_tokens=True) for n, t in zip("ab", (7, 9), strict=True)]
    (warning,) = FoldReport((*few, site("c", "calibrated", tokens=5000))).warnings
    assert warning == (
        "2 of 3 sites were calibrated by few tokens for their width, 7 at least; give more calibration inputs"
    )


def test_how_much_of_the_gain_is_kept():
    measured = Measured(0.1, perplexity_before=20.0, perplexity_after=25.0, effect=0.5, perplexity_base=40.0)
    assert measured.gain_kept == pytest.approx(math.log(40 / 25) / math.log(40 / 20))
    assert "40.000 without adapter, 20.000 unfolded, 25.000 folded: 67.8% of the gain is kept" in str(
        FoldReport((site(),), measured=measured)
    )
    assert Measured(0.1, 20.0, 25.0, 0.5, 19.0).gain_kept is None  # there was none
    assert Measured(0.1, 20.0, math.inf, 0.5, 40.0).gain_kept is None
    assert Measured(0.1).gain_kept is None


@pytest.mark.needs("bitsandbytes")
def test_survival_is_that_of_the_whole_update_by_dense_algebra():
    """One NF4 layer and one in bfloat16, whose bytes for the same energy differ by four."""
    from oftfx.formats.bnb4 import make_linear4bit
    from oftfx.formats.registry import format_of

    torch.manual_seed(3)
    model = nn.Sequential(make_linear4bit(nn.Linear(64, 32)), nn.Linear(32, 48).bfloat16())
    model = randomize(oftfx.transform(model, {"*": OFT(16)}), std=0.004)
    before = [format_of(m).dequantize(m).double() for m in model]
    chain = [torch.block_diag(*m.oft.default.matrices().detach().double()) for m in model]
    wanted = [w @ r.T for w, r in zip(before, chain, strict=True)]
    result = oftfx.fold(model, quantized="requantize")
    after = [format_of(m).dequantize(m).double() for m in result.model]
    updates = [w - b for w, b in zip(wanted, before, strict=True)]
    arrived = sum(float(((a - b) * u).sum()) for a, b, u in zip(after, before, updates, strict=True))
    assert result.report.survival == pytest.approx(arrived / sum(float((u * u).sum()) for u in updates), rel=1e-3)
    assert abs(result.report.survival - result.report.sites[1].survival) > 0.01
    assert [s.energy for s in result.report] == pytest.approx([float((u * u).sum()) for u in updates], rel=1e-3)


def test_survival_without_an_update_is_whole_unless_there_was_nothing_to_fold():
    assert FoldReport(()).survival is None
    assert FoldReport((site(action="untouched", energy=0.0),)).survival is None
    assert FoldReport((site(survival=0.0, energy=0.0),)).survival == 1.0  # an update that nobody measured, and kept


def test_an_empty_report():
    report = FoldReport(())
    assert len(report) == 0
    assert str(report).splitlines()[:2] == ["warning: Nothing to fold: no site", "folded nothing into 0 sites: none"]
    assert report.output_error is None
    assert json.loads(report.to_json())["warnings"] == ["Nothing to fold: no site"]


class Cells(HTMLParser):
    """The rows of a page's tables, by the number of the table."""

    def __init__(self):
        super().__init__()
        self.tables, self.inside = [], False

    def handle_starttag(self, tag, attrs):
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        self.inside = tag in ("td", "th") or (self.inside and tag in ("code", "span", "wbr"))
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_data(self, data):
        if self.inside:
            self.tables[-1][-1][-1] += data.strip()

    def handle_endtag(self, tag):
        self.inside = self.inside and tag not in ("td", "th")


@pytest.mark.needs("jinja2", "rich", "itables", "vl_convert")
def test_every_form_says_the_same(tmp_path):
    note = "<script>alert('1')</script> & more"
    sites = (
        site("model.a", survival=0.25, output_error=0.125, output_survival=0.5, note=note),
        site("model.b", output_error=0.0),
    )
    report = FoldReport(sites, ("default",), ("old",), Measured(0.03125, 10.0, 12.5))
    data = json.loads(report.to_json())
    assert [s["fqn"] for s in data["sites"]] == ["model.a", "model.b"]
    assert data["sites"][0] == {**vars(sites[0])}
    assert data["verdict"] == {
        "state": "amber",
        "measure": "layer outputs",
        "share": 0.75,
        "sentence": report.verdict.sentence,
    }
    assert FoldReport.from_json(report.to_json()) == report
    assert {k: v for k, v in data["measured"].items() if v is not None} == {
        "output_error": 0.03125,
        "perplexity_before": 10.0,
        "perplexity_after": 12.5,
    }
    assert (data["output_error"], data["survival"], data["dropped"]) == (0.03125, 0.625, ["old"])
    assert data["warnings"] == report.warnings
    assert len(report.warnings) == 2
    assert dict(zip(COLUMNS, report.rows()[0], strict=True)) == {
        "site": "model.a",
        "format": "bnb4",
        "action": "requantized",
        "update %": "10.000",
        "error %": "5.00000",
        "output error %": "12.5000",
        "survival %": "25.00",
        "output survival %": "50.00",
        "angle °": "",
        "bytes before": "100",
        "bytes after": "100",
        "note": note,
    }
    report.to_html(tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert "<script>alert" not in text
    page = Cells()
    page.feed(text)
    head, *rows = page.tables[-1]
    assert [r[head.index("site")] for r in rows] == ["model.a", "model.b"]
    assert [r[head.index("survival")] for r in rows] == ["25.0%", "100.0%"]
    assert [r[head.index("output survival")] for r in rows] == ["50.0%", "\N{EN DASH}not measured"]
    assert [r[head.index("note")] for r in rows] == [note, ""]
    share = "75.0% of its update is in the layers' outputs"
    assert share.replace("'", "&#39;") in text
    assert share in report.to_markdown()
    assert share in report.warnings[0]
    text = str(report)
    assert "relative error of the model's output 3.12e-02" in text
    assert "perplexity on the calibration inputs 10.000 unfolded, 12.500 folded" in text
    assert text.splitlines()[-1] == "adapters that did not act and are dropped: old"
    assert report.table().rstrip().endswith(text)


@pytest.mark.needs("bitsandbytes")
def test_a_small_update_that_rounding_erases_is_warned_of_and_calibration_helps():
    """Much smaller than a rounding step: nearest codes keep a fifth of it."""
    model = rotated(std=0.005)
    poor = oftfx.fold(model, quantized="requantize", calibration=inputs()).report
    assert poor.survival < 0.3
    assert str(poor).startswith("warning: The adapter did not arrive: ")
    assert "10 of 10 sites kept less than 90% of their update" in poor.warnings[1]
    assert "quantized='calibrate'" in poor.warnings[0]
    for policy in ("keep", "float"):
        report = oftfx.fold(model, quantized=policy).report
        assert report.warnings == []
        assert report.survival == pytest.approx(1.0, abs=1e-4)
    helped = oftfx.fold(model, quantized="calibrate", calibration=inputs()).report
    assert helped.output_error < 0.8 * poor.output_error
    assert len(helped.warnings) <= 1


@pytest.mark.needs("bitsandbytes")
def test_json_of_a_real_fold_is_plain_numbers():
    report = oftfx.fold(
        rotated(), quantized=oftfx.Budget(0.05), calibration=inputs(), reference=original()
    ).report  # fmt: skip
    data = json.loads(report.to_json())
    assert len(data["sites"]) == 10
    assert all(isinstance(s["relative_error"], float) and isinstance(s["bytes_after"], int) for s in data["sites"])
    assert data["output_error"] == report.output_error


def test_bytes_before_and_after():
    model = oftfx.transform(nn.Sequential(nn.Linear(12, 5)), {"0": OFT(4)})
    with torch.no_grad():
        model[0].oft.default.skew.fill_(0.1)
    (row,) = oftfx.fold(model).report
    assert (row.bytes_before, row.bytes_after) == (240, 240)
