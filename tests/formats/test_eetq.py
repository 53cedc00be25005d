import copy

import numpy as np
import pytest
import torch
import torch.nn as nn

import oftfx
from oftfx import OFT
from oftfx.errors import FormatError
from oftfx.formats.eetq import make_eetq, processed, unprocessed
from oftfx.formats.exact import use_exact
from oftfx.formats.registry import format_named, format_of
from tests.formats import eetq_kernel
from tests.reference import dense_rotation, randomize, rel

pytestmark = pytest.mark.needs("transformers")
EETQ = format_named("eetq")
SHAPES = [(64, 64), (256, 128), (192, 320), (64, 448), (704, 64)]  # (in, out); the kernel takes multiples of 64 only


@pytest.fixture(autouse=True)
def _kernel(monkeypatch):
    pytest.importorskip("transformers")
    eetq_kernel.install(monkeypatch)


def dense(layer):
    """By the numpy layout, in the dtype of the scales."""
    codes = torch.from_numpy(eetq_kernel.codes_of(layer.weight.detach().numpy()))
    return (codes.to(layer.weight_scales.dtype) * layer.weight_scales).T


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_layout_equals_its_definition_step_by_step(shape):
    codes = np.random.default_rng(0).integers(-128, 128, shape, dtype=np.int8)
    expected = torch.from_numpy(eetq_kernel.layout(codes))
    got = processed(torch.from_numpy(codes).T)
    assert torch.equal(got, expected)
    assert not torch.equal(got, torch.from_numpy(codes))
    assert got.is_contiguous()
    assert torch.equal(unprocessed(expected), torch.from_numpy(codes).T)
    assert torch.equal(unprocessed(expected.T.contiguous().T), torch.from_numpy(codes).T)  # any strides


