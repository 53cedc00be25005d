import pytest
import torch.nn as nn

from oftfx import OFT, Rule
from oftfx.errors import RuleError
from oftfx.planning.read_rules import read_rules
from oftfx.rotation.spec import divisors, nearest_divisor


def test_oft_defaults_and_round_trip():
    spec = OFT(16, parameterization="cayley", share_input=True)
    assert OFT().block_size == 32
    assert OFT.from_dict(spec.to_dict()) == spec
    assert OFT.from_dict(OFT(blocks=4).to_dict()) == OFT(blocks=4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_size": 0}, "block_size=0"),
        ({"block_size": 8, "blocks": 2}, "both block_size=8 and blocks=2"),
        ({"terms": 0}, "terms=0"),
        ({"parameterization": "polar"}, "parameterization='polar'"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"coft_eps": -1}, "coft_eps=-1"),
        ({"dropout": "x"}, "dropout='x'"),
        ({"coft_eps": "x"}, "coft_eps='x'"),
        ({"share_input": "no"}, "share_input='no'"),
        ({"block_share": 3}, "block_share=3"),
        ({"init": "zeros"}, "init='zeros'"),
        ({"on_indivisible": "pad"}, "on_indivisible='pad'"),
    ],
)
def test_oft_refuses_impossible_fields(fields, message):
    with pytest.raises(RuleError, match=message):
        OFT(**fields)


@pytest.mark.parametrize(("n", "asked", "block"), [(50, 32, 25), (53, 32, 53), (96, 32, 32), (100, 70, 50), (7, 9, 7)])
def test_nearest_divisor_is_pefts(n, asked, block):
    assert nearest_divisor(n, asked) == block
    assert OFT(asked, on_indivisible="nearest").geometry(n, "x") == (n // block, block)


@pytest.mark.needs("peft")
def test_nearest_divisor_equals_peft_everywhere():
    from peft.tuners.oft.layer import OFTLayer

    adjust = OFTLayer.adjust_oft_parameters
    for n in range(2, 130):
        for asked in range(1, 140):
            expected = asked if n % asked == 0 and asked <= n else adjust(None, n, asked)
            assert nearest_divisor(n, asked) == expected, (n, asked)


def test_divisors():
    assert divisors(12) == [1, 2, 3, 4, 6, 12]


def test_every_form_of_rules(tmp_path):
    spec = OFT(8)
    rule = Rule("*.q", spec)
    assert read_rules(rule) == (rule,)
    assert read_rules([rule, Rule("*", None)]) == (rule, Rule("*", None))
    assert read_rules({"*.q": spec, nn.Linear: None}) == (rule, Rule(nn.Linear, None))
    assert read_rules("all-linear") == (Rule("all-linear", OFT()),)
    file = tmp_path / "rules.toml"
    file.write_text('[[rule]]\ntarget="*.q"\nblock_size=8\n[[rule]]\ntarget="*.k"\nexclude=true\noptional=true\n')
    assert read_rules(file) == read_rules(str(file)) == (rule, Rule("*.k", None, optional=True))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([], "empty"),
        ({}, "empty"),
        ("q_proj", "expected a Rule"),
        (OFT(), "expected a Rule"),
        ([OFT()], "a list of rules holds Rule objects"),
        ({"x": 32}, "spec must be an OFT or None"),
        ({"re:(": OFT()}, "not a regular expression"),
        ({3: OFT()}, "must be a glob"),
        ("missing.toml", "no file missing.toml"),
    ],
)
def test_bad_rules_are_refused(rules, message):
    with pytest.raises(RuleError, match=message):
        read_rules(rules)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = [", "is not TOML"),
        ("[[rule]]\nblock_size=3", "has no target"),
        ('[[rule]]\ntarget="a"\nrank=3', "no field 'rank'"),
        ("[rule]\ntarget='a'", "expected \\[\\[rule\\]\\] tables"),
        ("rule = 3", "expected \\[\\[rule\\]\\] tables"),
        ("[[rules]]\ntarget='a'", "expected \\[\\[rule\\]\\] tables"),
    ],
)
def test_bad_rule_files_are_refused(tmp_path, text, message):
    file = tmp_path / "rules.toml"
    file.write_text(text)
    with pytest.raises(RuleError, match=message):
        read_rules(file)
