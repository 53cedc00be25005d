"""Training through the fold: what is computed, what trains, and that the fold writes just that."""

import copy
import pickle

import pytest
import torch
import torch.nn as nn

import oftfx
from oftfx import OFT
from oftfx.adapter.fingerprint import fingerprint
from oftfx.errors import AdapterError, AdapterFileError, FoldError, OftfxWarning
from oftfx.formats import format_of
from oftfx.placement.find import rotated_sites
from tests.quantized import quantize
from tests.reference import randomize, rel

BNB = pytest.mark.needs("bitsandbytes")
KINDS = [
    pytest.param(kind, marks=pytest.mark.needs(package))
    for kind, package in (("bnb4", "bitsandbytes"), ("hqq", "hqq"), ("gptq", "gptqmodel"), ("torchao", "torchao"))
]
X = torch.randn(40, 64, generator=torch.Generator().manual_seed(1))


def rotated(kind="bnb4", std=0.05, **spec):
    torch.manual_seed(0)
    layers = [nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 32)]
    model = nn.Sequential(*(quantize(m, kind) if isinstance(m, nn.Linear) else m for m in layers))
    return randomize(oftfx.transform(model, {"*": OFT(16, **spec)}), std=std)


def data(count=8, seed=2):
    return list(torch.randn(count, 40, 64, generator=torch.Generator().manual_seed(seed)).split(1))


def batches(count=8, seed=2):
    return [(x[0],) for x in data(count, seed)]


def coded(model):
    return {fqn: p.fold_in_effect().coded() for fqn, p in rotated_sites(model)}


def same(a, b):
    parts = (a.codes, b.codes), (a.scale, b.scale), (a.zero, b.zero)
    return all((x is None and y is None) or torch.equal(x, y) for x, y in parts)


def stored(model):
    return {n: format_of(m).codes(m) for n, m in model.named_children() if not isinstance(m, nn.Tanh)}


def step(model, rate=1e-3):
    optimizer = torch.optim.Adam(oftfx.adapter_parameters(model), lr=rate)
    model.train()
    loss = model(X).square().mean()
    loss.backward()
    optimizer.step()
    model.eval()
    return float(loss.detach())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["requantize", "calibrate"])
def test_the_fold_is_what_was_trained_to_the_bit(kind, how):
    model = rotated(kind)
    oftfx.fold_aware(model, how, calibration=batches() if how == "calibrate" else None)
    for _ in range(3):
        step(model)
    computed, now = coded(model), model(X).detach()
    folded = oftfx.fold(model)
    assert [s.action for s in folded.report] == ["as trained"] * 2
    assert [s.relative_error for s in folded.report] == [0.0, 0.0]
    for name, codes in stored(folded.model).items():
        assert same(codes, computed[name]), name
    assert rel(folded.model(X), now) < (1e-5 if kind == "bnb4" else 5e-3)  # by the package's own product
    again = oftfx.unfold(folded)
    assert all(same(a, b) for a, b in zip(coded(again).values(), computed.values(), strict=True))


@BNB
def test_requantize_computes_with_what_a_plain_fold_writes():
    model = rotated()
    plain = oftfx.fold(model, quantized="requantize").model
    oftfx.fold_aware(model, "requantize")
    assert all(same(a, b) for a, b in zip(coded(model).values(), stored(plain).values(), strict=True))
    assert rel(model(X), plain(X)) < 1e-6


def straight_through(folded, rotation):
    """The folded weight, with the gradient of a rotation in front of what it is without it."""
    again = (folded @ rotation.detach()) @ rotation.T
    return again + (folded - again).detach()


