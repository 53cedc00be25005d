"""The one number that says whether an adapter arrived, and its words."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn as nn

import oftfx
from oftfx import OFT
from oftfx.folding.measure import Measured
from oftfx.folding.report import FoldReport
from oftfx.folding.verdict import ARRIVED, IN_PART
from tests.folding.test_report import site
from tests.quantized import inputs, rotated
from tests.reference import randomize

LEVELS = ("model outputs", "layer outputs", "weights")


@pytest.mark.parametrize(
    ("share", "state"),
    [(1.0, "green"), (ARRIVED, "green"), (0.8994, "amber"), (IN_PART, "amber"), (0.4994, "red"), (-3.0, "red")],
)
@pytest.mark.parametrize("level", LEVELS)
def test_states_by_every_measure(level, share, state):
    if level == "model outputs":
        report = FoldReport((site(),), measured=Measured(0.25 * math.sqrt(1 - share), effect=0.25))
    elif level == "layer outputs":
        report = FoldReport((site(survival=0.123, output_survival=share),))
    else:
        report = FoldReport((site(survival=share),))
    verdict = report.verdict
    assert (verdict.state, verdict.measure) == (state, level)
    assert verdict.share == pytest.approx(share, abs=1e-12)


def test_the_model_counts_before_the_layers_and_these_before_the_weights():
    sites = (site(survival=0.1, output_survival=0.6), site("b", survival=0.2, output_survival=0.7, energy=6.0))
    seen = Measured(0.01, effect=0.1)
    assert FoldReport(sites, measured=seen).verdict.share == pytest.approx(0.99)
    assert FoldReport(sites, measured=Measured(0.01)).verdict.share == pytest.approx((2 * 0.6 + 6 * 0.7) / 8)
    assert FoldReport(sites, measured=Measured(0.01, effect=0.0)).verdict.measure == "layer outputs"
    bare = tuple(replace(s, output_survival=None) for s in sites)
    assert FoldReport(bare).verdict.share == pytest.approx((2 * 0.1 + 6 * 0.2) / 8)


def test_the_same_number_is_in_every_form():
    report = FoldReport((site(survival=0.7),), ("default",), measured=Measured(0.5, effect=1.0))
    said = "75.0% of its effect on the model's outputs is kept"
    assert said in report.warnings[0]
    assert said in str(report)
    assert said in report.table()
    assert said in report.to_json()
    assert said in report.to_markdown()


@pytest.mark.parametrize("error", [math.nan, math.inf])
def test_outputs_that_are_not_finite_are_red(error):
    verdict = FoldReport((site(),), measured=Measured(error, effect=1.0)).verdict
    assert (verdict.state, verdict.share) == ("red", None)
    assert "not finite" in verdict.sentence


def test_an_adapter_that_was_never_trained_reads_nothing_to_fold():
    model = oftfx.transform(nn.Sequential(nn.Linear(12, 5), nn.Linear(5, 4)), {"0": OFT(4), "1": OFT(5)})
    report = oftfx.fold(model, calibration=[(torch.randn(3, 12),)]).report
    verdict = report.verdict
    assert (verdict.state, verdict.measure, verdict.share) == ("nothing", "", None)
    assert report.survival is None
    assert report.warnings == [
        "Nothing to fold: the rotations of all 2 sites are the identity; was the adapter trained?"
    ]
    for text in (str(report), report.table(), report.to_markdown(), report.to_json()):
        assert "nothing to fold" in text.lower()
        assert "100" not in text.replace("100%: all", "").partition("Glossary")[0].replace(
            report.provenance.hashes["default"], ""
        )


def test_calibrated_layers_are_not_judged_by_themselves():
    verdict = FoldReport((site(action="from reference, calibrated", output_survival=-0.3),)).verdict
    assert (verdict.state, verdict.share) == ("unknown", None)


def test_layers_that_were_only_rounded_have_no_adapter():
    report = FoldReport((replace(site(), format="dense"),), measured=Measured(0.02))
    assert report.verdict.state == "unknown"
    assert report.verdict.sentence == "No adapter was folded: 1 layers were rounded; the outputs moved by 2.00%."


@pytest.mark.needs("bitsandbytes")
def test_the_share_of_a_real_fold_by_dense_arithmetic():
    """From the outputs of the three models themselves, in float64."""
    model, batches = rotated(std=0.02), inputs()
    result = oftfx.fold(model, quantized="requantize", calibration=batches)
    error = effect = 0.0
    with torch.no_grad():
        for batch in batches[:8]:
            given = batch if isinstance(batch, tuple) else tuple(batch.values())
            folded, unfolded = result.model(*given).double(), model(*given).double()
            with oftfx.disable_adapters(model):
                base = model(*given).double()
            error += float((folded - unfolded).square().sum())
            effect += float((base - unfolded).square().sum())
    assert result.report.verdict.measure == "model outputs"
    assert result.report.verdict.share == pytest.approx(1 - error / effect, abs=2e-3)


def test_angles_are_those_of_the_eigenvalues():
    model = randomize(
        oftfx.transform(nn.Sequential(nn.Linear(12, 7)), {"0": OFT(4, parameterization="cayley")}), std=0.3
    )
    blocks = model[0].oft.default.matrices().detach().double()
    angles = torch.linalg.eigvals(blocks).angle().abs().rad2deg()
    (line,) = oftfx.fold(model).report
    assert line.angle == pytest.approx(float(angles.max()), rel=1e-5)
    assert line.typical_angle == pytest.approx(float(angles.square().mean().sqrt()), rel=1e-5)
    assert line.side == "input"


def test_provenance_of_a_fold():
    ids = torch.randint(1, 9, (2, 5))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(9, 12), nn.Linear(12, 9)

        def forward(self, input_ids, attention_mask=None):
            return self.head(self.table(input_ids))

    model = randomize(oftfx.transform(Small(), {"*": OFT(4)}))
    batches = [{"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}]
    report = oftfx.fold(model, calibration=batches).report
    origin = report.provenance
    assert (origin.model, origin.calibration_inputs, origin.calibration_tokens) == ("Small", 2, 18)
    assert origin.versions["torch"] == torch.__version__
    assert origin.versions["oftfx"] == oftfx.__version__
    assert len(origin.hashes["default"]) == 64
    assert origin.command == ""  # a program called the library
    assert {s.fqn: s.side for s in report} == {"table": "output", "head": "input"}
    without = oftfx.fold(model, calibration=[(ids,)]).report.provenance
    assert (without.calibration_inputs, without.calibration_tokens) == (1, None)
    assert without.hashes == origin.hashes


def test_the_command_is_noted_without_the_places_of_files(monkeypatch):
    from oftfx.folding.provenance import command_line

    words = ["/opt/bin/oftfx", "fold", "base", "/home/me/private/adapter", "--reference=/home/me/original", "--json"]
    monkeypatch.setattr("sys.argv", words)
    assert command_line() == "oftfx fold base adapter --reference=original --json"
    monkeypatch.setattr("sys.argv", ["train.py", "--secret"])
    assert command_line() == ""
