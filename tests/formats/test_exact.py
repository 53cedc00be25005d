"""Layers that multiply by their dequantized weight: outputs, gradients, memory, copies."""

import copy
import io

import pytest
import torch
import torch.nn as nn

import oftfx
from oftfx import OFT
from oftfx.formats.exact import ExactForward, choose_kernel, is_exact, use_exact, use_native
from oftfx.formats.registry import format_of, formats
from oftfx.model.structure import structural_copy
from tests.quantized import quantize
from tests.reference import dense_rotation, randomize, rel

IN, OUT, BLOCK = 128, 64, 16
FAULTY = ["hf_fp8", "aqlm", "torchao"]
KINDS = [
    pytest.param("bnb4", marks=pytest.mark.needs("bitsandbytes")),
    pytest.param("hqq", marks=pytest.mark.needs("hqq")),
    pytest.param("hf_fp8", marks=pytest.mark.needs("transformers")),
    pytest.param("aqlm", marks=pytest.mark.needs("aqlm")),
    pytest.param("torchao", marks=pytest.mark.needs("torchao")),
]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def make(kind):
    if kind == "torchao":  # rounds its inputs as well, and has no gradient
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        result = nn.Sequential(nn.Linear(IN, OUT))
        quantize_(result, Int8DynamicActivationInt8WeightConfig())
        return result[0]
    if kind == "aqlm":
        from aqlm import QuantizedLinear

        options = {"in_group_size": 8, "out_group_size": 1, "num_codebooks": 2, "nbits_per_codebook": 8}
        layer = QuantizedLinear(IN, OUT, bias=True, dtype=torch.float32, **options)
        layer.codes.data = torch.randint(-128, 128, layer.codes.shape, dtype=torch.int8)
        layer.codebooks.data = torch.randn(layer.codebooks.shape) * 0.05
        layer.scales.data = torch.rand(layer.scales.shape) + 0.5
        layer.bias.data = torch.randn(OUT)
        return layer.requires_grad_(False)
    return quantize(nn.Linear(IN, OUT), kind)


@pytest.fixture
def layer(kind):
    result = make(kind)
    use_exact(result)
    return result


def float_weight(layer):
    return format_of(layer).dequantize(layer).double()


