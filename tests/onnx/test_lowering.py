"""Lowered layers in models: rotations, sharing, dtypes, ranks, names, and what is refused."""

import copy

import numpy as np
import onnx
import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st

import oftfx
from oftfx import OFT
from oftfx.errors import ExportError
from oftfx.formats.base import Geometry, WeightFormat
from oftfx.formats.registry import format_of, formats, register_format
from oftfx.grids import Partition
from oftfx.onnx.lower import lower_quantized
from oftfx.onnx.lower.look_up import expanded
from oftfx.onnx.lower.weight import narrowed, packed
from tests.onnx.lowered import CASES, marks, network
from tests.onnx.test_lowered_formats import SHAPES, expected, in_onnx_runtime, initializers, product
from tests.reference import dense_rotation, randomize, rel

pytestmark = pytest.mark.needs("onnx", "onnxruntime", "onnxscript")


def kinds(*names):
    return [pytest.param(n, marks=marks(CASES[n], "ort")) for n in names]


def export(model, path, x, **kwargs):
    shapes = {"input": {i: f"axis_{i}" for i in range(x.dim() - 1)}}
    return oftfx.export_onnx(model, path, (x,), dynamic_shapes=shapes, **kwargs)


@pytest.mark.parametrize("dialect", ["ort", "standard"])
@pytest.mark.parametrize("state", ["unfolded", "keep", "requantize"])
@pytest.mark.parametrize("name", kinds("bnb8", "fp8 blocks", "gptq 4 act-order", "hqq 1", "aqlm 2x8", "inc fp8"))
def test_rotations_stay_in_front(name, state, dialect, tmp_path):
    found = CASES[name]
    base = network(found, found.sizes)
    model = randomize(oftfx.transform(base, {"*": OFT(16)}), std=0.1).eval()
    x = torch.randn(5, 4, found.sizes[0])
    turned = x.double() @ dense_rotation(model[0].oft.default.skew, 16)
    between = product(model[0], turned).relu() @ dense_rotation(model[2].oft.default.skew, 16)
    wanted = product(model[2], between)
    exported = model if state == "unfolded" else oftfx.fold(model, quantized=state).model
    if state == "requantize":
        wanted = expected(exported, x)
    before = copy.deepcopy({n: format_of(exported[n]).dequantize(exported[n]) for n in (0, 2)})
    report = oftfx.export_onnx(
        exported, tmp_path / "m.onnx", (torch.randn(2, 3, 192),), dynamic_shapes=SHAPES, dialect=dialect
    )
    assert rel(in_onnx_runtime(tmp_path / "m.onnx", x), wanted) <= max(found.bound, 2e-6)
    rotated = rel(wanted, expected(base, x)) if state != "requantize" else 1.0
    assert rotated > 0.1
    assert report.operators.get("MatMul", 0) == (0 if state == "requantize" else 2)
    assert all(torch.equal(format_of(exported[n]).dequantize(exported[n]), w) for n, w in before.items())


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("name", kinds("nf4", "bnb8", "fp8 one scale", "gptq 4 act-order", "aqlm 2x8"))
def test_inputs_of_every_rank(name, rank, tmp_path):
    model = network(CASES[name], (192, 320, 64))
    export(model, tmp_path / "m.onnx", torch.randn(*(2, 3, 5)[: rank - 1], 192))
    x = torch.randn(*(4, 5, 3)[: rank - 1], 192)
    assert rel(in_onnx_runtime(tmp_path / "m.onnx", x), expected(model, x)) <= CASES[name].bound


@pytest.mark.parametrize("dialect", ["ort", "standard"])
@pytest.mark.parametrize("name", kinds("nf4", "fp8 one scale", "eetq float16", "gptq 4 act-order", "hqq float16"))
def test_half_precision(name, dialect, tmp_path):
    model = network(CASES[name], (192, 320, 64)).half()
    export(model, tmp_path / "m.onnx", torch.randn(2, 192).half(), dialect=dialect)
    x = torch.randn(7, 192).half()
    got = in_onnx_runtime(tmp_path / "m.onnx", x)
    assert got.dtype == torch.float16
    assert rel(got, expected(model, x)) < 1e-3


