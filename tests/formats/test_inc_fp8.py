"""Float8 of neural-compressor: values against its own forward, scales that no state_dict holds, casts, folds."""

import copy

import pytest
import torch
import torch.nn as nn

import oftfx
from oftfx import OFT
from oftfx.errors import FormatError
from oftfx.formats.inc_fp8 import make_patched_linear
from oftfx.formats.registry import format_named, format_of
from tests.formats.scalar_checks import bytes_of, check_bytes, check_calibration, check_folds, same_bytes
from tests.reference import randomize, rel

pytestmark = [
    pytest.mark.needs("neural_compressor"),
    pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning"),  # the package's forward
]

OPTIONS = {
    "arbitrary": {},
    "power of two": {"scale_method": "maxabs_pow2"},
    "unit": {"scale_method": "unit_scale"},
    "one an output": {"scale_method": "act_maxabs_pow2_weights_pcs_maxabs_pow2"},
    "e5m2": {"kind": "E5M2"},
}


def make(name, inner=96, outer=40, bias=True, dtype=torch.float32):
    torch.manual_seed(1)
    linear = nn.Linear(inner, outer, bias=bias)
    with torch.no_grad():
        linear.weight.normal_().mul_(0.05)
    return make_patched_linear(linear.to(dtype), **OPTIONS[name])


@pytest.fixture
def fp8():
    return format_named("inc_fp8")


@pytest.mark.parametrize("shape", [(96, 40), (33, 5)], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_values_are_those_of_the_package_to_the_bit(fp8, name, shape):
    layer = make(name, *shape)
    assert format_of(layer) is fp8
    weight = fp8.dequantize(layer)
    assert torch.equal(weight, layer.dequant_weights(layer.weight).detach().T.float())
    x = torch.randn(4, shape[0], dtype=torch.bfloat16)
    with torch.no_grad():
        expected = torch.matmul(layer.quant_input(x), weight.T.bfloat16()) + layer.bias
        assert torch.equal(layer(x), expected)
    check_bytes(fp8, layer)
    check_folds(fp8, layer)


@pytest.mark.parametrize("name", OPTIONS)
def test_rounding(fp8, name):
    layer, weight = make(name), torch.randn(40, 96) * 0.05
    fp8.write(layer, fp8.requantize(weight, layer))
    assert rel(fp8.dequantize(layer), weight) < (0.055 if name == "e5m2" else 0.0285)
    scale = layer.dequant_weights.scale
    if name == "one an output":
        assert isinstance(scale, nn.Parameter)
        assert not scale.requires_grad
    else:
        assert isinstance(scale, float)
    if name in ("power of two", "one an output", "unit"):
        scale = torch.as_tensor(scale).float()
        assert torch.equal(scale.log2(), scale.log2().round())


def test_small_gradients_vanish_which_is_its_fault(fp8):
    layer, x = make("arbitrary"), torch.randn(4, 96, requires_grad=True)
    (layer(x) * 1e-3).sum().backward()
    exact = 1e-3 * fp8.dequantize(layer).sum(0).expand(4, -1)
    assert rel(x.grad, exact) > 0.5
    assert "gradients" in fp8.native_fault(layer)


def test_a_new_weight_counts_at_once(fp8):
    layer, x = make("arbitrary"), torch.randn(4, 96, dtype=torch.bfloat16)
    layer(x)
    weight = torch.randn(40, 96)
    before, state = fp8.dequantize(layer), fp8.read(layer)
    fp8.write(layer, fp8.requantize(weight, layer))
    with torch.no_grad():
        assert rel(layer(x) - layer.bias, x.float() @ weight.T) < 0.05
    fp8.write(layer, state)
    assert torch.equal(fp8.dequantize(layer), before)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_casts(fp8, name, dtype):
    layer = make(name)
    cast = copy.deepcopy(layer).to(dtype)
    assert cast.weight.dtype == dtype
    assert torch.equal(fp8.dequantize(cast), fp8.dequantize(layer))  # scales are bfloat16 numbers
    check_bytes(fp8, cast)


def test_codes_that_were_changed_after_a_cast_are_refused(fp8):
    layer = make("arbitrary").float()
    with torch.no_grad():
        layer.weight.add_(0.01)
    with pytest.raises(FormatError, match="without casting"):
        fp8.dequantize(layer)


def test_scales_of_another_length_are_refused(fp8):
    layer = make("one an output")
    layer.dequant_weights.scale = nn.Parameter(torch.ones(7), requires_grad=False)
    with pytest.raises(FormatError, match="7 scales"):
        fp8.dequantize(layer)


@pytest.mark.parametrize("name", ["arbitrary", "one an output"])
def test_calibrated_rounding(fp8, name):
    check_calibration(fp8, make(name, 64, 48))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["arbitrary", "one an output"])
def test_models_of_any_dtype(fp8, name, dtype):
    layer = make(name, dtype=dtype)
    assert fp8.dtype(layer) == torch.bfloat16
    check_bytes(fp8, layer)
    check_folds(fp8, layer, dtype=layer.bias.dtype)


def test_copies_run_on_their_own_weight(fp8):
    layer, x = make("arbitrary"), torch.randn(4, 96, dtype=torch.bfloat16)
    with torch.no_grad():
        y = layer(x)
        model = randomize(oftfx.transform(nn.Sequential(layer), {"0": OFT(16)}))
        plain = copy.deepcopy(layer)
        assert plain.forward.__self__ is plain  # the package keeps its forward in the instance
        assert model[0].forward.module is model[0]
        assert model[0].forward.native.__self__ is model[0]
        for other in (model[0], plain):
            assert other.dequant_weights is not layer.dequant_weights
            fp8.write(other, fp8.requantize(torch.randn(40, 96), other))
            assert torch.equal(layer(x), y)


@pytest.mark.parametrize("name", OPTIONS)
def test_state_dict(fp8, name):
    layer, other = make(name), make(name)
    scale = layer.dequant_weights.scale
    fp8.write(other, fp8.requantize(torch.randn(40, 96), other))
    other.load_state_dict(layer.state_dict())
    if isinstance(scale, float):
        assert "dequant_weights.scale" not in layer.state_dict()
        other.dequant_weights.scale = scale
    assert same_bytes(bytes_of(dict(fp8.read(other))), bytes_of(dict(fp8.read(layer))))


def test_on_the_meta_device(fp8):
    layer = make("arbitrary").to("meta")
    assert fp8.matches(layer)
    assert (fp8.geometry(layer).in_features, fp8.geometry(layer).out_features) == (96, 40)


def test_layers_that_still_observe_are_not_matched(fp8, tmp_path):
    from neural_compressor.torch.quantization import FP8Config, prepare

    config = FP8Config(use_qdq=True, scale_method="maxabs_arbitrary", dump_stats_path=f"{tmp_path}/statistics")
    model = prepare(nn.Sequential(nn.Linear(8, 4)), config)
    assert type(model[0]).__name__ == "PatchedLinear"
    assert not fp8.matches(model[0])
    assert not fp8.matches(nn.Linear(4, 4))