@pytest.mark.parametrize("shape", [(5, IN), (2, 3, IN), (IN,), (0, IN), (1, 1, 1, IN)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_outputs_and_gradients_are_those_of_float64(layer, shape, bias):
    weight, offset = float_weight(layer), layer.bias.detach().double()
    layer.bias.requires_grad_(bias)
    layer.bias.grad = None
    x, upstream = torch.randn(shape, requires_grad=True), torch.randn(*shape[:-1], OUT)
    y = layer(x)
    assert y.dtype == torch.float32
    assert y.shape == upstream.shape
    (y * upstream).sum().backward()
    assert torch.allclose(y.double(), x.double() @ weight.T + offset, rtol=1e-5, atol=1e-5)
    assert torch.allclose(x.grad.double(), upstream.double() @ weight, rtol=1e-5, atol=1e-5)
    if bias:
        expected = upstream.double().reshape(-1, OUT).sum(0)
        assert torch.allclose(layer.bias.grad.double(), expected, rtol=1e-5, atol=1e-5)
    else:
        assert layer.bias.grad is None


def test_only_the_bias_may_want_a_gradient(layer):
    layer.bias.requires_grad_(True)
    layer(torch.randn(7, IN)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((OUT,), 7.0))
    with torch.no_grad():
        assert not layer(torch.randn(7, IN)).requires_grad
    layer.bias.requires_grad_(False)
    assert not layer(torch.randn(7, IN)).requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_it_multiplies_in_the_dtype_of_the_input(layer, dtype):
    x = torch.randn(5, IN, dtype=dtype, requires_grad=True)
    y = layer(x)
    assert y.dtype == dtype
    y.sum().backward()
    assert x.grad.dtype == dtype
    bound = {torch.float64: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    weight = float_weight(layer)
    assert rel(y, x.double() @ weight.T + layer.bias.double()) < bound
    assert rel(x.grad, weight.sum(0).expand(5, -1)) < bound


def test_autocast(layer):
    layer.bias.requires_grad_(True)
    x = torch.randn(5, IN, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
    assert (x.grad.dtype, layer.bias.grad.dtype) == (torch.float32, torch.float32)
    weight = float_weight(layer)
    expected = x.double() @ weight.T + layer.bias.double()
    assert rel(y, expected) < 1e-2
    assert rel(x.grad, 2 * expected @ weight) < 2e-2
    assert rel(layer.bias.grad, 2 * expected.sum(0)) < 2e-2


def test_nothing_as_large_as_the_weight_is_kept_for_the_backward(kind):
    """Of one layer, and of a chain of them behind rotations; an ordinary Linear keeps its weight."""

    def largest(function):
        sizes = [0]

        def seen(tensor):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(seen, lambda t: t):
            out = function()
        out.sum().backward()
        return max(sizes)

    layer = make(kind)
    use_exact(layer)
    x = torch.randn(3, IN, requires_grad=True)
    assert largest(lambda: layer(x)) == 0
    assert largest(lambda: nn.Linear(IN, OUT).requires_grad_(False)(x)) == IN * OUT
    model = randomize(oftfx.transform(nn.Sequential(make(kind)), {"0": OFT(BLOCK, kernel="exact")})).train()
    assert is_exact(model[0])
    assert largest(lambda: model(torch.randn(3, IN))) < IN * OUT / 2
    assert model[0].oft.default.skew.grad.any()


def test_the_backward_can_run_once_and_the_weight_is_read_anew(layer):
    x = torch.randn(3, IN, requires_grad=True)
    y = layer(x)
    (first,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (second,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(first, second)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_keywords(layer):
    x = torch.randn(3, IN)
    assert torch.equal(layer(input=x), layer(x))
    assert torch.equal(layer(x=x), layer(x))


def saved_and_loaded(model):
    """Pickled as a whole; torch's own functions know float8."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "structural": structural_copy, "pickle": saved_and_loaded}


@pytest.mark.parametrize("copied", COPIES)
def test_copies_multiply_by_their_own_weight(kind, copied):
    if kind == "torchao" and copied == "pickle":
        with pytest.raises(AttributeError, match="functools.partial"):  # torchao's layers cannot, with oftfx or without
            saved_and_loaded(make(kind))
        return
    model = randomize(oftfx.transform(nn.Sequential(make(kind)), {"0": OFT(BLOCK, kernel="exact")}))
    x = torch.randn(3, IN)
    expected = model(x)
    other = COPIES[copied](model)
    forward = other[0].__dict__["forward"]
    assert isinstance(forward, ExactForward)
    assert forward.module is other[0]
    assert forward.format is format_of(other[0]) or copied == "pickle"
    assert torch.equal(other(x), expected)
    weight_format = format_of(other[0])
    weight_format.write(other[0], weight_format.requantize(weight_format.dequantize(other[0]) * 0 + 0.1, other[0]))
    changed = other(x)
    assert rel(changed, expected) > 0.1
    assert torch.equal(model(x), expected)
    rotation = dense_rotation(model[0].oft.default.skew.detach(), BLOCK)
    wanted = x.double() @ rotation @ float_weight(other[0]).T + other[0].bias.double()
    assert rel(changed, wanted) < 1e-5


def test_the_native_forward_comes_back_where_it_is_fine(kind):
    faulty = kind in FAULTY
    layer = make(kind)
    asked, note = choose_kernel(layer, "auto")
    assert (asked == "exact", bool(note)) == (faulty, faulty)
    base = nn.Sequential(layer)
    plain = dict(vars(layer))
    model = randomize(oftfx.transform(base, {"0": OFT(BLOCK, kernel="exact")}))
    assert is_exact(model[0])
    assert "forward" not in vars(base[0])
    assert set(vars(base[0])) == set(plain)
    for policy, kept in (("keep", True), ("requantize", faulty)):
        folded = oftfx.fold(model, quantized=policy).model
        assert is_exact(folded[0]) == kept
        again = oftfx.unfold(oftfx.fold(model, quantized=policy))
        assert is_exact(again[0])
    inplace = oftfx.fold(copy.deepcopy(model), quantized="requantize", inplace=True, undo=True)
    assert is_exact(inplace.model[0]) == faulty
    assert is_exact(oftfx.unfold(inplace)[0])
    assert type(oftfx.fold(model, quantized="float").model[0]) is nn.Linear
    oftfx.remove_adapter(model, "default")
    assert is_exact(model[0]) == faulty
    use_exact(model[0])
    use_native(model[0])
    assert is_exact(model[0]) == faulty


def test_overrides_are_noted_in_the_plan(kind):
    base, faulty = nn.Sequential(make(kind)), kind in FAULTY
    for asked, expected in (("auto", "exact" if faulty else "native"), ("native", "native"), ("exact", "exact")):
        (entry,) = oftfx.plan(base, {"0": OFT(BLOCK, kernel=asked)})
        assert entry.kernel == expected
        notes = " ".join(entry.notes)
        assert ("multiplies exactly" in notes) == (faulty and asked == "auto")
        assert ("keeps its own forward, as asked, although" in notes) == (faulty and asked == "native")
        model = oftfx.transform(base, {"0": OFT(BLOCK, kernel=asked)})
        assert is_exact(model[0]) == (expected == "exact")


def test_float_layers_are_left_alone():
    base = nn.Sequential(nn.Linear(IN, OUT))
    (entry,) = oftfx.plan(base, {"0": OFT(BLOCK, kernel="exact")})
    assert (entry.kernel, choose_kernel(base[0], "exact")) == ("native", ("native", ""))
    assert not is_exact(oftfx.transform(base, {"0": OFT(BLOCK, kernel="exact")})[0])
    use_native(base[0])
    assert "forward" not in vars(base[0])


@pytest.mark.needs("transformers")
def test_two_adapters_and_a_saved_one_keep_it(tmp_path):
    base = nn.Sequential(formats()["hf_fp8"].make_tiny(IN, OUT))
    model = randomize(oftfx.transform(base, {"0": OFT(BLOCK)}))
    oftfx.add_adapter(model, "b", {"0": OFT(BLOCK)})
    oftfx.set_adapter(model, "b")
    oftfx.remove_adapter(model, "default")
    assert is_exact(model[0])
    randomize(model)
    x = torch.randn(3, IN)
    for convention in ("peft", "oftfx"):
        oftfx.save_adapter(model, tmp_path / convention, adapter="b", convention=convention)
        loaded = oftfx.load_adapter(copy.deepcopy(base), tmp_path / convention)
        assert is_exact(loaded[0])
        (entry,) = oftfx.adapters(loaded)["default"]
        assert entry.kernel == "exact"
        assert "multiplies exactly" in " ".join(entry.notes)
        assert torch.equal(loaded(x), model(x))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled(kind):
    model = randomize(oftfx.transform(nn.Sequential(make(kind)), {"0": OFT(BLOCK, kernel="exact")})).train()
    x = torch.randn(3, IN)
    model(x).square().sum().backward()
    expected, wanted = model(x).detach(), model[0].oft.default.skew.grad.clone()
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    y = compiled(x)
    y.square().sum().backward()
    assert rel(y, expected) < 1e-6
    assert rel(model[0].oft.default.skew.grad, wanted) < 1e-5