@BNB
def test_gradients_go_straight_through_to_the_rotation():
    """Those of a rotation before the weight that is in effect, turned back, by float64 autograd."""
    model = rotated().train()
    oftfx.fold_aware(model, "requantize")
    x = X.clone().requires_grad_()
    model(x).square().sum().backward()
    skews = [model[i].oft.default.skew for i in (0, 2)]
    y, leaves = X.double().requires_grad_(), []
    inputs = y
    hidden = y
    for index, skew in zip((0, 2), skews, strict=True):
        layer, weight_format = model[index], format_of(model[index])
        leaf = skew.detach().double().requires_grad_()
        leaves.append(leaf)
        rounded = weight_format.grid(layer).values(coded(model)[str(index)]).double()
        rotation = torch.block_diag(*layer.oft.default.formula(leaf))
        hidden = hidden @ straight_through(rounded, rotation).T + layer.bias.double()
        hidden = hidden.tanh() if index == 0 else hidden
    hidden.square().sum().backward()
    assert rel(x.grad, inputs.grad) < 1e-5
    for skew, leaf in zip(skews, leaves, strict=True):
        assert rel(skew.grad, leaf.grad) < 1e-4


@BNB
@pytest.mark.parametrize("sizes", [(16, 16), (16, 8), (8, 16, 16)], ids=str)
def test_gradients_of_several_adapters_are_those_of_autograd(sizes):
    torch.manual_seed(0)
    model = oftfx.transform(nn.Sequential(quantize(nn.Linear(64, 96))), {"*": OFT(sizes[0], init="normal")})
    names = ["default", *(f"a{i}" for i in range(1, len(sizes)))]
    for name, size in zip(names[1:], sizes[1:], strict=True):
        oftfx.add_adapter(model, name, {"*": OFT(size, init="normal")})
    oftfx.set_adapter(model, names, trainable=True)
    oftfx.fold_aware(model, "requantize")
    layer = model.train()[0]
    model(X).square().sum().backward()
    rotations = [getattr(layer.oft, name) for name in names]
    leaves = [r.skew.detach().double().requires_grad_() for r in rotations]
    whole = torch.eye(64, dtype=torch.float64)
    for rotation, leaf in zip(rotations, leaves, strict=True):
        whole = whole @ torch.block_diag(*rotation.formula(leaf))
    rounded = format_of(layer).grid(layer).values(coded(model)["0"]).double()
    (X.double() @ straight_through(rounded, whole).T + layer.bias.double()).square().sum().backward()
    for rotation, leaf in zip(rotations, leaves, strict=True):
        assert rel(rotation.skew.grad, leaf.grad) < 1e-4


@BNB
def test_gradients_of_scales_are_those_of_the_weight():
    model = rotated().train()
    oftfx.fold_aware(model, "calibrate", calibration=batches())
    model(X).square().sum().backward()
    hidden, leaves = X.double(), []
    for index in (0, 2):
        layer, codes = model[index], coded(model)[str(index)]
        leaf = torch.zeros_like(codes.scale, dtype=torch.float64, requires_grad=True)
        leaves.append(leaf)
        levels = layer.weight.quant_state.code.double()[codes.codes.long()].reshape(-1, 64)
        weight = (levels * (codes.scale.double() * torch.exp(4 * leaf)).unsqueeze(1)).view(codes.codes.shape)
        hidden = hidden @ weight.T + layer.bias.double()
        hidden = hidden.tanh() if index == 0 else hidden
    hidden.square().sum().backward()
    for index, leaf in zip((0, 2), leaves, strict=True):
        (shift,) = (p for n, p in model[index].named_parameters() if n.endswith("shift"))
        assert rel(shift.grad, leaf.grad) < 1e-5
        assert model[index].oft.default.skew.grad is None


@BNB
def test_scales_train_while_the_unfolded_adapter_stays_what_it_was():
    model = rotated()
    unfolded = model(X).detach()
    with oftfx.fold_aware(model, "calibrate", calibration=batches()) as aware:
        assert aware.sites == 2
        trains = [n for n, p in model.named_parameters() if p.requires_grad]
        assert trains == ["0.oft._fold.default.shift", "2.oft._fold.default.shift"]
        losses = [step(model, 3e-3) for _ in range(30)]
        assert losses[-1] < 0.95 * losses[0]
    assert torch.equal(model(X), unfolded)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [f"{i}.oft.default.skew" for i in (0, 2)]