@pytest.mark.needs("bitsandbytes")
@pytest.mark.parametrize("dialect", ["ort", "standard"])
def test_a_layer_that_is_called_twice_and_equal_layers(dialect, tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = CASES["bnb8"].make(nn.Linear(32, 32))
            self.b, self.c = copy.deepcopy(self.a), self.a

        def forward(self, input):
            return self.b(torch.relu(self.c(torch.relu(self.a(input)))))

    model = Twice()
    report = export(model, tmp_path / "m.onnx", torch.randn(2, 32), dialect=dialect)
    x = torch.randn(9, 32)
    once = product(model.a, product(model.a, x.double()).relu())
    assert rel(in_onnx_runtime(tmp_path / "m.onnx", x), product(model.b, once.relu())) < 2e-6
    names = {n for n in initializers(tmp_path / "m.onnx") if n.endswith("qweight")}
    assert names in ({"a.qweight", "b.qweight"}, {"c.qweight", "b.qweight"})  # one name of two is kept
    counted = report.operators["com.microsoft::MatMulNBits" if dialect == "ort" else "DequantizeLinear"]
    assert counted == (3 if dialect == "ort" else 2)  # what is dequantized for both calls is so once


@pytest.mark.parametrize("name", kinds("gptq 4 symmetric"))
def test_four_bits_are_stored_as_such(name, tmp_path):
    """Also beside the model file, where large weights lie."""
    model = network(CASES[name], (192, 320, 64))
    export(model, tmp_path / "m.onnx", torch.randn(2, 192), dialect="standard")
    found = initializers(tmp_path / "m.onnx")["0.qweight"]
    assert found.data_type == onnx.TensorProto.INT4
    assert list(found.dims) == [320, 192]
    assert len(found.raw_data) == 320 * 192 // 2
    weight_format = format_of(model[0])
    codes = weight_format.codes(model[0]).codes - 8
    assert np.array_equal(onnx.numpy_helper.to_array(found).astype(np.int16), codes.numpy())


@pytest.mark.needs("transformers")
def test_large_quantized_weights_lie_beside_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr("oftfx.onnx.finish.LARGE", 1000)
    model = network(CASES["fp8 blocks"], (192, 320, 64))
    export(model, tmp_path / "m.onnx", torch.randn(2, 192))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert (tmp_path / "m.onnx.data").stat().st_size >= 192 * 320 + 320 * 64
    x = torch.randn(5, 192)
    assert rel(in_onnx_runtime(tmp_path / "m.onnx", x), expected(model, x)) < 2e-6


@pytest.mark.needs("transformers")
def test_an_opset_that_is_too_low_is_refused(tmp_path):
    model, x = network(CASES["fp8 blocks"], (192, 320, 64)), torch.randn(2, 192)
    with pytest.raises(ExportError, match="0: its quantized weight needs opset 21 in dialect 'ort', and opset=20"):
        export(model, tmp_path / "m.onnx", x, opset=20)
    assert not list(tmp_path.iterdir())
    assert export(model, tmp_path / "m.onnx", x, opset=22).opset == 22
    assert rel(in_onnx_runtime(tmp_path / "m.onnx", x), expected(model, x)) < 2e-6


@pytest.mark.needs("gptqmodel")
def test_groups_that_no_grid_has_are_refused(tmp_path):
    model = network(CASES["gptq 4 act-order"], (192, 320, 64))
    model[2].g_idx[:3] = 1
    with pytest.raises(ExportError, match=r"2: .*g_idx does not put 32 columns .*; fold with quantized='float' first"):
        export(model, tmp_path / "m.onnx", torch.randn(2, 192))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.whole = nn.Parameter(torch.ones(4, 4))


class Foreign(WeightFormat):
    """A user's format that only dequantizes."""

    name = "foreign"

    def matches(self, module):
        return isinstance(module, Scaled)

    def geometry(self, module):
        return Geometry("linear", 4, 4)

    def dtype(self, module):
        return torch.float32

    def dequantize(self, module):
        return module.whole.detach().float() * 2

    def requantize(self, weight, like):
        return {}

    def read(self, module):
        return {}

    def write(self, module, state):
        pass

    def nbytes(self, module):
        return 64

    def make_tiny(self, in_features, out_features, *, bias=True):
        return Scaled()


def test_a_format_without_operator_is_refused(monkeypatch):
    monkeypatch.setattr("oftfx.formats.registry._formats", formats())
    register_format(Foreign())
    with pytest.raises(ExportError, match="0: format foreign has no operator in dialect 'standard'; fold with"):
        lower_quantized(nn.Sequential(Scaled()), "standard")


@pytest.mark.needs("torchao")
def test_a_rounding_that_a_runtime_leaves_out_is_refused():
    """bfloat16 products under a scale for each row; ONNX Runtime rounds them, OpenVINO does not."""
    layer = CASES["torchao float8"].make(nn.Linear(64, 32).bfloat16())
    with pytest.raises(ExportError, match="0: format torchao has no operator in dialect 'openvino'; fold with"):
        lower_quantized(nn.Sequential(layer), "openvino")
    lowered = lower_quantized(nn.Sequential(layer), "ort")
    assert lowered.opset == 19
    assert lowered.deviation == 0  # the file rounds as the layer does, so it is held to the bound of floats


@pytest.mark.needs("torchao")
def test_products_that_are_rounded_to_bfloat16_are_rounded_in_the_file(tmp_path):
    layer = CASES["torchao float8"].make(nn.Linear(64, 32, bias=False).bfloat16())

    class Casts(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, input):
            return self.layer(input)

    export(Casts(), tmp_path / "m.onnx", torch.randn(2, 64))
    x = torch.randn(5, 64)
    assert rel(in_onnx_runtime(tmp_path / "m.onnx", x), product(layer, x.double())) < 2e-6


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_repeated_scales_are_those_of_the_partition(data):
    rows, columns = data.draw(st.integers(1, 13)), data.draw(st.integers(1, 17))
    kind = data.draw(st.sampled_from(["tiles", "flat", "strided"]))
    if kind == "tiles":
        cut = Partition.tiles((rows, columns), (data.draw(st.integers(1, 15)), data.draw(st.integers(1, 19))))
    elif kind == "flat":
        cut = Partition.flat((rows, columns), data.draw(st.integers(1, 20)))
    else:
        divisors = [d for d in range(1, rows * columns + 1) if rows * columns % d == 0]
        cut = Partition.strided((rows, columns), data.draw(st.sampled_from(divisors)))
    values = torch.randn(cut.groups)
    assert torch.equal(expanded(values, cut).expand(rows, columns), cut.expand(values))


@given(st.sampled_from([1, 2, 4, 8]), st.booleans(), st.lists(st.integers(0, 255), min_size=1, max_size=20))
def test_packed_bytes(bits, high_first, numbers):
    codes = [n % 2**bits for n in numbers]
    got = packed(torch.tensor(codes, dtype=torch.int16), bits, high_first=high_first).tolist()
    per = 8 // bits
    filled = codes + [0] * (-len(codes) % per)
    for index, byte in enumerate(got):
        part = filled[index * per : (index + 1) * per]
        assert byte == sum(c << bits * i for i, c in enumerate(reversed(part) if high_first else part))
    assert len(got) == len(filled) // per


def test_scales_are_narrowed_only_where_nothing_is_lost():
    assert narrowed(torch.tensor([1.5, 2.0**-24])).dtype == torch.float16
    assert narrowed(torch.tensor([1.5, 2.0**-100])).dtype == torch.bfloat16
    assert narrowed(torch.tensor([1.5, 2.0**20 + 1])).dtype == torch.float32
    assert narrowed(torch.tensor([1.5, 1 / 3])).dtype == torch.float32


@pytest.mark.needs("compressed_tensors")
def test_nvfp4_is_rounded_to_bfloat16_in_the_graph_or_refused(tmp_path):
    from oftfx.formats.compressed_tensors import make_compressed

    torch.manual_seed(0)
    options = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    base = nn.Sequential(make_compressed(nn.Linear(96, 40), **options, scale_dtype=torch.float8_e4m3fn)).eval()
    model = randomize(oftfx.transform(base, {"*": OFT(16)}), std=0.1).eval()
    folded, x = oftfx.fold(model, quantized="requantize").model, torch.randn(5, 96)
    for dialect in ("ort", "standard"):
        report = export(folded, tmp_path / f"{dialect}.onnx", x, dialect=dialect)
        assert report.operators["Gather"] == 1
        assert rel(in_onnx_runtime(tmp_path / f"{dialect}.onnx", x), product(folded[0], x.double())) < 2e-6
    assert (tmp_path / "ort.onnx").stat().st_size < 96 * 40 * 1.2 + 6000
    with pytest.raises(ExportError, match="compressed_tensors has no operator in dialect 'openvino'"):
        export(folded, tmp_path / "openvino.onnx", x, dialect="openvino")
