"""What other libraries do to transformed models is survived, to the right numbers, or refused by name."""

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.utils.prune as prune

import oftfx
from oftfx import OFT
from oftfx.errors import OftfxError
from tests.reference import randomize, rel

X = torch.randn(6, 16)


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def rotated(model=None, rules=None, **options):
    return randomize(oftfx.transform(model or two_layers(), rules or {"*": OFT(4)}, **options)).eval()


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.filterwarnings("ignore:Please use quant_min")
class TestTorchAoQuantization:
    def test_dynamic_is_refused_and_the_fold_goes(self):
        model = rotated()
        with pytest.raises(OftfxError, match=r"0: torch.ao.quantization replaces layers.*fold first"):
            torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
        folded = oftfx.fold(model).model
        quantized = torch.ao.quantization.quantize_dynamic(folded, {nn.Linear})
        assert rel(quantized(X), model(X)) < 0.03

    def test_static_is_refused(self):
        wrapped = torch.ao.quantization.QuantWrapper(rotated())
        wrapped.qconfig = torch.ao.quantization.get_default_qconfig("x86")
        with pytest.raises(OftfxError, match="fold first"):
            torch.ao.quantization.prepare(wrapped)

    def test_a_model_that_is_not_quantized_may_say_so(self):
        model = rotated()
        for module in model.modules():
            module.qconfig = None
        assert rel(model(X), rotated()(X)) == 0


@pytest.mark.parametrize(
    "compute",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    ],
)
def test_a_weight_that_something_computes_is_named(compute):
    model = rotated(nn.Sequential(nn.Conv1d(4, 4, 3)))
    compute(model[0])
    with pytest.raises(OftfxError, match="0 of this .*Conv1d is no parameter any more"):
        model(torch.randn(1, 4, 9))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_trace_of_a_cold_model():
    model = rotated()
    traced = torch.jit.trace(model, (X,))
    other = torch.randn(3, 16)
    assert rel(traced(other), model(other)) < 1e-6
    # What was traced follows the parameters, as any traced module does.
    randomize(model, seed=5)
    assert rel(traced(other), model(other)) < 1e-6


@pytest.mark.parametrize("kind", ["weight", "activation"])
def test_conversion_by_swapping(kind):
    model = rotated(nn.Sequential(nn.Conv1d(4, 4, 3)) if kind == "weight" else two_layers())
    x = torch.randn(1, 4, 9) if kind == "weight" else X
    with torch.no_grad():
        before = model(x)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    with torch.no_grad():
        after = model(x.double())
    assert after.dtype == torch.float64
    assert rel(after, before) < 1e-6


def test_an_embedding_under_autocast_keeps_its_dtype():
    base = nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 8))
    model, ids = oftfx.transform(base, {"*": OFT(4)}), torch.arange(7)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model[0](ids), base[0](ids))
        assert model[0](ids).dtype == torch.float32
        assert torch.equal(model(ids), base(ids))
    randomize(model)
    with torch.autocast("cpu", torch.bfloat16):
        inside = model[0](ids)
    assert torch.equal(inside, model[0](ids))


@pytest.mark.needs("diffusers")
def test_averaged_weights_put_in_place_through_data_are_seen():
    from diffusers.training_utils import EMAModel

    model = rotated()
    with torch.no_grad():
        old = model(X)
        average = EMAModel(model.parameters())
        randomize(model, seed=7)
        assert rel(model(X), old) > 0.1
        average.copy_to(model.parameters())
        assert torch.equal(model(X), old)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_weight_scaled_through_data_is_seen(layout):
    model = rotated(nn.Sequential(nn.Conv2d(6, 6, 3)).to(memory_format=layout), {"*": OFT(6)})
    x = torch.randn(1, 6, 5, 5).to(memory_format=layout)
    with torch.no_grad():
        model(x)
        model[0].weight.data.mul_(2)
        assert rel(model(x), oftfx.fold(model).model(x)) < 1e-6


def test_what_a_look_does_not_see_refresh_does():
    model = rotated(nn.Sequential(nn.Linear(640, 4)), {"*": OFT(32)})
    x = torch.randn(3, 640)
    with torch.no_grad():
        model(x)
        model[0].oft.default.skew.data[7, 100:110] += 0.3
        oftfx.refresh(model)
        assert rel(model(x), oftfx.fold(model).model(x)) < 1e-6


def test_infinities_are_never_finite():
    """They turn to NaN in their block, as everywhere where an infinity is multiplied by zero; the others stay."""
    base = nn.Sequential(nn.Linear(16, 4))
    x = torch.ones(2, 16)
    x[0, 0] = torch.inf
    out = oftfx.transform(base, {"*": OFT(4)})(x)
    assert not out[0].isfinite().any()
    assert torch.equal(out[1], base(x)[1])


@pytest.mark.needs("peft", "transformers")
class TestPeftAroundRotatedLayers:
    @pytest.fixture
    def models(self, tiny_llama, ids):
        from peft import LoraConfig, get_peft_model

        model = randomize(oftfx.transform(tiny_llama(), {"*q_proj": OFT(8)}))
        plain = copy.deepcopy(model)
        wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
        return model, plain, wrapped

    def test_saving_says_what_stands_in_the_way(self, models, tmp_path):
        model, plain, wrapped = models
        with pytest.raises(oftfx.OftfxError, match=r"q_proj.* is inside another layer now.*unload"):
            oftfx.save_adapter(model, tmp_path)
        assert not list(tmp_path.iterdir())
        wrapped.unload()
        oftfx.save_adapter(model, tmp_path)
        loaded = oftfx.load_adapter(copy.deepcopy(oftfx.fold(plain).model), tmp_path)
        assert oftfx.active_adapters(loaded) == ("default",)

    def test_a_fold_inside_is_exact(self, models, ids):
        model, _, wrapped = models
        wrapped.eval()
        with torch.no_grad():
            before = wrapped(**ids()).logits
            oftfx.fold(model, inplace=True)
            assert rel(wrapped(**ids()).logits, before) < 1e-5
            wrapped.merge_adapter()
            assert rel(wrapped(**ids()).logits, before) < 1e-5


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("by_name", [True, False])
def test_torchs_encoder_with_a_padding_mask_in_eval_mode(gradients, by_name):
    torch.manual_seed(0)
    base = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    x, padded = torch.randn(3, 5, 8), torch.zeros(3, 5, dtype=torch.bool)
    padded[0, 3:] = True
    model = rotated(base, {"*linear1": OFT(4)})
    folded = oftfx.fold(model).model

    def run(module):
        return module(src=x, src_key_padding_mask=padded) if by_name else module(x, src_key_padding_mask=padded)

    with torch.set_grad_enabled(gradients):
        out = run(model)
        assert rel(out[~padded], run(folded)[~padded]) < 1e-5
    if gradients:
        out[~padded].square().sum().backward()
        assert all(p.grad is not None and p.grad.norm() > 0 for p in oftfx.adapter_parameters(model))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in folded.modules())
