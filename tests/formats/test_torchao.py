"""torchao weights of every kind: values, bytes, copies, folds and what is refused."""

import copy

import pytest
import torch
import torch.nn as nn

import oftfx
from oftfx import OFT
from oftfx.errors import FormatError
from oftfx.formats.registry import format_named, format_of
from oftfx.formats.torchao import make_torchao
from tests.formats.scalar_checks import bytes_of, check_bytes, check_calibration, check_folds, same_bytes
from tests.reference import randomize, rel

pytestmark = pytest.mark.needs("torchao")


def config(name):
    import torchao.quantization as tq
    from torchao.quantization.quant_primitives import MappingType

    def intx(bits, granularity, **kwargs):
        dtype = getattr(torch, f"int{bits}")
        return tq.IntxWeightOnlyConfig(weight_dtype=dtype, granularity=granularity, **kwargs)

    row, group = tq.PerAxis(0), tq.PerGroup(32)
    made = {
        "int8 row": lambda: tq.Int8WeightOnlyConfig(),
        "int8 group": lambda: tq.Int8WeightOnlyConfig(granularity=tq.PerGroup(32)),
        "int8 tensor": lambda: tq.Int8WeightOnlyConfig(granularity=tq.PerTensor()),
        **{f"intx{b} group": lambda b=b: intx(b, group) for b in range(2, 9)},
        "intx1 group asymmetric": lambda: intx(1, group, mapping_type=MappingType.ASYMMETRIC),
        "intx4 row": lambda: intx(4, row),
        "intx4 group asymmetric": lambda: intx(4, group, mapping_type=MappingType.ASYMMETRIC),
        "intx8 row asymmetric": lambda: intx(8, row, mapping_type=MappingType.ASYMMETRIC),
        "intx2 row asymmetric": lambda: intx(2, row, mapping_type=MappingType.ASYMMETRIC),
        "intx4 float16 scales": lambda: intx(4, group, scale_dtype=torch.float16),
        "float8 row": lambda: tq.Float8WeightOnlyConfig(),
        "float8 tensor": lambda: tq.Float8WeightOnlyConfig(granularity=tq.PerTensor()),
        "float8 e5m2": lambda: tq.Float8WeightOnlyConfig(weight_dtype=torch.float8_e5m2),
    }
    return made[name]()


