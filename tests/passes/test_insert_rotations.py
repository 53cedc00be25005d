"""Rotations in front of the planned sites: nothing changes at the identity, then it is dense algebra."""

from dataclasses import replace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from oftfx import OFT, Rule
from oftfx.errors import AdapterError, PassError
from oftfx.passes import InsertRotations, MatchRules, ShareInputs
from tests.passes.programs import IDS, Awkward, dense, fill, program_of, run, said
from tests.reference import dense_rotation, rel

SHARED = OFT(4, share_input=True)
RULES = [Rule("[qkv]", SHARED), Rule("o", OFT(3)), Rule("conv", OFT(9)), Rule("emb", OFT(6)), Rule("head", OFT(2))]


def planned(model, rules=RULES):
    return run(program_of(model, IDS), MatchRules(rules), ShareInputs()).program


def in_float64(model, skews):
    """The forward of `Awkward` with dense rotations."""
    turn = {n: dense_rotation(skews[n], size) for n, size in SIZES.items()}
    weight = {n: p.detach().double() for n, p in model.named_parameters() if not n.endswith("skew")}
    x = weight["emb.weight"][IDS] @ turn["emb"]
    turned = x @ turn["q"]
    q = turned @ weight["q.weight"].T + weight["q.bias"]
    y = torch.softmax(q @ (turned @ weight["k.weight"].T).mT, -1) @ (turned @ weight["v.weight"].T + weight["v.bias"])
    y = y @ turn["o"] @ weight["o.weight"].T + weight["o.bias"]
    y = F.conv1d(y.mT, dense(model.conv.weight, skews["conv"], 9), padding=1).mT
    return y @ turn["head"] @ weight["emb.weight"].T


SIZES = {"emb": 6, "q": 4, "o": 3, "conv": 9, "head": 2}


def test_the_identity_is_exact_and_every_name_stays():
    base = Awkward()
    names, classes = [*base.state_dict()], [type(m) for m in base.modules()]
    result = run(planned(base), InsertRotations(), verify=(IDS,))  # bit for bit, or the manager says so
    assert result.modified
    assert said(result) == dict.fromkeys(["emb", "q", "k", "v", "o", "conv", "head"], ("rotated", "", False))
    model = result.program.model
    assert model is base
    assert [n for n in model.state_dict() if ".oft." not in n] == names
    assert [type(m) for n, m in model.named_modules() if "oft" not in n] == classes
    skews = {n: tuple(p.shape) for n, p in model.named_parameters() if ".oft." in n}
    assert skews == {
        "emb.oft.default.skew": (2, 15),
        "q.oft.default.skew": (3, 6),  # k and v use it
        "o.oft.default.skew": (2, 3),
        "conv.oft.default.skew": (4, 36),
        "head.oft.default.skew": (6, 1),
    }


def test_what_it_computes_is_dense_algebra():
    model = run(planned(Awkward()), InsertRotations()).program.model
    with torch.no_grad():
        before = model(IDS)
        expected = in_float64(model, fill(model))
        assert rel(model(IDS), expected) < 1e-6
        assert rel(before, expected) > 1e-2
    model(IDS).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if n.endswith("skew"))


def test_a_rotation_that_is_not_activated_does_not_act():
    model = run(planned(Awkward()), InsertRotations("later", activate=False)).program.model
    expected = Awkward()(IDS)
    fill(model)
    assert torch.equal(model(IDS), expected)


def test_a_half_precision_layer_gets_float32_rotations_and_a_double_one_float64():
    base = nn.Sequential(nn.Linear(6, 4).to(torch.bfloat16), nn.Linear(6, 4).double())
    model = run(run(program_of(base), MatchRules([Rule("*", OFT(3))])).program, InsertRotations()).program.model
    assert [m.oft.default.skew.dtype for m in model] == [torch.float32, torch.float64]


def test_an_adapter_is_inserted_once():
    program = run(planned(Awkward()), InsertRotations()).program
    before = program.fingerprint()
    with pytest.raises(AdapterError, match="emb already has a rotation of adapter 'default'"):
        run(program, InsertRotations())
    assert program.fingerprint() == before


def test_adapters_that_act_in_other_places_are_refused_before_anything_changes():
    program = run(planned(Awkward(), [Rule("q", OFT(4))]), InsertRotations("first")).program
    other = run(program, MatchRules([Rule("k", OFT(4)), Rule("q", OFT(4, placement="weight"))])).program
    before = other.fingerprint()
    with pytest.raises(AdapterError, match=r"q: another adapter rotates its activation, this one its weight.*OFT\(pl"):
        run(other, InsertRotations("second"))
    assert other.fingerprint() == before


def test_the_post_condition_names_the_site_that_has_none():
    class Forgets(InsertRotations):
        def run(self, program):
            some = replace(program.plan, entries=program.plan.entries[:-1])
            result = super().run(program.with_(plan=some))
            return replace(result, program=result.program.with_(plan=program.plan))

    message = "pass insert_rotations: post-condition failed: head has no rotation of adapter 'x'"
    with pytest.raises(PassError, match=message):
        run(planned(Awkward()), Forgets("x"))


@pytest.mark.parametrize("late", [MatchRules(RULES), ShareInputs()], ids=lambda p: p.name)
def test_it_has_to_come_after_those_whose_plan_it_carries_out(late):
    with pytest.raises(PassError, match=f"pass insert_rotations has to run after {late.name}"):
        run(planned(Awkward()), InsertRotations(), late)


@pytest.mark.needs("bitsandbytes")
def test_a_layer_whose_own_product_is_wrong_multiplies_exactly():
    """bitsandbytes' CPU kernel takes wrong scales for blocks of 64 that cross rows of 48."""
    from oftfx.formats.registry import format_named

    bnb4 = format_named("bnb4")
    model = nn.Sequential(bnb4.make_tiny(48, 10)).eval()
    weight = bnb4.dequantize(model[0]).double()
    result = run(run(program_of(model), MatchRules([Rule("0", OFT(16))])).program, InsertRotations())
    (skew,) = fill(model).values()
    x = torch.randn(5, 48)
    with torch.no_grad():
        assert rel(model(x), x.double() @ dense_rotation(skew, 16) @ weight.T + model[0].bias.double()) < 1e-6
    assert said(result) == {"0": ("rotated", "", False)}
