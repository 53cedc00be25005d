"""Float8 in blocks: values against the package's, edges, casts that lose the scales, and what is refused."""

import copy

import pytest
import torch
import torch.nn as nn

import oftfx
from oftfx import OFT
from oftfx.errors import FormatError, OftfxWarning
from oftfx.formats.hf_fp8 import make_fp8_linear
from oftfx.formats.registry import format_named, format_of
from tests.formats.scalar_checks import bytes_of, check_bytes, check_calibration, check_folds, same_bytes
from tests.reference import randomize, rel

pytestmark = pytest.mark.needs("transformers")

OPTIONS = {
    "128": {"block_size": (128, 128)},
    "64 x 32": {"block_size": (64, 32)},
    "1 x 128": {"block_size": (1, 128)},
    "list": {"block_size": [32, 128]},
    "one scale": {"block_size": None},
    "powers of two": {"block_size": (128, 128), "scale_fmt": "ue8m0"},
    "static": {"block_size": (128, 128), "activation_scheme": "static"},
}
SHAPES = [(256, 128), (200, 130), (33, 5)]


def make(name, inner=200, outer=130, bias=True):
    torch.manual_seed(1)
    linear = nn.Linear(inner, outer, bias=bias)
    with torch.no_grad():
        linear.weight.normal_().mul_(torch.logspace(-3, 0, outer)[:, None])
    return make_fp8_linear(linear, **OPTIONS[name])


def theirs(layer, dtype=torch.float32):
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

    return _dequantize_fp8_weight(layer.weight.detach(), layer.weight_scale_inv.detach(), layer.block_size, dtype)


@pytest.fixture
def fp8():
    return format_named("hf_fp8")


@pytest.fixture
def kernel(monkeypatch):
    """A product on the CPU in the place of the one that transformers would download; its backward is the package's."""
    from transformers.integrations import finegrained_fp8

    def matmul(x, weight, scale, block_size, dtype, activation_scale=None):
        return x @ finegrained_fp8._dequantize_fp8_weight(weight, scale, block_size, dtype).T

    found = finegrained_fp8.FineGrainedFP8(matmul=matmul, batched_matmul=None, grouped_matmul=None)
    monkeypatch.setattr(finegrained_fp8, "_FINEGRAINED_FP8", found)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_values_are_those_of_the_package_to_the_bit(fp8, name, shape):
    layer = make(name, *shape)
    assert isinstance(layer, nn.Linear)
    assert format_of(layer) is fp8
    assert torch.equal(fp8.dequantize(layer), theirs(layer))
    assert "no kernel" in fp8.native_fault(layer)
    check_bytes(fp8, layer)
    check_folds(fp8, layer)


@pytest.mark.parametrize("name", OPTIONS)
def test_rounding(fp8, name):
    layer, weight = make(name), torch.randn(130, 200) * 0.05
    fp8.write(layer, fp8.requantize(weight, layer))
    assert rel(fp8.dequantize(layer), weight) < 0.028
    scale = layer.weight_scale_inv.float()
    assert layer.weight.float().abs().max() <= 448
    if name == "powers of two":
        assert layer.weight_scale_inv.dtype == torch.float8_e8m0fnu
        assert torch.equal(scale.log2(), scale.log2().round())
    elif name == "one scale":
        assert float(scale) == pytest.approx(float(weight.abs().max()) / 448, rel=1e-6)


@pytest.mark.parametrize("name", ["128", "one scale", "powers of two"])
def test_the_real_layer_with_a_kernel(fp8, name, kernel):
    layer, x = make(name), torch.randn(3, 200, requires_grad=True)
    model = randomize(oftfx.transform(nn.Sequential(layer), {"0": OFT(8)}))
    out = model(x)
    out.square().sum().backward()
    weight, plain = fp8.dequantize(layer).double(), x.detach().double().requires_grad_()
    blocks = model[0].oft.default.effective().detach().double()
    turned = torch.cat([p @ b for p, b in zip(plain.split(8, 1), blocks, strict=True)], 1)
    expected = turned @ weight.T + layer.bias.double()
    expected.square().sum().backward()
    assert rel(out, expected) < 1e-6
    assert rel(x.grad, plain.grad) < 1e-6


