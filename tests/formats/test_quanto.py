"""optimum-quanto: values, packing and rounding against the package itself, and its own way to save and load."""

import copy

import pytest
import torch
import torch.nn as nn

import oftfx
from oftfx import OFT
from oftfx.errors import FormatError, OftfxWarning, RuleError
from oftfx.formats.quanto import make_quanto, packed, unpacked
from oftfx.formats.registry import format_named, format_of
from tests.formats.scalar_checks import bytes_of, check_bytes, check_calibration, check_folds, same_bytes
from tests.reference import dense_rotation, randomize, rel

pytestmark = pytest.mark.needs("optimum.quanto")

KINDS = ["qint8", "qfloat8", "qfloat8_e5m2", "qint4", "qint2", "qint4 zeros", "qint2 zeros"]
SHAPES = [(256, 40), (160, 33), (99, 5)]
"""In groups of 128 and 32, and with none."""


def make(kind, inner=256, outer=40, dtype=torch.float32, bias=True):
    torch.manual_seed(1)
    linear = nn.Linear(inner, outer, bias=bias)
    with torch.no_grad():
        linear.weight.normal_().mul_(torch.logspace(-2, 0, outer)[:, None] * 0.1)
    name, _, zeros = kind.partition(" ")
    return make_quanto(linear.to(dtype), name, zeropoint=bool(zeros))


@pytest.fixture
def quanto():
    return format_named("quanto")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_the_package_to_the_bit(quanto, kind, shape, dtype):
    if dtype == torch.bfloat16 and shape[0] == 256 and "int4" in kind:
        pytest.skip("the package lays it out for a kernel")
    layer = make(kind, *shape, dtype=dtype)
    assert format_of(layer) is quanto
    assert quanto.dtype(layer) == dtype
    assert torch.equal(quanto.dequantize(layer), layer.weight.dequantize().float())
    assert quanto.native_fault(layer) is None
    assert quanto.prepare(layer) is None
    check_bytes(quanto, layer)
    assert quanto.nbytes(layer) == sum(t.numel() * t.element_size() for n, t in layer.state_dict().items() if "." in n)


@pytest.mark.parametrize("kind", KINDS)
def test_folds(quanto, kind):
    check_folds(quanto, make(kind, 160, 33))


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 41])
@pytest.mark.parametrize("bits", [2, 4])
def test_packing_is_the_packages(bits, rows):
    from optimum.quanto.tensor.packed import PackedTensor

    codes = torch.randint(0, 2**bits, (rows, 7), dtype=torch.uint8)
    theirs = PackedTensor.pack(codes, bits)
    assert torch.equal(packed(codes, bits), theirs._data)
    assert torch.equal(unpacked(theirs._data, bits, rows), codes)


BOUNDS = {"qint8": 0.008, "qfloat8": 0.03, "qfloat8_e5m2": 0.06, "qint4": 0.1, "qint2": 0.5}


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_is_as_good_as_the_packages(quanto, kind):
    name, _, zeros = kind.partition(" ")
    linear, layer = nn.Linear(160, 33), make(kind, 160, 33)
    theirs = rel(make_quanto(linear, name, zeropoint=bool(zeros)).weight.dequantize(), linear.weight)
    quanto.write(layer, quanto.requantize(linear.weight.detach(), layer))
    error = rel(layer.weight.dequantize(), linear.weight)
    assert error < 1.02 * theirs
    assert error < BOUNDS[name]


@pytest.mark.parametrize("kind", ["qint8", "qfloat8", "qint4", "qint2 zeros"])
def test_calibrated_rounding(quanto, kind):
    check_calibration(quanto, make(kind, 64, 48))