@BNB
def test_distilling_brings_the_fold_nearer_on_fresh_inputs():
    model, fresh = rotated(std=0.02), torch.cat([b[0] for b in batches(16, seed=9)])
    wanted, cal = model(fresh), batches(24)
    plain = oftfx.fold(model, quantized="calibrate", calibration=cal)
    better = oftfx.fold(model, quantized="calibrate", calibration=cal, distil=30)
    assert {s.action for s in better.report} == {"calibrated, distilled"}
    assert "scales of 2 sites distilled" in str(better.report)
    assert rel(better.model(fresh), wanted) < 0.97 * rel(plain.model(fresh), wanted)
    assert torch.equal(model(fresh), wanted)
    assert torch.equal(oftfx.unfold(better)(fresh), wanted)
    again = copy.deepcopy(model)
    oftfx.fold(again, quantized="calibrate", calibration=cal, distil=30, inplace=True)
    assert torch.equal(again(fresh), better.model(fresh))


@BNB
def test_reference_rounds_the_turned_original():
    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 32))
    model = rotated()
    plain = oftfx.fold(model, quantized="reference", reference=original).model
    oftfx.fold_aware(model, "reference", reference=original)
    assert all(same(a, b) for a, b in zip(coded(model).values(), stored(plain).values(), strict=True))
    step(model)
    computed = coded(model)
    assert all(same(a, b) for a, b in zip(stored(oftfx.fold(model).model).values(), computed.values(), strict=True))


@BNB
def test_each_adapter_has_its_own_fold_and_others_rotate():
    model = rotated()
    first = model(X).detach()
    oftfx.add_adapter(model, "second", {"*": OFT(8, init="normal")})
    oftfx.set_adapter(model, "second")
    second = model(X).detach()
    oftfx.fold_aware(model, "calibrate", calibration=batches())
    assert not torch.equal(model(X), second)
    aware = model(X).detach()
    oftfx.set_adapter(model, "default")
    assert torch.equal(model(X), first)
    oftfx.fold_aware(model, "requantize")
    assert not torch.equal(model(X), first)
    oftfx.set_adapter(model, "second")
    assert torch.equal(model(X), aware)
    oftfx.set_adapter(model, "default")
    oftfx.remove_adapter(model, "second")
    oftfx.fold_aware(model, None)
    assert torch.equal(model(X), first)
    assert "forward" not in vars(model[0])


@BNB
@pytest.mark.parametrize("how", ["requantize", "calibrate"])
def test_copies_pickles_and_states_carry_it(how):
    model = rotated()
    oftfx.fold_aware(model, how, calibration=batches() if how == "calibrate" else None)
    step(model)
    now = model(X).detach()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(X), now)
        step(other, 0.05)
        assert not torch.equal(other(X), now)
        assert torch.equal(model(X), now)
        other.load_state_dict({k: v for k, v in model.state_dict().items() if ".oft." in k}, strict=False)
        assert torch.equal(other(X), now)


@BNB
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_goes_on_with_its_scales(kind, tmp_path):
    model = rotated(kind)
    oftfx.fold_aware(model, "calibrate", calibration=batches())
    for _ in range(2):
        step(model)
    before, files = coded(model), oftfx.save_adapter(model, tmp_path / "adapter")
    assert (files / "oftfx_scales.safetensors").exists()
    with pytest.raises(AdapterError, match="scales that were trained for a fold.*no place for them"):
        oftfx.save_adapter(model, tmp_path / "a.safetensors", convention="oft_v2")
    other = rotated(kind, std=0.5)
    oftfx.load_adapter(other, files, trainable=True)
    assert oftfx.fold_aware(other, "calibrate", calibration=files).sites == 2
    assert all(same(a, b) for a, b in zip(coded(other).values(), before.values(), strict=True))
    folded = oftfx.fold(other)
    assert all(same(a, b) for a, b in zip(stored(folded.model).values(), before.values(), strict=True))
    step(model), step(other)
    assert all(rel(a.scale, b.scale) < 1e-6 for a, b in zip(coded(other).values(), coded(model).values(), strict=True))
    oftfx.fold_aware(model, None)
    oftfx.save_adapter(model, files)  # one set of files: the scales of the old one are gone
    assert not (files / "oftfx_scales.safetensors").exists()
    with pytest.raises(AdapterFileError, match="oftfx_scales.safetensors"):
        oftfx.fold_aware(model, "calibrate", calibration=files)


