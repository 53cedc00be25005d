"""Weight-only layers of neural-compressor: every packing and type, the weight that a forward keeps, what is refused."""

import copy

import pytest
import torch
import torch.nn as nn

import oftfx
from oftfx import OFT
from oftfx.errors import FormatError
from oftfx.formats.inc_woq import make_inc_woq
from oftfx.formats.registry import format_named, format_of
from oftfx.grids import Codes
from tests.formats.scalar_checks import bytes_of, check_bytes, check_calibration, check_folds, same_bytes
from tests.reference import randomize, rel

pytestmark = pytest.mark.needs("neural_compressor")

OPTIONS = {
    **{f"{b} bits": {"bits": b} for b in range(2, 8)},
    **{f"{b} bits symmetric": {"bits": b, "symmetric": True} for b in range(2, 9)},
    "one group": {"group_size": -1},
    "groups of 16": {"group_size": 16},
    "act-order": {"permutation": "random"},
    "act-order symmetric": {"permutation": "random", "symmetric": True, "group_size": 20},
    "plain": {"use_optimum_format": False},
    "plain act-order": {"use_optimum_format": False, "group_size": 20},
    "plain symmetric": {"use_optimum_format": False, "symmetric": True},
    "plain 3 bits across": {"use_optimum_format": False, "bits": 3, "compression_dim": 0},
    "plain symmetric across": {"use_optimum_format": False, "symmetric": True, "compression_dim": 0},
    "plain int8 words": {"use_optimum_format": False, "compression_dtype": torch.int8},
    "plain int64 words": {"use_optimum_format": False, "compression_dtype": torch.int64, "bits": 3},
    "plain bfloat16": {"use_optimum_format": False, "scale_dtype": torch.bfloat16},
    "nf4": {"dtype": "nf4"},
    "nf4 across": {"dtype": "nf4", "compression_dim": 0},
    "nf4 act-order": {"dtype": "nf4", "permutation": "random", "group_size": 20},
    "fp4": {"dtype": "fp4"},
    "fp4_e2m1": {"dtype": "fp4_e2m1"},
}
WRAPS = {"8 bits": {"bits": 8}, "8 bits act-order": {"bits": 8, "permutation": "random"}}


def make(name, inner=100, outer=36, bias=True, group_size=32):
    generator = torch.Generator().manual_seed(1)
    options = {"group_size": group_size, **{**OPTIONS, **WRAPS}[name]}
    if options.get("permutation") == "random":
        options["permutation"] = torch.randperm(inner, generator=generator)
    linear = nn.Linear(inner, outer, bias=bias)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(outer, inner, generator=generator) * 0.05)
    return make_inc_woq(linear, **options)


@pytest.fixture
def woq():
    return format_named("inc_woq")


