"""Bytes of weight matrices, counted by hand."""

import pytest
import torch
import torch.nn as nn

from oftfx import OFT, Rule
from oftfx.errors import PassError
from oftfx.passes import InsertRotations, MatchRules, MeasureCoverage
from oftfx.planning.coverage import Unreached
from tests.passes.programs import Awkward, program_of, run

SIZES = {"emb": 11 * 12, "q": 8 * 12, "k": 8 * 12, "v": 6 * 12, "o": 12 * 6, "conv": 12 * 12 * 3, "never": 7 * 10}


def measured(model, *rules):
    result = run(run(program_of(model), MatchRules(rules)).program, MeasureCoverage())
    assert result.modified
    assert result.changes == ()
    return result.program.plan.coverage


def test_every_matrix_counts_once_and_biases_do_not():
    coverage = measured(Awkward(), Rule("[qo]", OFT(2)), Rule("conv", OFT(9)))
    assert coverage.total == 4 * sum(SIZES.values())
    assert coverage.reached == 4 * (SIZES["q"] + SIZES["o"] + SIZES["conv"])
    assert coverage.share == pytest.approx(600 / 970)
    assert coverage.unreached == (
        Unreached("emb.weight", (11, 12), 4 * 132),  # and the head's
        Unreached("k.weight", (8, 12), 4 * 96),
        Unreached("v.weight", (6, 12), 4 * 72),
        Unreached("never.weight", (7, 10), 4 * 70),
    )


def test_a_tied_matrix_is_reached_by_any_of_its_names():
    for name in ("emb", "head"):
        coverage = measured(Awkward(), Rule(name, OFT(4)))
        assert coverage.reached == 4 * SIZES["emb"]
        assert "emb.weight" not in {u.name for u in coverage.unreached}


def test_bytes_are_those_of_the_dtype():
    model = Awkward()
    model.o.to(torch.bfloat16), model.conv.to(torch.float64)
    coverage = measured(model, Rule("o", OFT(2)))
    assert coverage.reached == 2 * SIZES["o"]
    assert coverage.total == 4 * sum(SIZES.values()) - 2 * SIZES["o"] + 4 * SIZES["conv"]


def test_rotations_that_are_there_are_no_weights():
    program = run(program_of(Awkward()), MatchRules([Rule("q", OFT(4))]), InsertRotations()).program
    before = run(program_of(Awkward()), MatchRules([Rule("v", OFT(4))]), MeasureCoverage()).program.plan.coverage
    assert run(program, MatchRules([Rule("v", OFT(4))]), MeasureCoverage()).program.plan.coverage == before


@pytest.mark.needs("bitsandbytes")
def test_a_packed_weight_has_its_real_shape_and_the_bytes_of_codes_and_scales():
    from oftfx.formats.registry import format_named

    bnb4 = format_named("bnb4")
    model = nn.Sequential(bnb4.make_tiny(64, 10), bnb4.make_tiny(64, 6), nn.Linear(6, 3))
    coverage = measured(model, Rule("0", OFT(32)))
    assert coverage.reached == 64 * 10 // 2 + 4 * 10
    assert coverage.unreached == (
        Unreached("1.weight", (6, 64), 64 * 6 // 2 + 4 * 6),
        Unreached("2.weight", (3, 6), 4 * 18),
    )
    assert coverage.total == coverage.reached + 192 + 24 + 72


def test_a_second_run_says_that_nothing_changed():
    program = run(program_of(Awkward()), MatchRules([Rule("q", OFT(4))]), MeasureCoverage()).program
    again = run(program, MeasureCoverage())
    assert not again.modified
    assert again.program.plan == program.plan


def test_it_has_to_come_after_the_rules():
    with pytest.raises(PassError, match="pass measure_coverage has to run after match_rules"):
        run(program_of(Awkward()), MeasureCoverage(), MatchRules([Rule("q", OFT(2))]))