@BNB
def test_scales_of_another_model_are_refused(tmp_path, monkeypatch):
    model = rotated()
    oftfx.fold_aware(model, "calibrate", calibration=batches())
    files = oftfx.save_adapter(model, tmp_path / "adapter")
    torch.manual_seed(0)
    narrow = nn.Sequential(quantize(nn.Linear(64, 64), "bnb4"), nn.Tanh(), quantize(nn.Linear(64, 32), "bnb4"))
    narrow = oftfx.transform(narrow, {"*": OFT(16)})
    with pytest.raises(AdapterFileError, match="made for other values than adapter 'default' has"):
        oftfx.fold_aware(narrow, "calibrate", calibration=files)
    monkeypatch.setattr("oftfx.adapter.scales.fingerprint", lambda *_: fingerprint(model))
    with pytest.raises(AdapterFileError, match=r"0 does not fit this layer: packed is torch.uint8 \(3072,\)"):
        oftfx.fold_aware(narrow, "calibrate", calibration=files)
    assert all(p.fold_in_effect() is None for _, p in rotated_sites(narrow))


@BNB
def test_layers_are_called_by_any_name_of_their_input():
    model = rotated()
    layer, unfolded = model[0], model[0](X).detach()
    oftfx.fold_aware(model, "requantize")
    aware = layer(X).detach()
    assert not torch.equal(aware, unfolded)
    assert torch.equal(layer(x=X), aware)
    with oftfx.disable_adapters(model):
        base = layer(X).detach()
        assert torch.equal(layer(x=X), base)
    oftfx.add_adapter(model, "other", {"*": OFT(8, init="normal")})
    oftfx.set_adapter(model, "other")  # rotates as always
    assert torch.equal(layer(x=X), layer(X))


@BNB
@pytest.mark.parametrize("interrupted", [ValueError, KeyboardInterrupt])
def test_nothing_half_trained_stays(interrupted):
    model = rotated()
    before = model(X).detach()

    def progress(done, every):
        if every == 3 * 7 and done == 9:  # of the distillation: seven of eight batches, three passes
            raise interrupted("stop")

    for how in (None, "requantize"):
        if how:
            oftfx.fold_aware(model, how)
            before = model(X).detach()
        with pytest.raises(interrupted):
            oftfx.fold_aware(model, "calibrate", calibration=batches(), distil=3, progress=progress)
        assert torch.equal(model(X), before)
        assert [n for n, p in model.named_parameters() if p.requires_grad] == [f"{i}.oft.default.skew" for i in (0, 2)]


@BNB
def test_scales_that_were_trained_under_an_identity_are_folded():
    model = rotated()
    oftfx.fold_aware(model, "calibrate", calibration=batches())
    step(model, 0.02)
    with torch.no_grad():
        model[0].oft.default.skew.zero_()
    computed = coded(model)
    folded = oftfx.fold(model)
    assert [s.action for s in folded.report] == ["as trained"] * 2
    assert all(same(c, computed[n]) for n, c in stored(folded.model).items())


@BNB
def test_a_layer_without_inputs_is_fold_aware_too():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (quantize(nn.Linear(64, 32), "bnb4") for _ in range(2))

        def forward(self, x):
            return self.a(x) if x.sum() > -1e9 else self.b(x)

    model = randomize(oftfx.transform(Gated(), {"*": OFT(16)}), std=0.05)
    with pytest.warns(OftfxWarning, match="no calibration input reached this layer"):
        assert oftfx.fold_aware(model, "calibrate", calibration=batches()).sites == 2
    assert {s.action for s in oftfx.fold(model).report} == {"as trained"}


