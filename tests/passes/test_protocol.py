import dataclasses

import pytest
import torch
import torch.nn as nn

from oftfx import OFT, Rule
from oftfx.errors import PassError
from oftfx.passes import Change, InsertRotations, MatchRules, Pass, PassManager, PassResult, ShareInputs
from oftfx.planning.program import Program


class Base(Pass):
    name, preserves = "base", "exact"

    def __init__(self, act=lambda p: p, modified=None):
        self.act, self.modified = act, modified

    def run(self, program):
        before = program.fingerprint()
        new = self.act(program)
        modified = new.fingerprint() != before if self.modified is None else self.modified
        return PassResult(new, modified, (Change("0", "looked", "only looking", refused=True),))


def scale(factor):
    def act(program):
        program.model[0].weight = nn.Parameter(program.model[0].weight * factor)
        return program

    return act


@pytest.fixture
def program():
    return Program.of(nn.Sequential(nn.Linear(4, 3)))


def test_results_and_refusals_are_data(program):
    result = PassManager([Base(), Base()]).run(program)
    assert not result.modified
    assert [c.reason for c in result.refusals] == ["only looking"] * 2


def test_modified_has_to_be_honest(program):
    with pytest.raises(PassError, match="pass base: says modified=False, but the program changed"):
        PassManager([Base(scale(2), modified=False)]).run(program)
    with pytest.raises(PassError, match="pass base: says modified=True, but the program did not change"):
        PassManager([Base(modified=True)]).run(program)


def test_the_post_condition_is_checked_on_the_result(program):
    class Named(Base):
        def check(self, result):
            if result.sites:
                raise PassError("not done")

    def done(program):
        return program.with_(sites=())

    assert PassManager([Named(done)]).run(program).program.sites == ()
    with pytest.raises(PassError, match="pass base: post-condition failed: not done"):
        PassManager([Named()]).run(program)


@pytest.mark.parametrize(("preserves", "factor", "fails"), [
    ("exact", 1.0, False), ("exact", 1 + 1e-6, True), ("rounding", 1 + 1e-6, False), ("rounding", 1.001, True),
    ("lossy", 3.0, False),
])  # fmt: skip
def test_verification_runs_the_program_before_and_after(program, preserves, factor, fails):
    step = Base(scale(factor))
    type(step).preserves, kept = preserves, type(step).preserves
    manager = PassManager([step], verify=(torch.randn(5, 4),))
    try:
        if fails:
            with pytest.raises(PassError, match="pass base.*output 0 differs"):
                manager.run(program)
        else:
            assert manager.run(program).modified
    finally:
        type(step).preserves = kept


def test_order_is_checked_before_anything_runs(program):
    rules = MatchRules([Rule("0", OFT(2))])
    with pytest.raises(PassError, match="pass insert_rotations has to run after match_rules; order given"):
        PassManager([InsertRotations(), rules]).run(program)
    assert not program.model[0]._forward_pre_hooks


def test_shipped_passes_hold_their_contract_with_verification(program):
    passes = [MatchRules([Rule("0", OFT(2))]), ShareInputs(), InsertRotations()]
    result = PassManager(passes, verify=(torch.randn(5, 4),)).run(program)
    assert result.modified
    assert [(c.site, c.action) for c in result.changes] == [("0", "planned"), ("0", "rotated")]


def test_a_result_is_a_pass_result(program):
    class Wrong(Base):
        def run(self, program):
            return program

    with pytest.raises(PassError, match=r"run\(\) returned Program, expected a PassResult"):
        PassManager([Wrong()]).run(program)


def test_changes_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Change("a", "b").site = "c"
