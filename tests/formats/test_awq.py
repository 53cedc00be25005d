"""AWQ layers of gptqmodel and autoawq against the packages' own bytes and numbers, and as CPU kernels repack them."""

import copy

import pytest
import torch
import torch.nn as nn

import oftfx
from oftfx import OFT
from oftfx.formats.awq import make_awq
from oftfx.formats.registry import format_named, format_of
from tests.reference import dense_rotation, randomize, rel

pytestmark = [
    pytest.mark.needs("gptqmodel", "awq"),
    pytest.mark.filterwarnings("ignore:Using naive .slow. implementation:UserWarning"),
]
AWQ = format_named("awq")
WORDS = ("qweight", "qzeros", "scales")
KERNELS = ("AwqTorchLinear", "TorchAtenAwqLinear", "TorchCpuAvx512AwqLinear", "WQLinear_GEMM")


def kernels(*names):
    skip = pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="this CPU has no AVX512-BF16")
    return [pytest.param(n, marks=skip) if "Avx512" in n else n for n in names]


def official(layer):
    """By the dequantization of the layer's own package, (out, in)."""
    if type(layer).__name__ == "WQLinear_GEMM":
        from awq.utils.packing_utils import dequantize_gemm
    else:
        from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
    bits = getattr(layer, "bits", 4)
    return dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, bits, layer.group_size).T.float()


def bytes_of(layer):
    return {n: getattr(layer, n).clone() for n in WORDS}


def same_bytes(layer, before):
    return all(torch.equal(getattr(layer, n), b) and getattr(layer, n).dtype == b.dtype for n, b in before.items())


def parts_of(layer):
    """A float Linear with the layer's values, and scales and zeros (out, groups)."""
    weight, coded = official(layer), AWQ.codes(layer)
    linear = nn.Linear(*reversed(weight.shape)).requires_grad_(False)
    linear.weight.data = weight
    linear.bias.data = layer.bias.float()
    zeros = torch.full_like(coded.scale, 2 ** (getattr(layer, "bits", 4) - 1)) if coded.zero is None else coded.zero
    return linear, coded.scale.view(len(weight), -1), zeros.view(len(weight), -1)


CASES = [
    *[(b, (96, 64), 32) for b in range(2, 9)],
    *[(b, (64, 72), 16) for b in range(2, 9)],
    (4, (256, 128), 128),
    (4, (100, 72), -1),
    (4, (99, 8), -1),
    (3, (99, 8), -1),
]


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize(("bits", "shape", "group"), CASES, ids=str)
def test_bytes_and_values_are_those_of_gptqmodel(bits, shape, group, sym):
    layer = make_awq(nn.Linear(*shape), bits=bits, group_size=group, sym=sym)
    before, weight = bytes_of(layer), official(layer)
    assert torch.equal(AWQ.dequantize(layer), weight)
    fresh = make_awq(nn.Linear(*shape), bits=bits, group_size=group, sym=sym)
    fresh.pack(*parts_of(layer))
    assert same_bytes(fresh, before)
    AWQ.write(layer, AWQ.requantize(weight, layer))
    assert same_bytes(layer, before)
    x = torch.randn(3, shape[0]).half()
    with torch.no_grad():
        assert rel(layer.eval()(x), x.double() @ weight.double().T + layer.bias.double()) < 5e-4


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize(("shape", "group"), [((96, 64), 32), ((256, 128), 64), ((192, 320), 96)], ids=str)
def test_bytes_and_values_are_those_of_autoawq(shape, group, sym):
    layer = make_awq(nn.Linear(*shape), group_size=group, sym=sym, kernel="WQLinear_GEMM")
    before, weight = bytes_of(layer), official(layer)
    assert torch.equal(AWQ.dequantize(layer), weight)
    linear, scales, zeros = parts_of(layer)
    fresh = type(layer).from_linear(linear, 4, group, scales=scales.T.contiguous(), zeros=zeros.T.contiguous())
    assert same_bytes(fresh, before)
    AWQ.write(layer, AWQ.requantize(weight, layer))
    assert same_bytes(layer, before)
    x = torch.randn(3, shape[0]).half()
    assert rel(layer.eval()(x), x.double() @ weight.double().T + layer.bias.double()) < 5e-4


