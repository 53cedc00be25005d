"""What the tests of several scalar formats ask: bytes, folds, calibrated rounding."""

import pytest
import torch
import torch.nn as nn

import oftfx
from oftfx import OFT
from oftfx.formats.registry import format_of
from tests.reference import dense_rotation, randomize, rel


def tensors_of(value):
    """All plain tensors in a state, those of tensor subclasses one by one; numbers as tensors."""
    if isinstance(value, torch.Tensor):
        if hasattr(value, "__tensor_flatten__"):
            return [t for name in value.__tensor_flatten__()[0] for t in tensors_of(getattr(value, name))]
        return [value.detach()]
    if isinstance(value, dict):
        return [t for item in value.values() for t in tensors_of(item)]
    return [] if value is None or isinstance(value, str) else [torch.tensor(value, dtype=torch.float64)]


def bytes_of(state):
    return [(t.dtype, tuple(t.shape), t.reshape(-1).contiguous().view(torch.uint8).clone()) for t in tensors_of(state)]


def same_bytes(a, b):
    return len(a) == len(b) > 0 and all(x[:2] == y[:2] and torch.equal(x[2], y[2]) for x, y in zip(a, b, strict=True))


def check_bytes(weight_format, layer):
    """Packing what was read, and requantizing what was dequantized, give the same bytes; no old tensor is written."""
    state = dict(weight_format.read(layer))
    before = bytes_of(state)
    packed = weight_format.pack(weight_format.codes(layer), layer)
    assert same_bytes(bytes_of(dict(packed)), before)
    again = weight_format.requantize(weight_format.dequantize(layer), layer)
    assert same_bytes(bytes_of(dict(again)), before)
    weight_format.requantize(torch.randn_like(weight_format.dequantize(layer)), layer)
    assert same_bytes(bytes_of(dict(weight_format.read(layer))), before)


def check_folds(weight_format, layer, *, dtype=torch.float32):
    """Rotate, fold by every policy, unfold: weights against dense float64 algebra, bytes against those before."""
    before, weight = bytes_of(dict(weight_format.read(layer))), weight_format.dequantize(layer).double()
    block = next(b for b in (16, 11, 10, 8, 5, 3) if weight.shape[1] % b == 0)
    model = randomize(oftfx.transform(nn.Sequential(layer), {"0": OFT(block)}), std=0.1).eval()
    target = weight @ dense_rotation(model[0].oft.default.skew, block).T
    exact = {"kept": (weight, 0.0), "dequantized": (target, max(1e-6, torch.finfo(dtype).eps / 2))}
    for policy in ("keep", "float", "requantize"):
        result = oftfx.fold(model, quantized=policy)
        (row,) = result.report
        now = format_of(result.model[0]).dequantize(result.model[0])
        if policy == "requantize":
            assert row.relative_error == pytest.approx(rel(now, target), rel=1e-3)
            assert 0 < row.relative_error < 1
        else:
            wanted, bound = exact[row.action]
            assert rel(now, wanted) <= bound
        restored = oftfx.unfold(result)
        assert same_bytes(bytes_of(dict(weight_format.read(restored[0]))), before)
    assert same_bytes(bytes_of(dict(weight_format.read(layer))), before)


def check_calibration(weight_format, layer):
    """On fresh inputs whose channels depend on each other, calibrated rounding keeps the outputs better."""
    shape = weight_format.geometry(layer)
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(shape.in_features, shape.in_features, generator=generator) / shape.in_features**0.5
    mix = mix @ torch.diag(torch.logspace(0, -2, shape.in_features)) + 0.1 * torch.eye(shape.in_features)
    seen, fresh = (torch.randn(4 * shape.in_features, shape.in_features, generator=generator) @ mix for _ in range(2))
    weight = torch.randn(shape.out_features, shape.in_features, generator=generator) * 0.05

    def error(state):
        kept = weight_format.read(layer)
        weight_format.write(layer, state)
        found = rel(fresh @ weight_format.dequantize(layer).T, fresh @ weight.T)
        weight_format.write(layer, kept)
        return found

    nearest = error(weight_format.requantize(weight, layer))
    assert error(weight_format.calibrate(weight, layer, seen.T @ seen)) < 0.7 * nearest
