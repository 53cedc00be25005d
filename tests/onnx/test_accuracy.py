"""``accuracy_level``: what MatMulNBits may round activations to, and the error that it makes."""

import onnx
import pytest
import torch
import torch.nn as nn

import oftfx
from oftfx.errors import ExportError
from tests.onnx.lowered import bnb8

pytestmark = pytest.mark.needs("onnx", "onnxruntime", "onnxscript", "bitsandbytes")


@pytest.fixture
def quantized():
    return nn.Sequential(bnb8(nn.Linear(96, 64)), nn.ReLU(), bnb8(nn.Linear(64, 32))).eval()


def levels(path):
    nodes = [n for n in onnx.load(str(path)).graph.node if n.op_type == "MatMulNBits"]
    return [[a.i for a in n.attribute if a.name == "accuracy_level"] for n in nodes]


def test_floats_unless_asked(quantized, tmp_path):
    report = oftfx.export_onnx(quantized, tmp_path / "m.onnx", torch.randn(3, 96))
    assert max(c.relative_error for c in report.checks) < 2e-6
    assert levels(tmp_path / "m.onnx") in ([[], []], [[0], [0]])


def test_the_error_of_rounded_activations_is_reported(quantized, tmp_path):
    report = oftfx.export_onnx(quantized, tmp_path / "m.onnx", torch.randn(3, 96), accuracy_level=4)
    assert levels(tmp_path / "m.onnx") == [[4], [4]]
    exact = [c for c in report.checks if not c.case]
    rounded = [c for c in report.checks if c.case == "at accuracy_level 4"]
    assert len(exact) == len(rounded) == len(report.checks) / 2
    assert max(c.relative_error for c in exact) < 2e-6
    # Of int8: about 1 / 127 / sqrt(12) of the largest of a block, and two layers.
    assert 1e-4 < max(c.relative_error for c in rounded) < 3e-2
    assert "at accuracy_level 4: relative error" in str(report)


def test_a_level_that_rounds_nothing(quantized, tmp_path):
    report = oftfx.export_onnx(quantized, tmp_path / "m.onnx", torch.randn(3, 96), accuracy_level=1)
    assert levels(tmp_path / "m.onnx") == [[1], [1]]
    assert max(c.relative_error for c in report.checks) < 2e-6


def test_what_has_no_level_is_refused(quantized, tmp_path):
    path = tmp_path / "m.onnx"
    with pytest.raises(ExportError, match=r"got 5, expected None or one of 0 .*4 \(int8\)"):
        oftfx.export_onnx(quantized, path, torch.randn(3, 96), accuracy_level=5)
    with pytest.raises(ExportError, match="dialect 'standard' does not have it"):
        oftfx.export_onnx(quantized, path, torch.randn(3, 96), accuracy_level=4, dialect="standard")
    with pytest.raises(ExportError, match="no layer of this model is a MatMulNBits"):
        oftfx.export_onnx(nn.Linear(96, 4), path, torch.randn(3, 96), accuracy_level=4)
    assert not path.exists()