NAMES = [
    *("int8 row", "int8 group", "int8 tensor", *(f"intx{b} group" for b in range(2, 9))),
    *("intx1 group asymmetric", "intx4 group asymmetric", "intx2 row asymmetric", "intx8 row asymmetric"),
    *("intx4 row", "intx4 float16 scales"),
    *("float8 row", "float8 tensor", "float8 e5m2"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(name, inner=96, outer=40, dtype=torch.float32, bias=True):
    torch.manual_seed(1)
    linear = nn.Linear(inner, outer, bias=bias)
    with torch.no_grad():
        linear.weight.normal_().mul_(0.05)
    return make_torchao(linear.to(dtype), config(name))


@pytest.fixture
def torchao():
    return format_named("torchao")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_values_are_those_of_the_package_to_the_bit(torchao, name, dtype):
    layer = make(name, dtype=dtype)
    assert format_of(layer) is torchao
    assert torchao.dtype(layer) == dtype
    assert torch.equal(torchao.dequantize(layer), layer.weight.dequantize().float())
    assert torchao.native_fault(layer) is None
    check_bytes(torchao, layer)


@pytest.mark.parametrize("name", ["int8 row", "int8 tensor", "intx4 row", "intx8 row asymmetric", "float8 row"])
def test_any_shape(torchao, name):
    layer = make(name, 33, 5)
    assert (torchao.geometry(layer).in_features, torchao.geometry(layer).out_features) == (33, 5)
    assert torch.equal(torchao.dequantize(layer), layer.weight.dequantize())
    check_bytes(torchao, layer)
    check_folds(torchao, layer)


@pytest.mark.parametrize("name", NAMES)
def test_rounding_is_no_worse_than_the_packages(torchao, name):
    from torchao.quantization import quantize_

    layer, weight = make(name), torch.randn(40, 96) * 0.05
    theirs = nn.Sequential(nn.Linear(96, 40).requires_grad_(False))
    with torch.no_grad():
        theirs[0].weight.copy_(weight)
    quantize_(theirs, config(name))
    packed = layer.weight
    torchao.write(layer, torchao.requantize(weight, layer))
    ours, other = torchao.dequantize(layer), torchao.dequantize(theirs[0])
    assert rel(ours, weight) < 1.001 * rel(other, weight)
    fitted, found = torchao.grid(layer).fit(weight), torchao.codes(theirs[0])
    assert torch.allclose(fitted.scale, found.scale, rtol=1e-3 if "float16" in name else 1e-6)
    assert float((fitted.codes != found.codes).float().mean()) < 0.02  # the largest of a group lies between two codes
    assert layer.weight is not packed
    assert type(layer.weight) is type(packed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_folds(torchao, name, dtype):
    check_folds(torchao, make(name, dtype=dtype), dtype=dtype)


@pytest.mark.parametrize("name", ["int8 row", "intx4 group", "intx4 group asymmetric", "intx3 group", "float8 row"])
def test_calibrated_rounding(torchao, name):
    check_calibration(torchao, make(name))


@pytest.mark.parametrize("name", ["int8 row", "int8 group", "int8 tensor", "intx4 group", "float8 row"])
def test_output_and_gradient_through_the_real_layer(torchao, name):
    layer = make(name)
    model = randomize(oftfx.transform(nn.Sequential(layer), {"0": OFT(16)}))
    x = torch.randn(3, 96, requires_grad=True)
    model(x).square().sum().backward()
    rotation = model[0].oft.default
    weight, plain = torchao.dequantize(layer).double(), x.detach().double().requires_grad_()
    blocks = rotation.effective().detach().double()
    turned = torch.cat([p @ b for p, b in zip(plain.split(16, 1), blocks, strict=True)], 1)
    expected = turned @ weight.T + layer.bias.double()
    expected.square().sum().backward()
    assert rel(x.grad, plain.grad) < 1e-6
    assert rotation.skew.grad.abs().sum() > 0


def test_a_copy_is_frozen_and_moved_on_its_own(torchao):
    layer = make("int8 row")
    base = nn.Sequential(layer)
    model = oftfx.transform(base, {"0": OFT(16)})
    assert model[0].weight is not layer.weight
    assert model[0].weight.qdata.data_ptr() == layer.weight.qdata.data_ptr()
    model[0].weight.requires_grad_(True)
    assert not layer.weight.requires_grad
    model.to("meta")
    assert layer.weight.qdata.device.type == layer.weight.device.type == "cpu"
    assert torchao.matches(model[0])
    assert torchao.geometry(model[0]).in_features == 96


def test_deepcopy_of_a_transformed_model_has_bytes_of_its_own(torchao):
    model = randomize(oftfx.transform(nn.Sequential(make("intx4 group")), {"0": OFT(16)}))
    other = copy.deepcopy(model)
    assert same_bytes(bytes_of(dict(torchao.read(other[0]))), bytes_of(dict(torchao.read(model[0]))))
    assert other[0].weight.qdata.data_ptr() != model[0].weight.qdata.data_ptr()
    x = torch.randn(2, 96)
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("name", ["int8 row", "int8 group", "intx4 group", "float8 row"])
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict(torchao, name, assign):
    layer, other = make(name), make(name)
    torchao.write(other, torchao.requantize(torch.randn(40, 96), other))
    other.load_state_dict(layer.state_dict(), assign=assign)
    assert same_bytes(bytes_of(dict(torchao.read(other))), bytes_of(dict(torchao.read(layer))))


@pytest.mark.parametrize("name", ["int8 row", "intx4 group", "float8 row"])
def test_casts(torchao, name):
    layer = make(name)
    before = torchao.dequantize(layer)
    layer.to(torch.bfloat16)  # casts the integers of few bits only; the others stay what they were
    after = torchao.dequantize(layer)
    assert torch.equal(after, layer.weight.dequantize().float())
    assert torchao.dtype(layer) == layer.weight.dtype
    assert rel(after, before) < (4e-3 if layer.weight.dtype == torch.bfloat16 else 1e-9)
    check_bytes(torchao, layer)


@pytest.mark.parametrize("kind", ["Int8DynamicActivationInt8WeightConfig", "Int8DynamicActivationIntxWeightConfig"])
def test_rounded_activations_are_a_fault(torchao, kind):
    import torchao.quantization as tq

    layer = make_torchao(nn.Linear(64, 32), getattr(tq, kind)())
    assert format_of(layer) is torchao
    assert not layer(torch.randn(2, 64, requires_grad=True)).requires_grad  # what the fault is about
    assert "gradient" in torchao.native_fault(layer)
    check_bytes(torchao, layer)


def test_scaled_inputs_are_refused_where_values_are_asked_for(torchao):
    layer = make("int8 row")
    layer.weight.act_pre_scale = torch.full((96,), 2.0)
    model = randomize(oftfx.transform(nn.Sequential(layer), {"0": OFT(16)}))
    with pytest.raises(FormatError, match="act_pre_scale.*rule"):
        torchao.dequantize(model[0])


def test_float_zero_points_are_refused(torchao):
    layer = make("intx4 group asymmetric")
    layer.weight.zero_point = layer.weight.zero_point.float()
    with pytest.raises(FormatError, match="float zero points"):
        torchao.dequantize(layer)


def test_what_it_is_not(torchao):
    assert not torchao.matches(nn.Linear(4, 4))
    table = nn.Sequential(nn.Embedding(8, 32).requires_grad_(False))
    from torchao.quantization import IntxWeightOnlyConfig, PerAxis, quantize_

    quantize_(table, IntxWeightOnlyConfig(torch.int8, PerAxis(0)), filter_fn=lambda m, _: isinstance(m, nn.Embedding))
    assert type(table[0].weight).__name__ == "IntxUnpackedToInt8Tensor"
    assert format_of(table[0]) is None


def test_weights_of_other_layouts_are_named_where_they_are_refused(torchao):
    from torchao.quantization import Int4Tensor

    layer = nn.Linear(64, 8)
    scale = torch.ones(2, 8, dtype=torch.bfloat16)
    packed = Int4Tensor(torch.zeros(8, 32, dtype=torch.int8), scale, scale, [1, 32], torch.Size((8, 64)))
    layer.weight = nn.Parameter(packed, requires_grad=False)
    assert format_of(layer) is None
    with pytest.raises(oftfx.errors.RuleError, match="stored as Int4Tensor"):
        oftfx.transform(nn.Sequential(layer), {"0": OFT(16)})


@pytest.mark.needs("transformers")
@pytest.mark.parametrize("name", ["int8 row", "intx4 group", "float8 row"])
def test_a_model_of_transformers_folded_saved_and_loaded(torchao, name, tiny_llama, ids, tmp_path):
    from transformers import AutoModelForCausalLM, TorchAoConfig

    tiny_llama().save_pretrained(tmp_path / "plain")
    settings = TorchAoConfig(config(name))
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=settings)
    inputs = ids()
    model = oftfx.transform(quantized, {"all-linear": OFT(16)})
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, quantized(**inputs).logits)
    model(**inputs).logits.square().sum().backward()
    rotations = [p for n, p in model.named_parameters() if "oft" in n]
    assert len(rotations) >= 10
    assert all(p.grad.abs().sum() > 0 for p in rotations)

    randomize(model, std=0.1)
    result = oftfx.fold(model, quantized="requantize")
    assert {row.action for row in result.report} == {"requantized"}
    result.model.save_pretrained(tmp_path / "folded")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "folded")
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, result.model(**inputs).logits)
