import json
import weakref

import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st

import oftfx
from oftfx import OFT
from oftfx.errors import AdapterError, FoldError
from tests.reference import dense_rotation, randomize, rel

BOUNDS = {torch.float64: 1e-14, torch.float32: 2e-7, torch.float16: 5e-4, torch.bfloat16: 4e-3}


@settings(deadline=None, max_examples=30)
@given(
    out=st.integers(1, 20),
    blocks=st.integers(1, 5),
    size=st.integers(1, 7),
    bias=st.booleans(),
    dtype=st.sampled_from(list(BOUNDS)),
    parameterization=st.sampled_from(["cayley", "cayley_neumann"]),
)
def test_a_folded_linear_is_the_dense_product_rounded_once(out, blocks, size, bias, dtype, parameterization):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(blocks * size, out, bias=bias).to(dtype))
    model = randomize(oftfx.transform(base, {"0": OFT(size, parameterization=parameterization)}), std=0.1)
    rotation = dense_rotation(model[0].oft.default.skew, size, parameterization=parameterization)
    result = oftfx.fold(model)
    folded = result.model[0]
    expected = base[0].weight.double() @ rotation.T
    assert type(folded) is nn.Linear
    assert folded.weight.dtype == dtype
    assert list(folded.state_dict()) == list(base[0].state_dict())
    assert rel(folded.weight, expected) < BOUNDS[dtype]
    assert folded.bias is None or folded.bias.data_ptr() == base[0].bias.data_ptr()


@pytest.mark.needs("transformers")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 3e-2)])
def test_a_folded_model_equals_the_unfolded_one(tiny_llama, ids, dtype, bound):
    base = tiny_llama().to(dtype)
    model = randomize(oftfx.transform(base, {"all-linear": OFT(16, share_input=True)}))
    before = {n: p.clone() for n, p in base.named_parameters()}
    result = oftfx.fold(model, calibration=[ids()])
    assert rel(result.model(**ids()).logits, model(**ids()).logits) < bound
    assert rel(result.model(**ids()).logits, base(**ids()).logits) > 0.1
    assert list(result.model.state_dict()) == list(base.state_dict())
    assert not any(m._forward_pre_hooks for m in result.model.modules())
    assert all(torch.equal(p, before[n]) for n, p in base.named_parameters())
    assert result.report.output_error < bound
    assert {s.action for s in result.report} == {"folded"}


@pytest.mark.needs("transformers")
@pytest.mark.parametrize("inplace", [False, True])
def test_unfold_restores_bytes_and_rotations(tiny_llama, ids, inplace):
    model = randomize(oftfx.transform(tiny_llama(), {"all-linear": OFT(16, share_input=True)}))
    expected = model(**ids()).logits
    state = {k: v.clone() for k, v in model.state_dict().items()}
    result = oftfx.fold(model, inplace=inplace, undo=True)
    assert (result.model is model) == inplace
    folded = result.model(**ids()).logits
    again = oftfx.unfold(result)
    assert (again is model) == inplace
    assert list(again.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in again.state_dict().items())
    assert torch.equal(again(**ids()).logits, expected)
    assert oftfx.active_adapters(again) == ("default",)
    if not inplace:
        assert torch.equal(result.model(**ids()).logits, folded)
    assert torch.equal(oftfx.fold(again).model(**ids()).logits, folded)


def test_two_adapters_fold_in_the_order_they_act():
    base = nn.Sequential(nn.Linear(12, 5, dtype=torch.float64))
    model = oftfx.transform(base, {"0": OFT(4)}, adapter="a")
    oftfx.add_adapter(model, "b", {"0": OFT(6)})
    oftfx.add_adapter(model, "c", {"0": OFT(6)})
    oftfx.set_adapter(model, ["a", "b", "c"])
    randomize(model, std=0.3)
    x = torch.randn(3, 12, dtype=torch.float64)
    r1 = dense_rotation(model[0].oft.a.skew, 4)
    r2, r3 = (dense_rotation(getattr(model[0].oft, n).skew, 6) for n in "bc")
    expected = x @ r1 @ r2 @ r3 @ base[0].weight.T + base[0].bias
    assert rel(model(x), expected) < 1e-13
    assert rel(oftfx.fold(model).model(x), expected) < 1e-13
    reverse = x @ r2 @ r1 @ base[0].weight.T + base[0].bias
    result = oftfx.fold(model, adapter=["b", "a"])
    assert rel(result.model(x), reverse) < 1e-13
    assert rel(reverse, x @ r1 @ r2 @ base[0].weight.T + base[0].bias) > 1e-3
    assert result.report.dropped == ("c",)
    assert oftfx.active_adapters(model) == ("a", "b", "c")


