"""Rules become a plan: who decides, what is left out and why, and what is refused before anything happens."""

import pytest
import torch.nn as nn

from oftfx import OFT, Rule
from oftfx.errors import RuleError
from oftfx.passes import MatchRules
from tests.passes.programs import Awkward, program_of, run, said

RULES = [
    Rule("q", None),
    Rule("all-linear", OFT(2)),
    Rule(nn.Conv1d, OFT(9)),
    Rule(lambda site: site.kind == "embedding", OFT(4)),
]


def test_the_first_rule_that_matches_decides():
    program = program_of(Awkward())
    result = run(program, MatchRules(RULES))
    assert [(e.fqn, e.rule, e.blocks, e.block_size) for e in result.program.plan] == [
        ("emb", RULES[3].label, 3, 4),
        ("k", "all-linear", 6, 2),
        ("v", "all-linear", 6, 2),
        ("o", "all-linear", 3, 2),
        ("conv", "Conv1d", 4, 9),
        ("never", "all-linear", 5, 2),
    ]
    head = "the output head; 'all-linear' leaves it alone, name it to rotate it"
    assert said(result) == {
        **dict.fromkeys(("emb", "k", "v", "o", "conv", "never"), ("planned", "", False)),
        "q": ("skipped", "excluded by 'q'", True),
        "head": ("skipped", head, True),
    }
    assert {s.fqn: s.reason for s in result.program.plan.skipped} == {c.site: c.reason for c in result.refusals}
    assert result.modified
    assert program.plan is None  # the program that was given stays


def test_the_same_rules_again_change_nothing():
    first = run(program_of(Awkward()), MatchRules(RULES)).program
    again = run(first, MatchRules(RULES))
    assert not again.modified
    assert again.program.plan == first.plan
    assert run(first, MatchRules(RULES[1:2])).modified


def test_placement_and_what_a_user_should_know():
    plan = run(program_of(Awkward()), MatchRules([Rule("head", OFT(4)), Rule("conv", OFT(6)), Rule("v", OFT(1))]))
    entries = {e.fqn: e for e in plan.program.plan}
    assert {n: e.placement for n, e in entries.items()} == {"head": "activation", "conv": "weight", "v": "activation"}
    assert entries["head"].notes == ("weight shared with emb.weight; folding gives this layer a weight of its own",)
    assert entries["v"].notes == ("blocks of one element: nothing to train; choose a size that divides",)
    nearest = run(program_of(Awkward()), MatchRules([Rule("v", OFT(5, on_indivisible="nearest"))])).program.plan["v"]
    assert nearest.block_size in (4, 6)
    assert nearest.notes == ("size 5 does not divide 12; the nearest that does is used",)


def test_what_trains_whole_is_named_parameter_by_parameter():
    rules = [Rule("q", OFT(4)), Rule("k", OFT(4)), Rule("never", OFT(5))]

    def trained(**settings):
        return set(run(program_of(Awkward()), MatchRules(rules, **settings)).program.plan.train)

    assert trained(train=["o"]) == {"o.weight", "o.bias"}
    assert trained(train_bias="oft") == {"q.bias", "never.bias"}
    assert trained(train_bias="all") == {"q.bias", "v.bias", "o.bias", "never.bias"}


@pytest.mark.parametrize(
    ("rules", "settings", "message"),
    [
        ([Rule("vv", OFT(2))], {}, r"rule 'vv' matches no layer of Awkward\. Nearest: \*\.v"),
        ([Rule(nn.Conv2d, OFT(2))], {}, "rule 'Conv2d' matches no layer of Awkward. Its 8 layers that can be rotated"),
        ([Rule("*", OFT(2)), Rule("q", OFT(4))], {}, r"rule 'q' decides nothing: .* earlier rules \('\*'\)"),
        ([Rule("[qo]", OFT(5))], {}, r"q: block_size 5 .* Divisors: 1, 2, 3, 4, 6, 12(.|\n)*o: block_size 5"),
        ([Rule("*", OFT(7))], {}, r"^emb and 4 more: block_size 7 .* in_features 12(.|\n)*o: block_size 7"),
        ([Rule("q", OFT(2))], {"train": ["ov"]}, "train: no module 'ov'. Nearest: "),
        ([Rule("q", OFT(2))], {"train": ["q"]}, r"train: q trains whole, but rules also rotate q .*\('q': None\)"),
        ([Rule("q", OFT(2))], {"train_bias": "some"}, "train_bias: got 'some', expected 'none', 'all' or 'oft'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_meant_is_an_error(rules, settings, message):
    with pytest.raises(RuleError, match=message):
        run(program_of(Awkward()), MatchRules(rules, **settings))


def test_an_optional_rule_may_match_nothing_and_decide_nothing():
    rules = [Rule("vv", OFT(2), optional=True), Rule("*", OFT(1)), Rule("q", OFT(4), optional=True)]
    result = run(program_of(Awkward()), MatchRules(rules))
    assert {e.rule for e in result.program.plan} == {"*"}
    assert result.refusals == ()


def test_a_parameter_that_only_a_recording_shows_is_named_with_the_reason():
    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.layer = nn.Parameter(nn.Linear(6, 4).weight.detach()), nn.Linear(4, 6)

        def forward(self, x):
            return self.layer(x @ self.w.T)

    with pytest.raises(RuleError, match=r"rule 'w' matches 1 layers, none of which .* a parameter that Raw uses by it"):
        run(program_of(Raw()), MatchRules([Rule("w", OFT(2)), Rule("layer", OFT(2))]))
