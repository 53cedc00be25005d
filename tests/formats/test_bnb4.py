import copy

import pytest
import torch
import torch.nn as nn

import oftfx
from oftfx import OFT
from oftfx.errors import OftfxWarning, RuleError
from oftfx.formats.bnb4 import make_linear4bit
from oftfx.formats.registry import format_named
from tests.reference import dense_rotation, randomize, rel

pytestmark = pytest.mark.needs("bitsandbytes")
bnb = pytest.importorskip("bitsandbytes")
BNB4 = format_named("bnb4")

KINDS = [
    {"quant_type": t, "double_quant": d, "quant_storage": s}
    for t in ("nf4", "fp4")
    for d in (False, True)
    for s in (torch.uint8, torch.bfloat16)
]
packs = pytest.mark.skipif(not bnb.functional.has_avx512bf16(), reason="this CPU's bitsandbytes does not repack")


def bytes_of(layer):
    return layer.weight.data.view(torch.uint8).flatten().clone()


def official(layer):
    return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", [(256, 128), (320, 192), (100, 30), (5, 7)], ids=str)
def test_dequantize_equals_the_packages_own(kind, shape):
    layer = make_linear4bit(nn.Linear(*shape), **kind)
    assert torch.equal(BNB4.dequantize(layer), official(layer))
    state = BNB4.requantize(official(layer), layer)
    requantized = bnb.functional.dequantize_4bit(state["weight"].data, state["quant_state"])
    if kind["double_quant"]:  # its scales are rounded once more; measured 1.1e-4
        assert rel(requantized, official(layer)) < 2e-4
    else:
        assert torch.equal(requantized, official(layer))


