"""compressed-tensors: each of its number formats against a reader of the file format and against the package itself."""

import copy

import pytest
import torch
import torch.nn as nn

import oftfx
from oftfx import OFT
from oftfx.errors import FormatError, OftfxWarning, RuleError
from oftfx.formats.compressed_tensors import make_compressed
from oftfx.formats.registry import format_named, format_of
from tests.formats.scalar_checks import bytes_of, check_bytes, check_calibration, check_folds, same_bytes
from tests.reference import dense_rotation, randomize, rel

pytestmark = pytest.mark.needs("compressed_tensors")

INT4 = {"num_bits": 4, "strategy": "group", "group_size": 32}
MX = {"type": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8, "zp_dtype": torch.uint8}
NV = {"type": "float", "strategy": "tensor_group", "group_size": 16, "scale_dtype": torch.float8_e4m3fn}
ROUNDED = {"num_bits": 8, "strategy": "token", "dynamic": True}
OPTIONS = {
    "int4": INT4,
    "int4, zeros": INT4 | {"symmetric": False},
    "int3, zeros": INT4 | {"num_bits": 3, "symmetric": False},
    "int8, rows": {"num_bits": 8, "strategy": "channel"},
    "int8, rows, zeros": {"num_bits": 8, "strategy": "channel", "symmetric": False},
    "int5, one scale, zeros": {"num_bits": 5, "strategy": "tensor", "symmetric": False},
    "int8 in bytes": {"num_bits": 8, "strategy": "channel", "inputs": ROUNDED},
    "int8 in bytes, zeros": {"num_bits": 8, "strategy": "channel", "symmetric": False, "inputs": ROUNDED},
    "float8": {"num_bits": 8, "type": "float", "strategy": "tensor"},
    "float8, rows": {"num_bits": 8, "type": "float", "strategy": "channel", "inputs": ROUNDED | {"type": "float"}},
    "float8, blocks": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 64]},
    "mxfp8": {"num_bits": 8, **MX},
    "mxfp4": {"num_bits": 4, **MX},
    "nvfp4": {"num_bits": 4, **NV},
}
FORMATS = {
    "int8 in bytes": "int-quantized",
    "int8 in bytes, zeros": "int-quantized",
    "float8": "naive-quantized",
    "float8, rows": "float-quantized",
    "float8, blocks": "naive-quantized",
    "mxfp8": "mxfp8-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "nvfp4": "nvfp4-pack-quantized",
}
"""What the package calls them; the others are ``pack-quantized``."""
FLOAT4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
SHAPES = [(96, 40), (192, 9), (64, 130)]  # of fewer rows the package cannot unpack zero points itself


def make(name, inner=96, outer=40, *, dtype=torch.float32, compress=True, bias=True):
    from compressed_tensors.quantization import QuantizationArgs

    torch.manual_seed(1)
    options = dict(OPTIONS[name])
    inputs = options.pop("inputs", None)
    linear = nn.Linear(inner, outer, bias=bias)
    with torch.no_grad():
        linear.weight.normal_().mul_(torch.logspace(-2, 0, outer)[:, None] * 0.1)
    inputs = None if inputs is None else QuantizationArgs(**inputs)
    return make_compressed(linear.to(dtype), inputs=inputs, compress=compress, **options)


def theirs(layer):
    """The weight that the package decompresses a copy to."""
    from compressed_tensors.compressors import decompress_module

    other = copy.deepcopy(layer)
    decompress_module(other)
    return other.weight.detach()


def bits_of(words, width, count):
    """Unsigned numbers of ``width`` bits in the bytes of each row, the lowest bit first; by python's integers."""
    rows = []
    for row in words.clone(memory_format=torch.contiguous_format).view(torch.uint8).reshape(len(words), -1).tolist():
        number = int.from_bytes(bytes(row), "little")
        rows.append([(number >> (i * width)) & (2**width - 1) for i in range(count)])
    return torch.tensor(rows, dtype=torch.float64)