def test_identity_rotations_touch_nothing():
    base = nn.Sequential(nn.Linear(12, 5), nn.Linear(5, 3))
    model = oftfx.transform(base, {"0": OFT(4), "1": OFT(5)})
    with torch.no_grad():
        model[1].oft.default.skew.fill_(0.1)
    result = oftfx.fold(model)
    assert [s.action for s in result.report] == ["untouched", "folded"]
    assert result.model[0].weight.data_ptr() == base[0].weight.data_ptr()


@pytest.mark.needs("transformers")
def test_folding_a_tied_head_leaves_the_embedding_alone(tiny_llama, ids, tmp_path):
    base = tiny_llama(tie_word_embeddings=True)
    model = randomize(oftfx.transform(base, {"lm_head": OFT(16)}))
    assert "shared with model.embed_tokens.weight" in oftfx.adapters(model)["default"]["lm_head"].notes[0]
    result = oftfx.fold(model)
    folded = result.model
    assert torch.equal(folded.model.embed_tokens.weight, base.model.embed_tokens.weight)
    assert not torch.equal(folded.lm_head.weight, base.lm_head.weight)
    assert rel(folded(**ids()).logits, model(**ids()).logits) < 1e-6
    assert "its own" in next(iter(result.report)).note
    folded.save_pretrained(tmp_path)
    again = type(folded).from_pretrained(tmp_path).eval()
    assert torch.equal(again(**ids()).logits, folded(**ids()).logits)
    assert base.config.tie_word_embeddings


def test_a_weight_of_zeros_folds_to_zeros():
    base = nn.Sequential(nn.Linear(12, 5))
    nn.init.zeros_(base[0].weight)
    result = oftfx.fold(randomize(oftfx.transform(base, {"0": OFT(4)})))
    assert not result.model[0].weight.any()
    assert next(iter(result.report)).update == 0.0


def test_dropout_does_not_reach_the_fold():
    model = randomize(oftfx.transform(nn.Sequential(nn.Linear(40, 5)), {"0": OFT(4, dropout=0.9)})).train()
    x = torch.randn(3, 40)
    folded = oftfx.fold(model).model
    assert rel(folded(x), model.eval()(x)) < 1e-6


def test_the_report_in_every_form(tmp_path):
    model = randomize(oftfx.transform(nn.Sequential(nn.Linear(12, 5), nn.Linear(5, 4)), {"0": OFT(4), "1": OFT(5)}))
    seen = []
    report = oftfx.fold(model, calibration=[(torch.randn(2, 12),)], progress=lambda *a: seen.append(a)).report
    assert seen == [(1, 2), (2, 2)]
    assert len(report) == 2
    data = json.loads(report.to_json())
    assert [s["fqn"] for s in data["sites"]] == ["0", "1"]
    assert data["survival"] == pytest.approx(1.0, abs=1e-6)
    update = data["sites"][0]["update"]
    weight = model[0].weight.double()
    assert update == pytest.approx(rel(weight @ dense_rotation(model[0].oft.default.skew, 4).T, weight), rel=1e-5)
    assert "folded default into 2 sites: 2 folded" in str(report)
    assert report.table().count("folded") >= 3
    report.to_html(tmp_path / "r.html")
    assert "100.0% of its effect on the model&#39;s outputs is kept" in (tmp_path / "r.html").read_text()


def test_faults():
    base = nn.Sequential(nn.Linear(12, 5))
    with pytest.raises(AdapterError, match="Sequential has no adapters"):
        oftfx.fold(base)
    model = randomize(oftfx.transform(base, {"0": OFT(4)}))
    with pytest.raises(AdapterError, match="no adapter 'defautl'; the model has default. Did you mean 'default'"):
        oftfx.fold(model, adapter="defautl")
    with pytest.raises(FoldError, match="got 'exact', expected a Budget or one of keep, requantize, calibrate"):
        oftfx.fold(model, quantized="exact")
    with pytest.raises(FoldError, match=r"quantized\(Site 0\): got 'calibrated', expected a Budget or one of keep"):
        oftfx.fold(model, quantized=lambda site: "calibrated")
    oftfx.set_adapter(model, None)
    with pytest.raises(AdapterError, match="no adapter is active"):
        oftfx.fold(model)