@pytest.mark.parametrize("columns", [64, 72, 80, 96, 100, 128, 176])
def test_rows_that_the_packages_cpu_kernel_misreads_are_multiplied_exactly(columns):
    """The package's own dequantization, against codes and scales looked up one by one."""
    layer = make_linear4bit(nn.Linear(columns, 24))
    with torch.no_grad():  # rows of different size, so that a wrong scale shows
        weight = torch.randn(24, columns) * torch.logspace(0, 2, 24)[:, None]
    BNB4.write(layer, BNB4.requantize(weight, layer))
    state = layer.weight.quant_state
    nibbles = [n for byte in layer.weight.data.flatten().tolist() for n in (byte >> 4, byte & 15)]
    values = [float(state.code[n]) * float(state.absmax[i // 64]) for i, n in enumerate(nibbles)]
    expected = torch.tensor(values[: 24 * columns]).view(24, columns)
    assert rel(BNB4.dequantize(layer), expected) < 1e-6
    misread = rel(official(layer), expected) > 1e-6
    fault = BNB4.native_fault(layer)
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    assert (fault is not None) == misread == (wide and columns % 16 == 0 and columns % 64 != 0)
    model = randomize(oftfx.transform(nn.Sequential(layer), {"0": OFT(4)}), std=0.1)
    x = torch.randn(3, columns)
    turned = x.double() @ dense_rotation(model[0].oft.default.skew.detach(), 4)
    assert rel(model(x), turned @ expected.double().T + layer.bias.double()) < 1e-6
    assert oftfx.adapters(model)["default"]["0"].kernel == ("exact" if misread else "native")


def repack(layer):
    """What bitsandbytes does to a layer in its first eval forward on a CPU with AVX512-BF16."""
    layer.eval()
    with torch.no_grad():
        layer(torch.randn(3, layer.in_features))
    assert layer.weight.quant_state.packing_format_for_cpu


@packs
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_repacked_layer_is_read_and_restored(kind):
    layer = make_linear4bit(nn.Linear(256, 128), **kind)
    weight, raw = official(layer), bytes_of(layer)
    repack(layer)
    assert rel(official(layer).float(), weight) > 0.3  # the package itself reads garbage now
    assert rel(BNB4.dequantize(layer), weight) < 2e-3
    notice = BNB4.prepare(layer)
    assert "rounding cannot be undone" in notice
    assert torch.equal(bytes_of(layer), raw)
    assert torch.equal(official(layer), BNB4.dequantize(layer))
    assert BNB4.dtype(layer) == torch.float32
    assert BNB4.prepare(layer) is None


@packs
def test_transforming_a_repacked_base_warns_and_notes_it():
    layer = make_linear4bit(nn.Linear(256, 128))
    weight = official(layer)
    base = nn.Sequential(layer)
    repack(layer)
    with pytest.warns(OftfxWarning, match="1 layers, e.g. 0: an earlier eval forward had repacked this weight"):
        model = randomize(oftfx.transform(base, {"0": OFT(32)})).eval()
    assert "rounding cannot be undone" in oftfx.adapters(model)["default"]["0"].notes[0]
    expected = weight @ dense_rotation(model[0].oft.default.skew, 32).float().T
    x = torch.randn(4, 256)
    with torch.no_grad():
        assert rel(model(x), x @ expected.T + layer.bias) < 4e-3
        assert rel(base(x), x @ weight.T + layer.bias) < 1e-2  # the original still runs on its packed weight
    assert rel(BNB4.dequantize(oftfx.fold(model, quantized="keep").model[0]), weight) < 2e-3


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_eval_train_and_fold_are_right_where_pefts_merge_gives_garbage(kind):
    layer = make_linear4bit(nn.Linear(256, 128), **kind)
    raw, weight = bytes_of(layer), official(layer).double()
    model = randomize(oftfx.transform(nn.Sequential(layer), {"0": OFT(32)}))
    x = torch.randn(4, 256)
    expected = x.double() @ (weight @ dense_rotation(model[0].oft.default.skew, 32).T).T + layer.bias.double()
    with torch.no_grad():
        assert rel(model.eval()(x), expected) < 1e-6
    assert rel(model.train()(x), expected) < 1e-6
    model(x).sum().backward()
    assert model[0].oft.default.skew.grad.abs().sum() > 0
    with torch.no_grad():
        for policy, bound in [("keep", 1e-6), ("float", 1e-6), ("requantize", 0.2)]:
            assert rel(oftfx.fold(model, quantized=policy).model.eval()(x), expected) < bound
    assert torch.equal(bytes_of(model[0]), raw)
    assert torch.equal(bytes_of(oftfx.fold(model, quantized="keep").model[0]), raw)


@packs
@pytest.mark.needs("peft")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_same_story_with_peft_ends_in_garbage():
    import peft

    layer = make_linear4bit(nn.Linear(256, 128))
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(layer)), peft.OFTConfig(target_modules=["0"])).eval()
    ours = oftfx.transform(nn.Sequential(layer), {"0": OFT(32)}).eval()
    skew = torch.randn(8, 496) * 0.05
    with torch.no_grad():
        next(p for n, p in theirs.named_parameters() if "oft_R" in n).copy_(skew)
        ours[0].oft.default.skew.copy_(skew)
        x = torch.randn(4, 256)
        before = theirs(x)
        assert rel(ours(x), before) < 1e-2  # theirs computes in bfloat16 here
        merged = theirs.merge_and_unload()(x)
        assert rel(merged, before) > 0.5
        assert rel(oftfx.fold(ours, quantized="requantize").model(x), ours(x)) < 0.15


@packs
def test_running_the_original_does_not_disturb_the_transformed_model():
    base = nn.Sequential(make_linear4bit(nn.Linear(256, 128)))
    model = randomize(oftfx.transform(base, {"0": OFT(32)})).eval()
    x = torch.randn(4, 256)
    with torch.no_grad():
        expected = model(x)
        base.eval()(x)
        assert base[0].weight.quant_state.packing_format_for_cpu
        assert torch.equal(model(x), expected)
    assert not model[0].support_avx512bf16_for_cpu
    assert base[0].support_avx512bf16_for_cpu


def test_memory_is_shared_until_the_original_repacks():
    base = nn.Sequential(make_linear4bit(nn.Linear(256, 128)))
    model = oftfx.transform(base, {"0": OFT(32)})
    assert model[0].weight.data_ptr() == base[0].weight.data_ptr()
    assert model[0].weight is not base[0].weight
    assert model[0].weight.module is model[0]


def test_a_folded_layer_reloads_into_a_fresh_one():
    model = randomize(oftfx.transform(nn.Sequential(make_linear4bit(nn.Linear(256, 128))), {"0": OFT(32)}))
    folded = oftfx.fold(model, quantized="requantize").model[0]
    state = folded.state_dict()
    stats = {k.removeprefix("weight."): v for k, v in state.items() if k.startswith("weight.")}
    weight = bnb.nn.Params4bit.from_prequantized(state["weight"], stats, device="cpu")
    assert torch.equal(bnb.functional.dequantize_4bit(weight.data, weight.quant_state), BNB4.dequantize(folded))


def test_shared_rotation_in_front_of_kept_weights():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (make_linear4bit(nn.Linear(64, 32)) for _ in range(2))

        def forward(self, x):
            return self.a(x) + self.b(x)

    x = torch.randn(3, 64)
    model = randomize(oftfx.transform(Pair(), {"*": OFT(8, share_input=True)}, example_inputs=(x,))).eval()
    folded = oftfx.fold(model).model
    assert [k for k in folded.state_dict() if "oft" in k] == ["a.oft.frozen.blocks"]
    with torch.no_grad():
        assert rel(folded(x), model(x)) < 1e-6


def test_a_layer_that_was_never_quantized_is_no_site():
    base = nn.Sequential(bnb.nn.Linear4bit(64, 32))
    assert not BNB4.matches(base[0])


def test_what_a_fold_kept_still_acts_under_a_new_adapter():
    model = randomize(oftfx.transform(nn.Sequential(make_linear4bit(nn.Linear(64, 32))), {"0": OFT(8)}), std=0.3)
    kept = oftfx.fold(model).model.eval()
    x = torch.randn(3, 64)
    with torch.no_grad():
        expected = kept(x)
        second = oftfx.transform(kept, {"0": OFT(16)}, adapter="second").eval()
        assert torch.equal(second(x), expected)
        randomize(second)
        assert rel(second(x), expected) > 0.01
        again = oftfx.fold(second).model
        assert rel(again(x), second(x)) < 1e-6
        with oftfx.disable_adapters(second):
            assert torch.equal(second(x), expected)
        oftfx.remove_adapter(second, "second")
        assert torch.equal(second(x), expected)


def test_a_layer_with_two_names_is_replaced_at_both(tmp_path):
    base = nn.ModuleDict({"a": make_linear4bit(nn.Linear(64, 64))})
    base["b"] = base["a"]
    model = randomize(oftfx.transform(base, {"a": OFT(8)}))
    folded = oftfx.fold(model, quantized="float").model
    assert folded["a"] is folded["b"]
    assert type(folded["b"]) is nn.Linear


def test_a_plan_made_on_the_float_model_prepares_the_quantized_one():
    plan = oftfx.plan(nn.Sequential(nn.Linear(256, 128)), {"0": OFT(32)})
    model = randomize(oftfx.transform(nn.Sequential(make_linear4bit(nn.Linear(256, 128))), plan))
    assert oftfx.adapters(model)["default"]["0"].site.format == "bnb4"
    x = torch.randn(3, 256)
    with torch.no_grad():
        model.eval()(x)
    model.train()(x).sum().backward()
    assert model[0].oft.default.skew.grad.abs().sum() > 0
    with pytest.raises(RuleError, match="train and train_bias are part of a plan"):
        oftfx.transform(nn.Sequential(nn.Linear(256, 128)), plan, train=["0"])


def test_the_float_layer_takes_the_dtype_of_the_model_around_it():
    """Weights that were bfloat16 before quantization, in a model that computes in float32."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.layer = nn.LayerNorm(64), make_linear4bit(nn.Linear(64, 32).bfloat16())

        def forward(self, x):
            return self.layer(self.norm(x))

    model, x = randomize(oftfx.transform(Model(), {"layer": OFT(8)})).eval(), torch.randn(3, 64)
    folded = oftfx.fold(model, quantized="float").model
    assert folded.layer.weight.dtype == torch.float32
    with torch.no_grad():
        assert rel(folded(x), model(x)) < 1e-2
