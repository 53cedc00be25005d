"""RMS norms in ONNX Runtime's operators: the same numbers as torch's, and nothing fused that is something else."""

import numpy as np
import pytest
import torch
import torch.nn as nn

import oftfx
from tests.reference import rel

pytestmark = pytest.mark.needs("onnx", "onnxruntime", "onnxscript")
NORM, SKIP = "SimplifiedLayerNormalization", "com.microsoft::SkipSimplifiedLayerNormalization"
PARTS = ("Pow", "ReduceMean", "Sqrt", "Reciprocal")


class Normed(nn.Module):
    """A norm of a sum that is read again, as in a decoder layer; each part can be another."""

    def __init__(self, wide=48, epsilon=1e-3, offset=0.0, axis=-1, power=2, root=torch.rsqrt, narrow=False, bias=False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(wide))
        self.linear = nn.Linear(wide, wide)
        self.other = nn.Parameter(torch.randn(wide)) if bias else None
        self.epsilon, self.offset, self.axis, self.power = epsilon, offset, axis, power
        self.root, self.narrow = root, narrow

    def forward(self, x):
        y = self.linear(x)
        total = x + (y if self.other is None else self.other)
        wide = total.float() if self.narrow else total
        variance = wide.pow(self.power).mean(self.axis, keepdim=True)
        scaled = (wide * self.root(variance + self.epsilon)).to(total.dtype)
        weight = self.weight + self.offset if self.offset else self.weight
        return scaled * weight + 0.5 * total * y


def made(tmp_path, module, dialect="ort", dtype=torch.float32):
    path = tmp_path / "m.onnx"
    module = module.eval().to(dtype)
    report = oftfx.export_onnx(module, path, (torch.randn(2, 5, module.weight.numel(), dtype=dtype),), dialect=dialect)
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    x = torch.randn(3, 5, module.weight.numel(), dtype=dtype) * 0.05  # small, so the epsilon is seen
    (got,) = session.run(None, {"x": x.numpy()})
    with torch.no_grad():
        assert rel(torch.from_numpy(np.asarray(got)).float(), module(x).float()) < (
            3e-3 if dtype.itemsize < 4 else 1e-6
        )
    return report.operators


@pytest.mark.parametrize("changes", [{}, {"offset": 1.0}, {"epsilon": 1e-6}, {"wide": 9000, "offset": 1.0}], ids=str)
def test_a_norm_of_a_sum_is_one_operator(tmp_path, changes):
    """9,000 is over what the exporter computes beforehand, so the scale is a sum in the graph."""
    operators = made(tmp_path, Normed(**changes))
    assert operators[SKIP] == 1
    assert not [p for p in PARTS if p in operators]


def test_a_bias_is_no_residual(tmp_path):
    operators = made(tmp_path, Normed(bias=True))
    assert operators[NORM] == 1
    assert SKIP not in operators


@pytest.mark.parametrize(
    "changes",
    [{"axis": 1}, {"axis": (1, 2)}, {"power": 4}, {"root": torch.sqrt}, {"root": lambda v: v**-1.0}],
    ids=["another-axis", "two-axes", "another-power", "root", "no-root"],
)
def test_what_is_another_norm_stays(tmp_path, changes):
    operators = made(tmp_path, Normed(**changes))
    assert NORM not in operators
    assert SKIP not in operators


def test_float16_rounds_twice_and_stays(tmp_path):
    operators = made(tmp_path, Normed(narrow=True), dtype=torch.float16)
    assert NORM not in operators
    assert SKIP not in operators


@pytest.mark.parametrize("dialect", ["standard", "openvino"])
def test_other_dialects_have_the_standards_operators_only(tmp_path, dialect):
    operators = made(tmp_path, Normed(), dialect)
    assert operators["Pow"] == 1
    assert not [o for o in operators if o == NORM or o.startswith("com.microsoft")]


def test_the_checker_is_as_it_was(tmp_path):
    from onnx import defs

    made(tmp_path, Normed(bias=True))
    assert not defs.has(NORM)