@pytest.mark.parametrize("shape", [(100, 36), (33, 5), (256, 128)], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_values_are_those_of_the_package_to_the_bit(woq, name, shape):
    layer = make(name, *shape)
    assert format_of(layer) is woq
    assert torch.equal(woq.dequantize(layer), layer.recover().float())
    assert woq.native_fault(layer) is None
    check_bytes(woq, layer)


@pytest.mark.parametrize("name", WRAPS)
def test_values_that_the_package_gets_wrong(woq, name):
    layer = make(name)
    torch.manual_seed(1)
    params = layer.unpack()
    level = params["int_weight"].double() - params["zp"].double()[:, groups(layer)]
    exact = level * layer.scales.T.double()[:, groups(layer)]
    assert rel(woq.dequantize(layer), exact) < 5e-4  # the product is rounded to float16
    assert rel(layer.recover(), exact) > 0.3
    assert "wraps" in woq.native_fault(layer)
    check_bytes(woq, layer)


def groups(layer):
    order = layer.g_idx if layer.g_idx is not None else torch.arange(layer.in_features) // layer.group_size
    return order.long()


@pytest.mark.parametrize("name", [*OPTIONS, *WRAPS])
def test_codes_are_packed_as_the_package_packs_them(woq, name):
    layer, weight = make(name), torch.randn(36, 100) * 0.05
    mine = woq.grid(layer).fit(weight)
    state = woq.pack(mine, layer)
    theirs = copy.deepcopy(layer)
    theirs.scale_bf16_to_fp8 = layer.scale_bf16_to_fp8
    theirs.g_idx = None
    scale = mine.scale.reshape(36, -1)
    zero = None if mine.zero is None else mine.zero.reshape(36, -1).to(torch.int32)
    theirs.pack(signed(layer, mine), scale, zero, None)
    assert same_bytes(bytes_of({k: theirs._buffers[k] for k in state}), bytes_of(dict(state)))


def signed(layer, mine):
    """The codes as the package takes them."""
    from neural_compressor.torch.algorithms.weight_only.utility import INT_MAPPING

    if layer.dtype != "int":
        return torch.tensor(INT_MAPPING[layer.dtype])[mine.codes.int()]
    if mine.zero is None and "qzeros" in layer._buffers:  # without zeros it adds the middle itself
        return mine.codes - 2 ** (layer.bits - 1)
    return mine.codes.clone()


@pytest.mark.parametrize("name", [*OPTIONS, *WRAPS])
def test_folds(woq, name):
    check_folds(woq, make(name), dtype=torch.bfloat16 if "bfloat16" in name else torch.float32)


@pytest.mark.parametrize(
    "name", ["4 bits", "3 bits", "4 bits symmetric", "act-order", "8 bits", "nf4", "fp4_e2m1", "fp4"]
)
def test_calibrated_rounding(woq, name):
    check_calibration(woq, make(name))


@pytest.mark.parametrize("name", ["4 bits", "nf4", "act-order"])
def test_a_kept_weight_never_outlives_its_codes(woq, name):
    layer, x = make(name), torch.randn(3, 100)
    before, y = woq.dequantize(layer), layer(x)
    assert "weight" in vars(layer)
    other = torch.randn(36, 100) * 0.05
    state = woq.read(layer)
    woq.write(layer, woq.requantize(other, layer))
    assert rel(woq.dequantize(layer), other) < 0.15
    assert rel(layer(x), x.double() @ woq.dequantize(layer).double().T + layer.bias.double()) < 1e-6
    woq.write(layer, state)
    assert torch.equal(woq.dequantize(layer), before)
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize("name", ["4 bits", "nf4"])
def test_codes_loaded_after_a_forward_count_from_preparation_on(woq, name):
    layer, other, x = make(name), make(name), torch.randn(3, 100)
    woq.write(other, woq.requantize(torch.randn(36, 100), other))
    stale = layer(x)
    assert woq.prepare(layer) is None  # the weight it kept is that of its codes
    layer(x)
    other.bias = layer.bias.clone()
    layer.load_state_dict(other.state_dict())
    assert torch.equal(woq.dequantize(layer), woq.dequantize(other))
    assert torch.allclose(layer(x), stale)  # the package's trap
    assert "codes count" in woq.prepare(layer)
    assert woq.prepare(layer) is None
    assert torch.equal(layer(x), other(x))


def test_a_wrapped_weight_is_told_of(woq):
    layer = make("8 bits")
    assert woq.prepare(layer) is None
    layer(torch.randn(1, 100))
    assert "wrongly" in woq.prepare(layer)


def test_a_copy_of_a_layer_that_has_run(woq):
    layer, x = make("4 bits"), torch.randn(3, 100)
    y = layer(x)
    model = randomize(oftfx.transform(nn.Sequential(layer), {"0": OFT(10)}))
    woq.write(model[0], woq.requantize(torch.randn(36, 100), model[0]))
    assert torch.equal(layer(x), y)
    del layer.weight
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize("name", ["4 bits", "4 bits symmetric", "nf4", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_casts(woq, name, dtype):
    layer = make(name)
    before = woq.dequantize(layer)
    layer.to(dtype)
    assert torch.equal(woq.dequantize(layer), layer.recover().float())
    assert rel(woq.dequantize(layer), before) < (6e-3 if dtype == torch.bfloat16 else 1e-3)
    check_bytes(woq, layer)


@pytest.mark.parametrize("name", [*OPTIONS, *WRAPS])
def test_state_dict(woq, name):
    layer, other = make(name), make(name)
    woq.write(other, woq.requantize(torch.randn(36, 100), other))
    other.load_state_dict(layer.state_dict())
    assert same_bytes(bytes_of(dict(woq.read(other))), bytes_of(dict(woq.read(layer))))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_model_quantized_by_the_package(woq, bits, symmetric, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # it leaves a folder where it runs
    from neural_compressor.torch.quantization import RTNConfig, convert, prepare

    model = nn.Sequential(nn.Linear(96, 40), nn.ReLU(), nn.Linear(40, 24))
    weight = model[0].weight.detach().clone()
    config = RTNConfig(bits=bits, group_size=32, use_sym=symmetric)
    quantized = convert(prepare(copy.deepcopy(model), config))
    assert format_of(quantized[0]) is woq
    assert rel(woq.dequantize(quantized[0]), weight) < {2: 0.65, 4: 0.13, 8: 0.008}[bits]
    mine = make_inc_woq(model[0], bits=bits, group_size=32, symmetric=symmetric)
    assert same_bytes(bytes_of(dict(woq.read(mine))), bytes_of(dict(woq.read(quantized[0]))))


def test_on_the_meta_device(woq):
    layer = make("act-order").to("meta")
    assert woq.matches(layer)
    assert (woq.geometry(layer).in_features, woq.geometry(layer).out_features) == (100, 36)
    assert woq.dtype(layer) == torch.float16


def test_without_bias(woq):
    layer = make("nf4", bias=False)
    check_folds(woq, layer)
    assert layer.bias is None


def test_groups_of_unequal_size_are_refused(woq):
    layer = make("4 bits")
    layer.g_idx = torch.zeros(100, dtype=torch.int32)
    with pytest.raises(FormatError, match="g_idx"):
        woq.dequantize(layer)


def test_unknown_types_are_refused(woq):
    layer = make("4 bits")
    layer.dtype = "fp8_e4m3fn"
    with pytest.raises(FormatError, match="fp8_e4m3fn"):
        woq.dequantize(layer)


def test_codes_beyond_the_range_are_clamped(woq):
    layer = make("4 bits symmetric")
    huge = torch.full((36, 100), 1e3)
    coded = woq.grid(layer).encode(huge, woq.codes(layer).scale, None)
    assert int(coded.codes.max()) == 15
    state = woq.pack(Codes(coded.codes, coded.scale), layer)
    woq.write(layer, state)
    assert torch.equal(woq.codes(layer).codes, coded.codes)