def read(tensors, scheme, shape):
    """The weight in float64, from a state_dict by the published description of each format."""
    outer, inner = shape
    bits, scale = scheme.num_bits, tensors["weight_scale"]
    if scale.dtype == torch.uint8:
        scale = 2.0 ** (scale.double() - 127)
    scale = scale.double()
    if "weight_global_scale" in tensors:
        scale = scale / tensors["weight_global_scale"].double()
    if "weight" in tensors:
        codes = tensors["weight"].double()
    elif scheme.type == "float":
        numbers = bits_of(tensors["weight_packed"], 4, inner).long()
        codes = torch.tensor(FLOAT4, dtype=torch.float64)[numbers & 7] * (1 - 2 * (numbers >> 3))
    else:
        codes = bits_of(tensors["weight_packed"], bits, inner) - 2 ** (bits - 1)
    zero = torch.zeros_like(scale)
    if not scheme.symmetric:
        zero = tensors["weight_zero_point"]
        if zero.dtype == torch.int32:
            zero = bits_of(zero.T, bits, outer).T - 2 ** (bits - 1)
        zero = zero.double()
    high, wide = {"tensor": (outer, inner), "block": scheme.block_structure, "channel": (1, inner)}.get(
        scheme.strategy, (1, scheme.group_size)
    )

    def spread(values):
        values = values.reshape(-(-outer // high), -(-inner // wide))
        return values.repeat_interleave(high, 0)[:outer].repeat_interleave(wide, 1)[:, :inner]

    return (codes - spread(zero)) * spread(scale)


@pytest.fixture
def ct():
    return format_named("compressed_tensors")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_values_are_those_of_the_file_and_of_the_package(ct, name, shape):
    layer = make(name, *shape)
    scheme = layer.quantization_scheme
    assert scheme.format == FORMATS.get(name, "pack-quantized")
    assert layer.quantization_status == "compressed"
    assert format_of(layer) is ct
    assert type(layer) is nn.Linear
    weight = ct.dequantize(layer)
    assert torch.equal(weight, theirs(layer).float())
    wanted = read(layer.state_dict(), scheme.weights, (shape[1], shape[0]))
    # The package has bfloat16 weights of 4-bit floats; exponents alone it multiplies without loss.
    assert rel(weight, wanted) < (2e-3 if name == "nvfp4" else 1e-7)
    assert "no forward" in ct.native_fault(layer)
    check_bytes(ct, layer)


@pytest.mark.parametrize("name", OPTIONS)
def test_folds(ct, name):
    layer = make(name, *SHAPES[0])
    check_folds(ct, layer)
    assert layer.quantization_status == "compressed"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_narrow_scales(ct, name, dtype):
    layer = make(name, dtype=dtype)
    assert torch.equal(ct.dequantize(layer), theirs(layer).float())
    assert ct.dtype(layer) == dtype
    check_bytes(ct, layer)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_folded_layer_is_decompressed_by_the_package_to_the_same_values(ct, name):
    layer = make(name, 96, 37)
    for state in (
        ct.requantize(torch.randn(37, 96) * 0.3, layer),
        ct.calibrate(torch.randn(37, 96) * 0.01, layer, torch.eye(96) + 0.1),
    ):
        ct.write(layer, state)
        fresh = make(name, 96, 37)
        fresh.load_state_dict(layer.state_dict())
        assert torch.equal(theirs(fresh).float(), ct.dequantize(layer))


BOUNDS = {"int3, zeros": 0.18, "int5, one scale, zeros": 0.08, "mxfp4": 0.125, "nvfp4": 0.1}


@pytest.mark.parametrize("name", OPTIONS)
def test_rounding_is_as_good_as_the_packages(ct, name):
    layer, weight = make(name, 96, 40), torch.randn(40, 96, generator=torch.Generator().manual_seed(5)) * 0.05
    options = {k: v for k, v in OPTIONS[name].items() if k != "inputs"}
    linear = nn.Linear(96, 40)
    linear.weight.data = weight.clone()
    theirs_error = rel(ct.dequantize(make_compressed(linear, **options)), weight)
    ct.write(layer, ct.requantize(weight, layer))
    error = rel(ct.dequantize(layer), weight)
    assert error < 1.05 * theirs_error
    assert error < BOUNDS.get(name, {8: 0.03, 4: 0.11}[options["num_bits"]] if name not in BOUNDS else 0)


@pytest.mark.parametrize("name", ["int4, zeros", "float8, blocks", "nvfp4", "mxfp4"])
def test_calibrated_rounding(ct, name):
    check_calibration(ct, make(name, 64, 48))


@pytest.mark.parametrize("name", OPTIONS)
def test_a_decompressed_layer_is_read_and_stored_in_its_state(ct, name):
    from compressed_tensors.compressors import compress_module, decompress_module

    layer = make(name)
    packed, before = {k: v.clone() for k, v in layer.state_dict().items()}, ct.dequantize(layer)
    decompress_module(layer)
    assert format_of(layer) is ct
    assert ct.geometry(layer).in_features == 96
    assert torch.equal(ct.dequantize(layer), before)
    assert (ct.native_fault(layer) is not None) == ("inputs" in OPTIONS[name])
    assert ct.prepare(layer) is None
    check_bytes(ct, layer)
    check_folds(ct, layer, dtype=layer.weight.dtype)
    ct.write(layer, ct.requantize(torch.randn(40, 96), layer))
    folded = ct.dequantize(layer)
    compress_module(layer)  # the values are on the grid, so the package finds the same codes
    assert torch.equal(ct.dequantize(layer), folded)
    assert {k: v.dtype for k, v in layer.state_dict().items()} == {k: v.dtype for k, v in packed.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_a_frozen_layer(ct, name, dtype):
    layer = make(name, dtype=dtype, compress=False)
    layer.quantization_scheme.input_activations = None
    assert layer.quantization_status == "frozen"
    x = torch.randn(3, 96, dtype=dtype)
    own = layer(x)
    weight = ct.dequantize(layer)
    assert torch.equal(own, torch.nn.functional.linear(x, weight.to(dtype), layer.bias))
    float_weight = layer.weight.detach().clone()
    assert 1e-3 < rel(weight, float_weight) < 0.5
    with pytest.warns(OftfxWarning, match="rounded its weight anew"):
        model = oftfx.transform(nn.Sequential(layer), {"0": OFT(8)})
    assert torch.equal(layer.weight, float_weight)
    assert model[0].quantization_status == "decompressed"
    assert torch.equal(model(x), own)
    check_bytes(ct, model[0])


@pytest.mark.parametrize("name", ["int8 in bytes", "float8, rows"])
def test_rounded_activations_pass_no_gradient_by_the_packages_forward(ct, name):
    from compressed_tensors.compressors import decompress_module

    base = make(name)
    decompress_module(base)
    x = torch.randn(4, 96)
    model = randomize(oftfx.transform(nn.Sequential(base), {"0": OFT(8)}))
    assert "rounds activations" in str(oftfx.adapters(model)["default"]["0"].notes)
    y = model(x)
    weight, block = ct.dequantize(base).double(), dense_rotation(model[0].oft.default.skew, 8)
    assert rel(y, x.double() @ block @ weight.T + base.bias.double()) < 1e-6
    y.square().sum().backward()
    assert model[0].oft.default.skew.grad.abs().sum() > 0
    native = oftfx.transform(nn.Sequential(base), {"0": OFT(8, kernel="native")})
    native[0].oft.default.skew.data.copy_(model[0].oft.default.skew)
    rounded = native(x)
    assert not rounded.requires_grad  # the trap
    assert 1e-3 < rel(rounded, y) < 0.05


def test_a_compressed_layer_has_no_kernel_of_its_own(ct):
    layer = make("int4")
    with pytest.raises(FormatError, match="no forward for a compressed weight; use 'auto'"):
        oftfx.plan(nn.Sequential(layer), {"0": OFT(8, kernel="native")})
    with pytest.raises(AttributeError, match="weight"):
        layer(torch.randn(2, 96))


def test_a_global_scale_is_kept_where_it_fits(ct):
    """Servers join layers that read the same input under one of theirs."""
    layer = make("nvfp4", 96, 40)
    top, weight = layer.weight_global_scale.detach().clone(), ct.dequantize(layer)
    for factor, kept in ((1.0, True), (1.08, True), (0.1, True), (1.3, False), (1e-3, False)):
        turned = weight * factor + 1e-6
        ct.write(layer, state := ct.requantize(turned, layer))
        assert torch.equal(state["weight_global_scale"], top) == kept
        assert rel(ct.dequantize(layer), turned) < 0.12
        layer.weight_global_scale = nn.Parameter(top, requires_grad=False)


@pytest.mark.parametrize("name", ["float8", "float8, rows", "float8, blocks", "mxfp8", "nvfp4"])
def test_a_cast_of_float8_is_undone(ct, name):
    layer = make(name)
    before, dtypes = ct.dequantize(layer), {n: p.dtype for n, p in layer.named_parameters()}
    layer.half().float()
    assert format_of(layer) is ct
    assert rel(ct.dequantize(layer), before) < 1e-3  # what scales lost in float16
    assert "had been cast" in ct.prepare(layer)
    assert ct.prepare(layer) is None
    assert {n: p.dtype for n, p in layer.named_parameters()} == dtypes


def test_an_order_of_columns_as_older_versions_wrote_it(ct):
    """Version 0.20 neither writes nor reads it: it decompresses such a layer as if it had none."""
    layer, size = make("int4, zeros"), 32
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    index = torch.empty(96, dtype=torch.int32)
    index[order] = torch.arange(96, dtype=torch.int32) // size
    plain = ct.dequantize(layer)
    codes, zeros = ct.codes(layer).codes.double(), bits_of(layer.weight_zero_point.detach().T, 4, 40).T - 8
    layer.weight_g_idx = nn.Parameter(index, requires_grad=False)
    wanted = torch.empty(40, 96, dtype=torch.float64)
    for column, group in enumerate(index.tolist()):
        wanted[:, column] = (codes[:, column] - zeros[:, group]) * layer.weight_scale[:, group].double()
    assert rel(ct.dequantize(layer), wanted) < 1e-7
    assert torch.equal(theirs(layer), plain)
    check_bytes(ct, layer)
    check_folds(ct, layer)
    layer.weight_g_idx.data[0] = 7
    with pytest.raises(FormatError, match="does not cut"):
        ct.dequantize(layer)
    layer.weight_g_idx.data.fill_(-1)
    assert torch.equal(ct.dequantize(layer), plain)


def test_what_is_refused_by_name(ct):
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStatus
    from compressed_tensors.quantization import initialize_module_for_quantization as initialize

    calibrating, embedding, inputs = make("int4", compress=False), nn.Embedding(9, 64), nn.Linear(64, 9)
    calibrating.quantization_status = QuantizationStatus.CALIBRATION
    initialize(embedding, QuantizationScheme(targets=["Embedding"], weights=QuantizationArgs(**INT4)))
    initialize(inputs, QuantizationScheme(targets=["Linear"], input_activations=QuantizationArgs(**ROUNDED)))
    six = make("mxfp8", compress=False)
    six.quantization_scheme.weights.num_bits = 6
    model = nn.Sequential(calibrating, embedding, inputs, six, nn.Linear(64, 9))
    for path, reason in (("0", "still calibrating"), ("1", "embedding"), ("2", "activations only"), ("3", "6 bits")):
        with pytest.raises(RuleError, match=reason):
            oftfx.plan(model, {path: OFT(8)})
    assert [s.fqn for s in oftfx.plan(model, "all-linear")] == ["4"]
    with pytest.raises(FormatError, match="still calibrating"):
        ct.dequantize(calibrating)
    decompressed = make("int4", compress=False)
    decompressed.quantization_status = QuantizationStatus.DECOMPRESSED
    with pytest.raises(FormatError, match="changed since then"):
        ct.codes(decompressed)


@pytest.mark.parametrize("name", OPTIONS)
def test_state_dict_copies_and_the_meta_device(ct, name):
    layer, other = make(name), make(name)
    before = bytes_of(dict(ct.read(layer)))
    ct.write(other, ct.requantize(torch.randn(40, 96), other))
    assert not same_bytes(bytes_of(dict(ct.read(other))), before)
    other.load_state_dict(layer.state_dict())
    assert same_bytes(bytes_of(dict(ct.read(other))), before)
    assert same_bytes(bytes_of(dict(ct.read(copy.deepcopy(layer)))), before)
    other.to("meta")
    (site,) = oftfx.plan(nn.Sequential(other), {"0": OFT(8)})
    assert (site.site.format, site.site.in_features, site.site.out_features) == ("compressed_tensors", 96, 40)