def test_the_tests_own_inverse_undoes_the_definition():
    codes = np.random.default_rng(1).integers(-128, 128, (192, 128), dtype=np.int8)
    assert np.array_equal(eetq_kernel.codes_of(eetq_kernel.layout(codes)), codes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_dequantize_equals_the_layers_own_forward(shape, bias, dtype):
    layer = make_eetq(nn.Linear(*shape, bias=bias)).to(dtype)
    assert format_of(layer) is EETQ
    assert EETQ.dtype(layer) == dtype
    weight = EETQ.dequantize(layer)
    assert torch.equal(weight, dense(layer).float())
    identity = torch.eye(shape[0], dtype=dtype)
    with torch.no_grad():
        own = layer(identity) - (layer.bias if bias else 0)
        expected = (weight.T.to(dtype) + layer.bias) - layer.bias if bias else weight.T.to(dtype)
    assert torch.equal(own, expected)


def test_quantization_is_the_nearest_of_256_values_a_row():
    linear = nn.Linear(256, 128)
    layer, weight = make_eetq(linear), linear.weight.detach()
    assert layer.weight.dtype == torch.int8
    assert layer.weight_scales.dtype == layer.bias.dtype == torch.float16
    assert torch.equal(layer.weight_scales, (weight.abs().amax(1) / 128).half())
    codes = eetq_kernel.codes_of(layer.weight.numpy()).T
    scale = layer.weight_scales.double().numpy()[:, None]
    assert np.array_equal(codes, np.clip(np.round(weight.double().numpy() / scale), -128, 127))
    assert rel(EETQ.dequantize(layer), weight) < 0.005  # uniform weights; measured 0.0045


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_rows_that_have_not_changed_keep_every_byte(dtype):
    layer = make_eetq(nn.Linear(192, 128)).to(dtype)
    weight = EETQ.dequantize(layer)
    state = EETQ.requantize(weight, layer)
    assert torch.equal(state["weight"], layer.weight)
    assert torch.equal(state["weight_scales"], layer.weight_scales)
    assert all(state[n].data_ptr() != getattr(layer, n).data_ptr() for n in state)
    weight[5] *= 1.7
    state = EETQ.requantize(weight, layer)
    rest = torch.arange(128) != 5
    assert torch.equal(unprocessed(state["weight"].data)[rest], unprocessed(layer.weight.data)[rest])
    assert torch.equal(state["weight_scales"][rest], layer.weight_scales[rest])
    assert state["weight_scales"][5] > layer.weight_scales[5]


def test_zero_rows_and_tiny_ones_stay_finite():
    linear = nn.Linear(64, 64)
    with torch.no_grad():
        linear.weight[0], linear.weight[1] = 0, 1e-9
        linear.weight[2] *= 1e-4
    layer = make_eetq(linear)
    weight = EETQ.dequantize(layer)
    assert weight.isfinite().all()
    assert not weight[:2].any()
    assert rel(weight[2], linear.weight[2]) < 0.01  # its scale is a subnormal float16, which has few bits
    layer.weight_scales.data[3] = 0  # as a quantizer may store a row of zeros
    base = EETQ.dequantize(layer)
    assert torch.equal(EETQ.requantize(base, layer)["weight"], layer.weight)
    base[4] *= 1.5
    EETQ.write(layer, EETQ.requantize(base, layer))
    assert EETQ.dequantize(layer).isfinite().all()


def test_compensated_rounding_beats_nearest_on_other_inputs():
    linear = nn.Linear(256, 128)
    mix = torch.randn(256, 256) / torch.arange(1, 257).sqrt()
    seen, unseen = (torch.randn(4000, 256) @ mix for _ in range(2))
    layer = make_eetq(linear)
    rotation = dense_rotation(torch.randn(8, 496) * 0.05, 32).float()
    target = linear.weight.detach() @ rotation.T

    def error(state):
        fresh = copy.deepcopy(layer)
        EETQ.write(fresh, state)
        return rel(unseen @ EETQ.dequantize(fresh).T, unseen @ target.T)

    nearest = error(EETQ.requantize(target, layer))
    calibrated = error(EETQ.calibrate(target, layer, seen.T @ seen))
    assert calibrated < 0.55 * nearest  # measured 0.00272 and 0.00563


@pytest.mark.parametrize("policy", ["keep", "float", "requantize"])
def test_half_precision_layers_through_every_policy(policy):
    base = nn.Sequential(make_eetq(nn.Linear(256, 128)))
    raw = base[0].weight.clone()
    model = randomize(oftfx.transform(base, {"0": OFT(32)}), std=0.1).eval()
    weight = EETQ.dequantize(base[0]).double()
    target = weight @ dense_rotation(model[0].oft.default.skew, 32).T
    x = torch.randn(5, 256).half()
    expected = x.double() @ target.T + base[0].bias.double()
    result = oftfx.fold(model, quantized=policy)
    with torch.no_grad():
        before = model(x)
        after = result.model(x)
        assert after.dtype == torch.float16
        assert rel(before, expected) < 1e-3
        assert rel(after, expected) < (0.01 if policy == "requantize" else 1e-3)
        assert torch.equal(oftfx.unfold(result)(x), before)
    assert torch.equal(base[0].weight, raw)
    if policy == "keep":
        assert torch.equal(result.model[0].weight, raw)
    if policy == "requantize":
        fresh = make_eetq(nn.Linear(256, 128))
        fresh.load_state_dict(result.model[0].state_dict())
        assert torch.equal(EETQ.dequantize(fresh), EETQ.dequantize(result.model[0]))
        use_exact(fresh)  # as the folded one, which has no kernel of its own on a CPU
        with torch.no_grad():
            assert torch.equal(fresh(x), after)


@pytest.mark.parametrize("shape", [(1, 256), (7, 256), (1, 5, 256), (2, 5, 256), (2, 3, 5, 256)], ids=str)
def test_gradients_of_the_input_through_its_own_backward(shape):
    layer = make_eetq(nn.Linear(256, 128)).float()
    x = torch.randn(shape, requires_grad=True)
    way = torch.randn(*shape[:-1], 128)
    (layer(x) * way).sum().backward()
    assert rel(x.grad, way.double() @ EETQ.dequantize(layer).double()) < 1e-6


def test_why_the_layers_own_forward_is_not_used():
    layer = make_eetq(nn.Linear(64, 64))
    assert "GPUs only" in EETQ.native_fault(layer)
    meta = copy.deepcopy(layer).to("meta")
    assert "meta" in EETQ.native_fault(meta)


def test_what_is_no_eetq_layer():
    from transformers.integrations.eetq import EetqLinear

    assert not EETQ.matches(nn.Linear(64, 64))
    with torch.device("meta"):
        assert not EETQ.matches(EetqLinear(64, 128, dtype=None))  # about to be quantized
        layer = EetqLinear(64, 128)
    assert EETQ.matches(layer)
    shape = EETQ.geometry(layer)
    assert (shape.in_features, shape.out_features) == (64, 128)


@pytest.mark.parametrize("shape", [(96, 64), (64, 96)], ids=str)
def test_sizes_that_the_kernel_cannot_take_are_refused(shape):
    with pytest.raises(FormatError, match=f"{shape[0]} inputs and {shape[1]} outputs.*multiples of 64"):
        make_eetq(nn.Linear(*shape))
