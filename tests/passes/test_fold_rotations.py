"""Rotations go into the weights: exactly into float ones, by policy into quantized ones, measured either way."""

import pytest
import torch
import torch.nn as nn

from oftfx import OFT, Budget, Rule
from oftfx.errors import FoldError, OftfxWarning, PassError
from oftfx.formats.registry import format_named
from oftfx.passes import FoldRotations, InsertRotations, MatchRules, PassResult, ShareInputs
from tests.passes.programs import IDS, Awkward, dense, fill, program_of, run, said
from tests.reference import dense_rotation, rel

RULES = [Rule("[qkv]", OFT(4, share_input=True)), Rule("o", OFT(3)), Rule("conv", OFT(9)), Rule("emb", OFT(6))]
X = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))


def rotated(model, rules, *inputs):
    return run(run(program_of(model, *inputs), MatchRules(rules), ShareInputs()).program, InsertRotations()).program


def test_float_weights_are_those_of_dense_algebra():
    program, base = rotated(Awkward(), RULES, IDS), Awkward()
    skews = fill(program.model)
    with torch.no_grad():
        expected = program.model(IDS)
    done = []
    result = run(program, FoldRotations(progress=lambda *counts: done.append(counts)))
    shared = "its weight was shared with another module and is now its own"
    assert said(result) == {
        **dict.fromkeys(["q", "k", "v", "o", "conv"], ("folded", "", False)),
        "emb": ("folded", shared, False),
    }
    assert result.modified
    assert done == [(i, 6) for i in range(1, 7)]
    model = result.program.model
    assert model.state_dict().keys() == base.state_dict().keys()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    # An embedding's rows are turned as they come out, and the head keeps the weight they had.
    for name, owner, size in [("q", "q", 4), ("k", "q", 4), ("v", "q", 4), ("o", "o", 3), ("conv", "conv", 9)]:
        wanted = dense(base.get_submodule(name).weight, skews[owner], size)
        assert rel(model.get_submodule(name).weight, wanted) < 1e-6, name
    assert rel(model.emb.weight, base.emb.weight.double() @ dense_rotation(skews["emb"], 6)) < 1e-6
    assert torch.equal(model.head.weight, base.head.weight)
    with torch.no_grad():
        assert rel(model(IDS), expected) < 1e-6
    assert [s.fqn for s in result.program.sites] == ["emb", "q", "k", "v", "o", "conv", "head", "never"]
    assert result.program.sites[0].tied == ()


def test_a_double_weight_is_folded_in_double_and_a_half_one_is_rounded_once():
    base = nn.Sequential(nn.Linear(6, 5).double(), nn.Linear(6, 5).to(torch.bfloat16))
    weights = [m.weight.detach().double() for m in base]
    program = rotated(base, [Rule("*", OFT(3))])
    wanted = [w @ dense_rotation(s, 3).T for w, s in zip(weights, fill(base).values(), strict=True)]
    run(program, FoldRotations())
    assert rel(base[0].weight, wanted[0]) < 1e-14
    assert torch.equal(base[1].weight, wanted[1].to(torch.bfloat16))


def test_the_identity_touches_no_byte():
    program = rotated(Awkward(), RULES, IDS)
    pointers = {n: p.data_ptr() for n, p in program.model.named_parameters() if "skew" not in n}
    result = run(program, FoldRotations())
    assert {c.action for c in result.changes} == {"untouched"}
    assert result.modified  # the rotations are gone
    assert {n: p.data_ptr() for n, p in result.program.model.named_parameters()} == pointers
    again = run(result.program, FoldRotations())
    assert not again.modified
    assert again.changes == ()


# Quantized weights.

BNB = pytest.mark.needs("bitsandbytes")


def quantized(policy, **settings):
    """A folded NF4 layer of 64 to 10, its weight before, and what dense algebra wants of it."""
    bnb4 = format_named("bnb4")
    model = nn.Sequential(bnb4.make_tiny(64, 10)).eval()
    program = rotated(model, [Rule("0", OFT(16))])
    (skew,) = fill(model, std=0.1).values()
    before, bytes_before = bnb4.dequantize(model[0]).double(), model[0].weight.data.clone()
    with torch.no_grad():
        model(X)
    result = run(program, FoldRotations(policy, **settings))
    return result, before, before @ dense_rotation(skew, 16).T, bytes_before


def read(layer):
    return format_named("bnb4").dequantize(layer).double()


def outputs(model):
    with torch.no_grad():
        return model(X).double() - model[0].bias.double()


@BNB
def test_keep_leaves_every_byte_and_a_fixed_rotation_in_front():
    result, before, wanted, stored = quantized("keep")
    model = result.program.model
    assert said(result) == {"0": ("kept", "", False)}
    assert torch.equal(model[0].weight.data, stored)
    assert [n for n, _ in model.named_buffers()] == ["0.oft.frozen.blocks"]
    assert rel(outputs(model), X.double() @ wanted.T) < 1e-6
    assert rel(wanted, before) > 0.1