def test_a_fault_half_way_leaves_the_model_as_it_was():
    model = randomize(oftfx.transform(nn.Sequential(nn.Linear(12, 5), nn.Linear(5, 4)), {"0": OFT(4), "1": OFT(5)}))
    with torch.no_grad():
        model[1].oft.default.skew[0, 0] = torch.nan
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(FoldError, match="1: the rotated weight is not finite"):
        oftfx.fold(model, inplace=True, undo=True)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items() if "1.oft" not in k)
    assert oftfx.active_adapters(model) == ("default",)


class Squared(nn.Linear):
    """A subclass that does not compute x @ W^T."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight**2, self.bias)


class Scaled(nn.Linear):
    """A subclass with a forward of its own that does."""

    def forward(self, x):
        return 0.5 * nn.functional.linear(x, self.weight)


def test_layers_with_a_forward_of_their_own_are_verified():
    model = randomize(oftfx.transform(nn.Sequential(Squared(12, 5)), {"0": OFT(4)}))
    with pytest.raises(FoldError, match=r"0: a Squared has a forward of its own that does not compute x @ W\^T"):
        oftfx.fold(model)
    model = randomize(oftfx.transform(nn.Sequential(Scaled(12, 5)), {"0": OFT(4)}))
    x = torch.randn(3, 12)
    assert rel(oftfx.fold(model).model(x), model(x)) < 1e-6


def test_two_unfolds_of_one_result_are_independent():
    model = randomize(oftfx.transform(nn.Sequential(nn.Linear(12, 5), nn.Linear(5, 3)), {"0": OFT(4)}, train=["1"]))
    x, expected = torch.randn(3, 12), None
    expected = model(x)
    result = oftfx.fold(model)
    first, second = oftfx.unfold(result), oftfx.unfold(result)
    assert [n for n, p in first.named_parameters() if p.requires_grad] == ["0.oft.default.skew", "1.weight", "1.bias"]
    oftfx.remove_adapter(first, "default")
    oftfx.set_adapter(model, None)
    assert torch.equal(second(x), expected)
    assert oftfx.active_adapters(second) == ("default",)
    again = oftfx.unfold(oftfx.fold(second, inplace=True, undo=True))
    assert again is second
    assert [n for n, p in second.named_parameters() if p.requires_grad] == ["0.oft.default.skew", "1.weight", "1.bias"]
    assert torch.equal(second(x), expected)


def test_an_interrupted_fold_in_place_is_undone():
    model = randomize(oftfx.transform(nn.Sequential(nn.Linear(12, 5), nn.Linear(5, 4)), {"0": OFT(4), "1": OFT(5)}))
    x = torch.randn(3, 12)
    expected = model(x)

    def stop(done, _):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        oftfx.fold(model, inplace=True, undo=True, progress=stop)
    assert torch.equal(model(x), expected)
    with oftfx.disable_adapters(model):
        assert not torch.equal(model(x), expected)


def test_an_interrupted_fold_in_place_without_undo_computes_the_same_and_can_be_ended():
    model = randomize(oftfx.transform(nn.Sequential(nn.Linear(12, 5), nn.Linear(5, 4)), {"0": OFT(4), "1": OFT(5)}))
    x = torch.randn(3, 12)
    expected = model(x)

    def stop(done, _):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        oftfx.fold(model, inplace=True, progress=stop)
    assert "1 sites were folded when this happened" in caught.value.__notes__[0]
    assert not hasattr(model[0], "oft")
    assert hasattr(model[1], "oft")
    assert rel(model(x), expected) < 1e-6
    result = oftfx.fold(model, inplace=True)
    assert [s.fqn for s in result.report] == ["1"]
    assert rel(model(x), expected) < 1e-6
    with pytest.raises(FoldError, match="fold with undo=True to undo it"):
        oftfx.unfold(result)


@pytest.mark.parametrize("undo", [False, True])
def test_a_layer_that_is_refused_in_place_is_not_left_half_folded(undo):
    """Its weight is written before it is found not to compute x @ W^T."""
    model = nn.Sequential(nn.Linear(12, 6), Squared(6, 5))
    model = randomize(oftfx.transform(model, {"0": OFT(4), "1": OFT(3)}))
    x = torch.randn(3, 12)
    expected, weight = model(x), model[1].weight.clone()
    with pytest.raises(FoldError, match="1: a Squared has a forward of its own"):
        oftfx.fold(model, inplace=True, undo=undo)
    assert torch.equal(model[1].weight, weight)
    assert hasattr(model[1], "oft")
    assert hasattr(model[0], "oft") == undo
    assert rel(model(x), expected) < 1e-6
    assert [e.fqn for e in oftfx.adapters(model)["default"]] == (["0", "1"] if undo else ["1"])


def test_a_fold_into_producers_that_is_interrupted_leaves_an_adapter_that_says_what_it_rotates(monkeypatch):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 12)

        def forward(self, x):
            return self.b(self.a(x))

    x = torch.randn(3, 12)
    model = randomize(oftfx.transform(Two(), {"*": OFT(4)}, example_inputs=(x,)))
    expected = model(x)

    def stop(self, program):
        raise KeyboardInterrupt

    monkeypatch.setattr("oftfx.passes.fold_rotations.FoldRotations.run", stop)
    with pytest.raises(KeyboardInterrupt):
        oftfx.fold(model, into="producer", inplace=True)
    monkeypatch.undo()
    assert [e.fqn for e in oftfx.adapters(model)["default"]] == ["a"]
    assert rel(model(x), expected) < 1e-6
    oftfx.fold(model, inplace=True)
    assert rel(model(x), expected) < 1e-6


def test_a_fold_in_place_keeps_no_old_weight():
    model = randomize(oftfx.transform(nn.Sequential(nn.Linear(12, 5)), {"0": OFT(4)}))
    old = weakref.ref(model[0].weight)
    result = oftfx.fold(model, inplace=True)
    assert old() is None
    assert result.model is model
    kept = oftfx.transform(nn.Sequential(nn.Linear(12, 5)), {"0": OFT(4)}, inplace=True)
    old = weakref.ref(randomize(kept)[0].weight)
    result = oftfx.fold(kept, inplace=True, undo=True)
    assert old() is not None
    assert oftfx.unfold(result)[0].weight is old()


def test_bad_calibration_is_refused_and_changes_nothing():
    model = randomize(oftfx.transform(nn.Sequential(nn.Linear(12, 5)), {"0": OFT(4)}, adapter="a"))
    oftfx.add_adapter(model, "b", {"0": OFT(3)})
    for wrong in ({"x": torch.randn(2, 12)}, torch.randn(2, 12), [torch.randn(2, 12)]):
        with pytest.raises(FoldError, match="calibration: "):
            oftfx.fold(model, adapter="b", inplace=True, calibration=wrong)
    assert oftfx.active_adapters(model) == ("a",)
    with pytest.raises(AdapterError, match="named twice"):
        oftfx.fold(model, adapter=["a", "a"])


def test_casting_a_folded_model_leaves_the_original_alone():
    base = nn.Sequential(nn.Linear(12, 5), nn.Linear(5, 3)).requires_grad_(False)
    model = randomize(oftfx.transform(base, {"0": OFT(4)}))
    x = torch.randn(3, 12)
    expected = model(x)
    oftfx.fold(model).model.half()
    assert torch.equal(model(x), expected)
    model.double()
    assert base(x).dtype == torch.float32


def test_a_weight_that_overflows_its_dtype_is_refused():
    base = nn.Sequential(nn.Linear(2, 1, bias=False).half())
    nn.init.constant_(base[0].weight, 6e4)
    model = oftfx.transform(base, {"0": OFT(2, parameterization="cayley")})
    with torch.no_grad():
        model[0].oft.default.skew.fill_(-0.4)
    with pytest.raises(FoldError, match=r"0: the rotated weight overflows torch\.float16"):
        oftfx.fold(model)


def test_a_hook_that_would_see_another_input_is_reported():
    model = randomize(oftfx.transform(nn.Sequential(nn.Linear(12, 5)), {"0": OFT(4)}))
    model[0].register_forward_pre_hook(lambda module, args: None)
    with pytest.warns(oftfx.errors.OftfxWarning, match=r"0: 1 pre-hook\(s\) registered after the rotation"):
        report = oftfx.fold(model).report
    assert "pre-hook" in next(iter(report)).note


@pytest.mark.needs("transformers")
def test_unfolding_in_place_restores_the_tie(tiny_llama):
    model = randomize(oftfx.transform(tiny_llama(tie_word_embeddings=True), {"lm_head": OFT(16)}))
    ties = dict(model.all_tied_weights_keys)
    oftfx.unfold(oftfx.fold(model, inplace=True, undo=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings
    assert model.all_tied_weights_keys == ties


@pytest.mark.needs("rich")
def test_progress_is_shown_or_reported(capsys):
    model = randomize(oftfx.transform(nn.Sequential(nn.Linear(12, 5), nn.Linear(5, 4)), {"*": OFT(1)}))
    oftfx.fold(model, progress=True)
    assert "2/2" in capsys.readouterr().err
    seen = []
    oftfx.fold(model, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]
    oftfx.fold(model)
    assert capsys.readouterr().err == ""