def test_training_and_bfloat16_kernels(quanto):
    """The package's TinyGemm layout, which rounds shifts, is taken back to that of its files; with a notice."""
    layer = make("qint4", 256, 48, dtype=torch.bfloat16)
    assert type(layer.weight).__name__ == "TinyGemmWeightQBitsTensor"
    before = quanto.dequantize(layer)
    x = torch.randn(4, 256, dtype=torch.bfloat16)
    with torch.no_grad():
        assert rel(layer(x).float(), x.float() @ before.T + layer.bias.float()) < 1e-2
    with pytest.warns(OftfxWarning, match="laid out for a kernel"):
        model = randomize(oftfx.transform(nn.Sequential(layer), {"0": OFT(16)}))
    assert type(layer.weight).__name__ == "TinyGemmWeightQBitsTensor"
    assert type(model[0].weight).__name__ == "WeightQBitsTensor"
    assert torch.equal(quanto.dequantize(model[0]), before)
    check_bytes(quanto, model[0])
    out = model(x)
    wanted = x.double() @ dense_rotation(model[0].oft.default.skew, 16) @ before.double().T + layer.bias.double()
    assert rel(out, wanted) < 1e-2
    out.float().square().sum().backward()
    assert model[0].oft.default.skew.grad.abs().sum() > 0
    assert model[0].weight.grad is None


def test_what_is_refused_by_name(quanto):
    from optimum.quanto import QConv2d, QLinear, qint4, qint8

    model = nn.Sequential(
        QLinear.from_module(nn.Linear(64, 8), weights=qint8),
        QLinear.from_module(nn.Linear(64, 8), weights=qint8, activations=qint8),
        QConv2d.from_module(nn.Conv2d(4, 8, 3), weights=qint4),
        nn.Linear(64, 8),
    )
    model[1].freeze()
    model[2].freeze()
    for path, reason in (("0", "call freeze"), ("1", "rounds its activations"), ("2", "QConv2d of optimum-quanto")):
        with pytest.raises(RuleError, match=reason):
            oftfx.plan(model, {path: OFT(4)})
        with pytest.raises(FormatError, match=reason):
            quanto.dequantize(model[int(path)])
    assert [s.fqn for s in oftfx.plan(model, "all-linear")] == ["3"]
    with pytest.raises(RuntimeError, match="deepcopy"):  # a fault of the package under today's torch
        copy.deepcopy(make("qint8"))


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_and_the_meta_device(quanto, kind):
    layer, other = make(kind), make(kind)
    before = bytes_of(dict(quanto.read(layer)))
    quanto.write(other, quanto.requantize(torch.randn(40, 256), other))
    assert not same_bytes(bytes_of(dict(quanto.read(other))), before)
    other.load_state_dict(layer.state_dict())
    assert same_bytes(bytes_of(dict(quanto.read(other))), before)
    other.to("meta")
    (site,) = oftfx.plan(nn.Sequential(other), {"0": OFT(8)})
    assert (site.site.format, site.site.in_features, site.site.out_features) == ("quanto", 256, 40)


@pytest.mark.needs("transformers")
@pytest.mark.parametrize("policy", ["requantize", "calibrate", "float"])
@pytest.mark.parametrize("kind", ["qint8", "qint4", "qfloat8"])
def test_the_packages_own_loader_reads_a_folded_model(tiny_llama, ids, tmp_path, kind, policy):
    from optimum.quanto import freeze, qtypes, quantization_map, quantize, requantize
    from safetensors.torch import load_file, save_file

    base = tiny_llama(hidden_size=192, intermediate_size=160)
    quantize(base, weights=qtypes[kind], exclude="lm_head")
    freeze(base)
    model = randomize(oftfx.transform(base.requires_grad_(False), {"all-linear": OFT(16)}), std=0.1).eval()
    with torch.no_grad():
        turned = model(**ids()).logits
    result = oftfx.fold(model, quantized=policy, calibration=[ids(4, 20, seed=s) for s in range(2)])
    with torch.no_grad():
        wanted = result.model(**ids()).logits
    assert (rel(wanted, turned) < 1e-5) == (policy == "float")
    assert rel(wanted, turned) < 0.5
    save_file(dict(result.model.state_dict()), tmp_path / "model.safetensors")
    fresh = tiny_llama(hidden_size=192, intermediate_size=160)
    requantize(fresh, load_file(tmp_path / "model.safetensors"), quantization_map(result.model))
    with torch.no_grad():
        assert rel(fresh.eval()(**ids()).logits, wanted) < 1e-6
    restored = oftfx.unfold(result)
    with torch.no_grad():
        assert torch.equal(restored(**ids()).logits, turned)