@BNB
def test_float_is_dense_algebra_in_a_float_layer():
    result, _, wanted, _ = quantized("float")
    model = result.program.model
    assert said(result) == {"0": ("dequantized", "", False)}
    assert type(model[0]) is nn.Linear
    assert model[0].weight.dtype == torch.float32
    assert rel(model[0].weight, wanted) < 1e-6
    assert rel(outputs(model), X.double() @ wanted.T) < 1e-6
    assert [s.format for s in result.program.sites] == ["dense"]


@BNB
def test_requantize_is_no_worse_than_the_packages_own_rounding():
    import bitsandbytes

    result, _, wanted, stored = quantized("requantize")
    layer = result.program.model[0]
    assert said(result) == {"0": ("requantized", "", False)}
    assert not torch.equal(layer.weight.data, stored)
    codes, state = bitsandbytes.functional.quantize_4bit(wanted.float(), blocksize=64, quant_type="nf4")
    theirs = rel(bitsandbytes.functional.dequantize_4bit(codes, state), wanted)
    assert 0.02 < rel(read(layer), wanted) <= theirs


@BNB
def test_calibrate_keeps_the_outputs_on_what_the_layer_reads():
    inputs = torch.randn(960, 64, generator=torch.Generator().manual_seed(5)) @ torch.randn(64, 64).tril()
    errors = {}
    for policy in ("requantize", "calibrate"):
        torch.manual_seed(0)
        result, _, wanted, _ = quantized(policy, calibration=[(inputs[:320],), (inputs[320:],)])
        got, exact = (inputs.double() @ w.T for w in (read(result.program.model[0]), wanted))
        errors[policy] = rel(got, exact)
    assert said(result) == {"0": ("calibrated", "", False)}
    assert errors["calibrate"] < 0.7 * errors["requantize"]


@BNB
def test_a_policy_may_be_a_function_of_the_site_or_a_budget():
    seen = []
    result, *_ = quantized(lambda site: seen.append((site.fqn, site.format)) or "float")
    assert seen == [("0", "bnb4")]
    assert said(result)["0"][0] == "dequantized"
    for error, action in ((0.5, "requantized"), (1e-6, "kept")):
        result, *_ = quantized(Budget(error=error, policies=("requantize", "keep")))
        assert said(result)["0"][0] == action


# Refusals.


@BNB
@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("calibrate", "0: policy 'calibrate' needs calibration=, an iterable of model inputs"),
        ("reference", "0: policy 'reference' needs reference=, the original float model"),
        ("nearest", "quantized: .*nearest"),
        (lambda site: "nearest", r"quantized\(Site 0\): .*nearest"),
    ],
    ids=["no calibration", "no reference", "unknown", "unknown by function"],
)
def test_a_policy_without_what_it_needs_is_refused_before_anything_changes(policy, message):
    model = nn.Sequential(format_named("bnb4").make_tiny(64, 10), nn.Linear(10, 6))
    program = rotated(model, [Rule("0", OFT(16)), Rule("1", OFT(5))])
    fill(model)
    before = program.fingerprint()
    with pytest.raises(FoldError, match=message):
        run(program, FoldRotations(policy))
    assert program.fingerprint() == before


def test_a_rotation_that_is_not_finite_is_refused_by_name():
    program = rotated(nn.Sequential(nn.Linear(6, 5)), [Rule("0", OFT(3))])
    fill(program.model)
    program.model[0].oft.default.skew.data[1, 0] = torch.inf
    with pytest.raises(FoldError, match="0: the rotated weight is not finite; look at the adapter's values there"):
        run(program, FoldRotations())


def test_a_layer_that_never_ran_beside_others_that_did_is_remarked():
    program = rotated(Awkward(), [Rule("q", OFT(4)), Rule("never", OFT(5))], IDS)
    fill(program.model)
    with torch.no_grad():
        program.model(IDS)
    with pytest.warns(OftfxWarning, match="never: this layer has never been called while others have"):
        result = run(program, FoldRotations())
    assert said(result)["q"] == ("folded", "", False)
    assert said(result)["never"][1].startswith("this layer has never been called while others have")


def test_the_post_condition_names_a_rotation_that_is_left():
    class Forgets(FoldRotations):
        def run(self, program):
            return PassResult(program, False)

    program = rotated(Awkward(), RULES, IDS)
    with pytest.raises(
        PassError, match=r"pass fold_rotations: post-condition failed: emb\.oft\.default was not folded"
    ):
        run(program, Forgets())


def test_it_has_to_come_after_the_rotations():
    program = run(program_of(Awkward(), IDS), MatchRules(RULES), ShareInputs()).program
    with pytest.raises(PassError, match="pass fold_rotations has to run after insert_rotations"):
        run(program, FoldRotations(), InsertRotations())