@BNB
def test_distilling_towards_nothing_or_nan_is_refused():
    class Nothing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = quantize(nn.Linear(64, 32), "bnb4")

        def forward(self, x):
            return self.layer(x).argmax(-1)

    model = randomize(oftfx.transform(Nothing(), {"*": OFT(16)}), std=0.05)
    with pytest.raises(FoldError, match="no float tensor to learn from"):
        oftfx.fold(model, quantized="calibrate", calibration=batches(), distil=1)
    model = rotated()
    model.append(Root())
    with pytest.raises(FoldError, match="a number that is not finite"):
        oftfx.fold(model, quantized="calibrate", calibration=batches(), distil=1)


class Root(nn.Module):
    def forward(self, x):
        return x.sqrt()


@BNB
@pytest.mark.parametrize("how", ["requantize", "calibrate"])
def test_under_autocast_checkpointing_and_a_compiler(how):
    from torch.utils.checkpoint import checkpoint

    model = rotated().train()
    oftfx.fold_aware(model, how, calibration=batches() if how == "calibrate" else None)

    def grads(run):
        model.zero_grad()
        run().float().square().mean().backward()
        return torch.cat([p.grad.flatten() for p in oftfx.adapter_parameters(model)])

    wanted = grads(lambda: model(X))
    assert rel(grads(lambda: checkpoint(model, X, use_reentrant=False)), wanted) < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        low = grads(lambda: model(X))
    assert 0 < rel(low, wanted) < 0.05
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert rel(grads(lambda: compiled(X)), wanted) < 1e-5


@BNB
def test_several_adapters_train_under_autocast_with_the_codes_that_are_folded():
    model = rotated()
    oftfx.add_adapter(model, "second", {"*": OFT(16, init="normal")})
    oftfx.set_adapter(model, ["default", "second"])
    oftfx.fold_aware(model, "requantize")
    wanted = coded(model.train())
    with torch.autocast("cpu", torch.bfloat16):
        assert all(same(codes, wanted[fqn]) for fqn, codes in coded(model).items())
    folded = stored(oftfx.fold(model).model)
    assert all(same(codes, wanted[fqn]) for fqn, codes in folded.items())


@BNB
def test_an_explicit_policy_folds_the_rotations_and_leaves_the_model_fold_aware():
    model = rotated()
    plain = oftfx.fold(model, quantized="float").model(X)
    oftfx.fold_aware(model, "requantize")
    aware = model(X).detach()
    result = oftfx.fold(model, quantized="float", calibration=[(X,)])
    assert torch.equal(result.model(X), plain)
    assert result.report.output_error < 1e-5  # against the rotations
    assert torch.equal(model(X), aware)
    with pytest.raises(RuntimeError, match="full"):
        oftfx.fold(model, inplace=True, undo=True, progress=lambda done, _: failing(done))
    assert torch.equal(model(X), aware)


def failing(done):
    if done == 2:
        raise RuntimeError("full")


@BNB
def test_what_would_leave_it_out_is_refused(tmp_path):
    model = rotated()
    oftfx.fold_aware(model, "requantize")
    with pytest.raises(AdapterError, match="a graph of a fold-aware model: 0 computes"):
        oftfx.graph(model, (X,))
    with pytest.raises(AdapterError, match=r"an export .* oftfx.fold_aware\(model, None\)"):
        oftfx.export_onnx(model, tmp_path / "m.onnx", (X,))
    with pytest.raises(AdapterError, match="a fold into producers of a fold-aware model"):
        oftfx.fold(model, into="producer")