@pytest.mark.parametrize("shape", [(96, 72), (100, 72), (96, 8)], ids=str)
def test_odd_shapes_of_autoawq(shape):
    """Which its constructor takes, though its packer does not."""
    layer = make_awq(nn.Linear(*shape), group_size=-1, kernel="WQLinear_GEMM")
    assert torch.equal(AWQ.dequantize(layer), official(layer))
    twin = make_awq(nn.Linear(*shape), group_size=-1)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(official(twin), official(layer))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("sym", [False, True])
def test_compensated_rounding_beats_nearest_on_new_inputs(bits, sym):
    layer = make_awq(nn.Linear(128, 64), bits=bits, sym=sym)
    mix = torch.randn(128, 128) * torch.rand(128)
    seen, new = torch.randn(1024, 128) @ mix, torch.randn(256, 128) @ mix
    weight = torch.randn(64, 128) * 0.05

    def error(state):
        AWQ.write(layer, state)
        return rel(new @ official(layer).T, new @ weight.T)

    nearest = error(AWQ.requantize(weight, layer))
    assert error(AWQ.calibrate(weight, layer, seen.T @ seen)) < 0.85 * nearest
    assert (AWQ.codes(layer).zero is None) == sym


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_saturate(bits):
    layer = make_awq(nn.Linear(64, 32), bits=bits)
    weight = torch.rand(32, 64) + 3.0
    weight[::2] *= -1
    weight[5] = 0
    AWQ.write(layer, AWQ.requantize(weight, layer))
    half_step, float16 = 4.0 / (2**bits - 1) / 2, 4.0 * 2**-11
    assert (official(layer) - weight).abs().max() <= 1.001 * half_step + float16
    assert torch.equal(official(layer)[5], weight[5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kernel", kernels(*KERNELS))
def test_other_dtypes_of_the_scales(kernel, dtype):
    layer = make_awq(nn.Linear(96, 64), kernel=kernel).to(dtype)
    assert AWQ.dtype(layer) == dtype
    assert torch.equal(AWQ.dequantize(layer), official(layer))
    before = bytes_of(layer)
    AWQ.write(layer, AWQ.requantize(AWQ.dequantize(layer), layer))
    assert same_bytes(layer, before)


@pytest.mark.parametrize("kernel", kernels(*KERNELS))
def test_a_forward_uses_what_was_written_last(kernel):
    layer, x = make_awq(nn.Linear(64, 32), kernel=kernel).eval(), torch.randn(3, 64).half()
    AWQ.prepare(layer)
    for _ in range(3):
        AWQ.write(layer, AWQ.requantize(torch.randn(32, 64), layer))
        with torch.no_grad():
            assert rel(layer(x), x.float() @ AWQ.dequantize(layer).T + layer.bias) < 1e-3


def test_what_is_no_site():
    layer = make_awq(nn.Linear(64, 32))
    assert format_of(layer) is AWQ
    assert AWQ.matches(copy.deepcopy(layer).to("meta"))
    assert AWQ.geometry(copy.deepcopy(layer).to("meta")) == AWQ.geometry(layer)
    layer.adapter = object()
    assert format_of(layer) is None


def test_who_computes_by_itself():
    faults = {k: AWQ.native_fault(make_awq(nn.Linear(64, 32), kernel=k)) for k in ("AwqTorchLinear", "WQLinear_GEMM")}
    assert "rounds its scales" in faults["AwqTorchLinear"]
    assert "gives no gradients" in faults["WQLinear_GEMM"]
    assert AWQ.native_fault(make_awq(nn.Linear(64, 32), kernel="TorchAtenAwqLinear")) is None


@pytest.mark.parametrize("kernel", kernels("TorchCpuAvx512AwqLinear"))
def test_the_avx512_kernel_mistakes_dtypes_only_with_a_bias(kernel):
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    for bias, dtype in [(True, torch.float32), (False, torch.bfloat16)]:
        layer = make_awq(nn.Linear(64, 32, bias=bias), kernel=kernel)
        AWQ.prepare(layer)
        assert layer.train()(x).dtype == dtype
        assert (AWQ.native_fault(layer) is not None) == bias


def repack(layer, dtype):
    layer.eval()
    with torch.no_grad():
        layer(torch.randn(2, layer.in_features).to(dtype))
    assert layer._cpu_transformed


REPACKING = kernels("TorchAtenAwqLinear", "TorchCpuAvx512AwqLinear")


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("shape", [(256, 128), (192, 320), (128, 96), (96, 32)], ids=str)
@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [
        *[pytest.param(*p.values, torch.bfloat16, marks=p.marks) for p in kernels("TorchCpuAvx512AwqLinear")],
        ("TorchAtenAwqLinear", torch.float16),
        ("TorchAtenAwqLinear", torch.bfloat16),
    ],
)
def test_a_repacked_layer_is_read_and_undone(kernel, dtype, shape, sym):
    layer = make_awq(nn.Linear(*shape), kernel=kernel, sym=sym)
    weight, before, bias = official(layer), bytes_of(layer), layer.bias.clone()
    repack(layer, dtype)
    lossy = kernel == "TorchAtenAwqLinear" and dtype == torch.bfloat16
    assert AWQ.matches(layer)
    assert rel(AWQ.dequantize(layer), weight) < (3e-3 if lossy else 1e-9)
    requantized = AWQ.requantize(AWQ.dequantize(layer), layer)
    state = AWQ.read(layer)
    assert (AWQ.prepare(layer) is not None) == lossy
    for name, value in before.items():
        assert getattr(layer, name).dtype == requantized[name].dtype == value.dtype
        assert torch.equal(requantized[name], getattr(layer, name))
        if name == "scales" and lossy:
            assert rel(layer.scales, value) < 3e-3
        else:
            assert torch.equal(getattr(layer, name), value), name
    assert torch.equal(layer.bias, bias)
    assert layer.bias.dtype == bias.dtype
    assert AWQ.prepare(layer) is None
    x = torch.randn(3, shape[0], requires_grad=True)
    layer.train()(x).sum().backward()
    assert rel(x.grad, AWQ.dequantize(layer).sum(0).expand(3, -1)) < 1e-6
    AWQ.write(layer, state)
    assert layer._cpu_transformed
    assert layer.linear_mode == "inference"


@pytest.mark.parametrize("kernel", REPACKING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_eval_train_and_fold(kernel, dtype):
    """In every dtype, the original running its own kernel beside."""
    layer = make_awq(nn.Linear(256, 128, bias="Aten" in kernel), kernel=kernel)
    bias = layer.bias.double() if "Aten" in kernel else 0
    base = nn.Sequential(layer, nn.PReLU(init=1.0, dtype=dtype)).eval()  # which says what dtype the model computes in
    weight, before = official(layer).double(), bytes_of(layer)
    model = randomize(oftfx.transform(base, {"0": OFT(32)}))
    x = torch.randn(4, 256, dtype=dtype)
    with torch.no_grad():
        base(x)
    rotation = dense_rotation(model[0].oft.default.skew, 32)
    expected = x.double() @ (weight @ rotation.T).T + bias
    bound = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    with torch.no_grad():
        assert rel(model.eval()(x), expected) < bound
    assert rel(model.train()(x), expected) < bound
    model(x).float().sum().backward()
    assert model[0].oft.default.skew.grad.abs().sum() > 0
    with torch.no_grad():
        for policy, extra in [("keep", 0), ("float", 0), ("requantize", 0.12)]:
            assert rel(oftfx.fold(model, quantized=policy).model.eval()(x), expected) < bound + extra
    assert same_bytes(model[0], before)
    assert same_bytes(oftfx.unfold(oftfx.fold(model, quantized="requantize"))[0], before)


@pytest.mark.parametrize("kernel", kernels("TorchCpuAvx512AwqLinear"))
def test_training_mode_of_a_kernel_that_refuses_it(kernel):
    layer = make_awq(nn.Linear(64, 32), kernel=kernel)
    with pytest.raises(NotImplementedError):
        layer.train()
    model = oftfx.transform(nn.Sequential(layer), {"0": OFT(16)}).train()
    assert model[0].training
    twin = copy.deepcopy(model.eval()).train()
    assert twin[0].training
    assert not model[0].training
    with pytest.raises(NotImplementedError):
        layer.train()