@pytest.mark.parametrize("name", ["128", "one scale", "powers of two"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_cast_is_undone(fp8, name, dtype):
    layer = make(name)
    before, codes = fp8.dequantize(layer), layer.weight.detach().clone()
    cast = copy.deepcopy(layer).to(dtype)
    x = torch.randn(2, 200, dtype=dtype)
    with torch.no_grad():  # the trap: codes without scales
        assert rel(cast(x).float() - cast.bias.float(), x.float() @ codes.float().T) < 1e-2
    assert format_of(cast) is fp8
    assert rel(fp8.dequantize(cast), before) < {torch.float32: 1e-9, torch.float16: 1e-2, torch.bfloat16: 4e-3}[dtype]
    check_bytes(fp8, cast)
    with pytest.warns(OftfxWarning, match="ignores their scales"):
        model = oftfx.transform(nn.Sequential(cast), {"0": OFT(8)})
    assert model[0].weight.dtype == torch.float8_e4m3fn
    assert torch.equal(model[0].weight.view(torch.uint8), codes.view(torch.uint8))
    assert cast.weight.dtype == dtype
    notice = fp8.prepare(cast)
    assert "ignores their scales" in notice
    assert ("lost" in notice) == (dtype != torch.float32)
    assert fp8.prepare(cast) is None
    assert fp8.prepare(layer) is None


def test_codes_that_were_changed_after_a_cast_are_refused(fp8):
    layer = make("128").float()
    with torch.no_grad():
        layer.weight.add_(0.01)
    with pytest.raises(FormatError, match="without casting"):
        fp8.dequantize(layer)
    with pytest.raises(FormatError, match="without casting"):
        oftfx.transform(nn.Sequential(layer), {"0": OFT(8)})


def test_scales_that_do_not_fit_are_refused(fp8):
    layer = make("128")
    layer.block_size = (64, 64)
    with pytest.raises(FormatError, match="block_size"):
        fp8.dequantize(layer)


@pytest.mark.parametrize("name", ["128", "64 x 32"])
def test_calibrated_rounding(fp8, name):
    check_calibration(fp8, make(name, 64, 48))


@pytest.mark.parametrize("name", OPTIONS)
def test_state_dict_copies_and_the_meta_device(fp8, name):
    layer, other = make(name), make(name)
    before = bytes_of(dict(fp8.read(layer)))
    fp8.write(other, fp8.requantize(torch.randn(130, 200), other))
    other.load_state_dict(layer.state_dict())
    assert same_bytes(bytes_of(dict(fp8.read(other))), before)
    assert same_bytes(bytes_of(dict(fp8.read(copy.deepcopy(layer)))), before)
    other.to("meta")
    assert fp8.matches(other)
    assert fp8.geometry(other).in_features == 200


def test_a_float_fold_has_the_dtype_of_the_model(fp8):
    """Not that of codes or scales, which are Parameters as well."""
    model = nn.Sequential(nn.LayerNorm(64, dtype=torch.bfloat16), *(make("64 x 32", 64, 64, bias=False) for _ in "123"))
    model = randomize(oftfx.transform(model, {"1": OFT(16), "2": OFT(16)}))
    folded = oftfx.fold(model, quantized="float").model
    assert [folded[i].weight.dtype for i in (1, 2)] == [torch.bfloat16, torch.bfloat16]
    assert format_of(folded[3]) is fp8


def test_what_it_is_not(fp8):
    from transformers.integrations.finegrained_fp8 import FP8GroupedLinear

    assert not fp8.matches(nn.Linear(4, 4))
    assert format_of(FP8GroupedLinear(64, 32, n_groups=2, block_size=(32, 32))) is None
    four_bits = make("128")
    four_bits.weight = nn.Parameter(torch.zeros(130, 100, dtype=torch.int8), requires_grad=False)
    assert format_of(four_bits) is None