@BNB
def test_new_values_do_not_come_under_old_codes(tmp_path):
    model = rotated()
    files = oftfx.save_adapter(rotated(std=0.1), tmp_path / "adapter")
    oftfx.fold_aware(model, "calibrate", calibration=batches())
    now = model(X).detach()
    with pytest.raises(AdapterError, match="codes that were made for its present values"):
        oftfx.load_adapter(model, files)
    assert torch.equal(model(X), now)
    oftfx.fold_aware(model, None)
    oftfx.fold_aware(model, "requantize")
    before = model(X).detach()
    oftfx.load_adapter(model, files)  # rounded anew
    assert not torch.equal(model(X), before)


@BNB
@pytest.mark.parametrize(
    ("how", "options", "message"),
    [
        ("round", {}, "got 'round', expected None or one of requantize, reference, calibrate"),
        ("calibrate", {}, "'calibrate' needs calibration="),
        ("reference", {}, "do not go together"),
        ("requantize", {"distil": 2}, "distil trains the scales of 'calibrate'"),
    ],
)
def test_refusals(how, options, message):
    with pytest.raises(FoldError, match=message):
        oftfx.fold_aware(rotated(), how, **options)


@BNB
def test_sites_that_cannot_are_refused_before_anything_changes():
    with pytest.raises(FoldError, match=r"0 \(bnb4\) cannot be trained through its fold: its rotation drops blocks"):
        oftfx.fold_aware(rotated(dropout=0.5), "requantize")
    plain = oftfx.transform(nn.Sequential(nn.Linear(8, 8)), {"*": OFT(4)})
    with pytest.raises(FoldError, match="float ones fold exactly"):
        oftfx.fold_aware(plain, "requantize")
    model = rotated()
    oftfx.set_adapter(model, None)
    with pytest.raises(AdapterError, match="no adapter is active"):
        oftfx.fold_aware(model, "requantize")


@BNB
@pytest.mark.parametrize("distil", [0, 2])
def test_an_identity_has_no_scales_to_train(distil):
    torch.manual_seed(0)
    model = oftfx.transform(nn.Sequential(quantize(nn.Linear(64, 32))), {"*": OFT(16)})
    with pytest.raises(FoldError, match="exactly the identity"):
        oftfx.fold_aware(model, "calibrate", calibration=batches(), distil=distil)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fold_that_is_there_is_where_scales_start(kind):
    model = rotated(kind)
    folded = oftfx.fold(model, quantized="calibrate", calibration=batches())
    assert oftfx.fold_aware(model, "calibrate", calibration=folded).sites == 2
    assert all(same(a, b) for a, b in zip(coded(model).values(), stored(folded.model).values(), strict=True))
    other = rotated(kind)
    oftfx.fold_aware(other, "calibrate", calibration=batches())
    assert all(same(a, b) for a, b in zip(coded(model).values(), coded(other).values(), strict=True))
    assert step(model) == step(other)
    with pytest.raises(FoldError, match="distil"):
        oftfx.fold_aware(model, "calibrate", calibration=folded, distil=2)
    oftfx.fold_aware(model, None)
    again = oftfx.fold(other)  # what was trained can be gone on from as well
    assert oftfx.fold_aware(model, "calibrate", calibration=again).sites == 2
    oftfx.fold_aware(model, None)
    other = copy.deepcopy(model)
    weight_format = format_of(other[2])
    weight_format.write(other[2], weight_format.requantize(2 * weight_format.dequantize(other[2]), other[2]))
    with pytest.raises(FoldError, match="2 has another weight than the model that was folded"):
        oftfx.fold_aware(other, "calibrate", calibration=folded)
    kept = oftfx.fold(model, quantized="calibrate", calibration=batches(), undo=False)
    with pytest.raises(FoldError, match="kept nothing of the model before it"):
        oftfx.fold_aware(model, "calibrate", calibration=kept)
    before = model(X).detach()
    with torch.no_grad():
        model[0].oft.default.skew.mul_(1.01)
    with pytest.raises(FoldError, match="of other values, than default has now"):
        oftfx.fold_aware(model, "calibrate", calibration=folded)
    assert not torch.equal(model(X), before)  # the rotations act
