"""Who reads the same tensor, and who then shares a rotation."""

import pytest
import torch
import torch.nn as nn

from oftfx import OFT, Rule
from oftfx.errors import PassError
from oftfx.passes import MatchRules, ShareInputs
from tests.passes.programs import IDS, Awkward, program_of, run, said

SHARED = OFT(4, share_input=True)


def shared(model, rules, *inputs):
    return run(run(program_of(model, *inputs), MatchRules(rules)).program, ShareInputs())


def test_layers_that_read_one_tensor_are_grouped_and_those_that_ask_share():
    result = shared(Awkward(), [Rule("[qkvo]", OFT(2, share_input=True)), Rule("*", OFT(1))], IDS)
    plan = result.program.plan
    assert {e.fqn: e.owner for e in plan if e.owner != e.fqn} == {"k": "q", "v": "q"}  # k reads x.contiguous()
    assert {e.fqn: set(e.same_input) for e in plan if e.same_input} == {
        "q": {"k", "v"}, "k": {"q", "v"}, "v": {"q", "k"},
    }  # fmt: skip
    assert said(result) == dict.fromkeys("kv", ("shares the rotation of q", "", False))
    assert (plan["q"].trainable, plan["k"].trainable, plan["o"].trainable) == (6, 0, 3)
    assert plan.trace.rung == "graph"
    assert plan.trace.never_called == ("never",)
    assert result.modified


def test_without_asking_sites_are_grouped_all_the_same():
    result = shared(Awkward(), [Rule("[qkv]", OFT(4))], IDS)
    assert [(e.owner, len(e.same_input)) for e in result.program.plan] == [("q", 2), ("k", 2), ("v", 2)]
    assert result.changes == ()


def test_another_spec_keeps_its_own_rotation():
    rules = [Rule("v", OFT(6, share_input=True)), Rule("q", OFT(4)), Rule("k", SHARED)]
    plan = shared(Awkward(), rules, IDS).program.plan
    assert [(e.fqn, e.owner, set(e.same_input)) for e in plan] == [
        ("q", "q", {"k", "v"}), ("k", "k", {"q", "v"}), ("v", "v", {"q", "k"}),
    ]  # fmt: skip


def test_a_second_run_finds_the_same_and_says_that_nothing_changed():
    first = shared(Awkward(), [Rule("[qkvo]", OFT(2, share_input=True))], IDS)
    again = run(first.program, ShareInputs())
    assert not again.modified
    assert again.changes == first.changes


class Parents(nn.Module):
    """Layers in other parents, one of them called with two inputs."""

    def __init__(self):
        super().__init__()
        self.left, self.right = (nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)}) for _ in range(2))
        self.eval()

    def forward(self, x):
        y = self.left.a(x) + self.left.b(x) + self.right.a(x)
        return self.right.b(x) + self.right.b(y)


def test_sharing_stays_within_a_parent_and_needs_the_same_tensor_in_every_call():
    result = shared(Parents(), [Rule("*", SHARED)], torch.randn(3, 5, 8))
    assert {e.fqn: (e.owner, e.same_input) for e in result.program.plan} == {
        "left.a": ("left.a", ("left.b",)),
        "left.b": ("left.a", ("left.a",)),
        "right.a": ("right.a", ()),
        "right.b": ("right.b", ()),
    }


def test_what_is_rotated_on_its_weight_or_its_output_is_in_no_group():
    rules = [Rule("q", OFT(4, placement="weight", share_input=True)), Rule("k", SHARED), Rule("emb", SHARED)]
    plan = shared(Awkward(), rules, IDS).program.plan
    assert {e.fqn: (e.owner, e.same_input) for e in plan} == {n: (n, ()) for n in ("emb", "q", "k")}


def test_without_a_recording_nothing_is_known():
    result = shared(Awkward(), [Rule("[qkv]", SHARED)])
    assert not result.modified
    assert result.changes == ()


class Unrecorded(nn.Sequential):
    def forward(self, x):
        if self.training is False:
            raise NotImplementedError("no forward here")
        return super().forward(x)


def test_a_model_that_cannot_be_recorded_is_refused_with_the_reason():
    result = shared(Unrecorded(nn.Linear(8, 8), nn.Linear(8, 4)).eval(), [Rule("0", SHARED), Rule("1", OFT(4))], IDS)
    (refused,) = result.refusals  # site 1 did not ask
    assert (refused.site, refused.action) == ("0", "share")
    assert refused.reason.startswith("no recording: ")
    assert "no forward here" in refused.reason
    assert result.program.plan.trace.rung == "tree"
    assert result.program.plan.trace.never_called == ()


def test_it_has_to_come_after_the_rules():
    with pytest.raises(PassError, match="pass share_inputs has to run after match_rules; order given"):
        run(program_of(Awkward(), IDS), ShareInputs(), MatchRules([Rule("q", OFT(2))]))
