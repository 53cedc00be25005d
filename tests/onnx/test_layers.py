"""Sites of other kinds than Linear, unfolded and folded, in ONNX Runtime."""

import numpy as np
import pytest
import torch
import torch.nn as nn

import oftfx
from oftfx import OFT
from tests.reference import randomize, rel

pytestmark = pytest.mark.needs("onnx", "onnxruntime", "onnxscript")


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 6, 1, groups=2)
        self.c = nn.ConvTranspose2d(6, 4, 2, stride=2)

    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.attention = nn.Embedding(17, 16), nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, ids):
        x = self.embed(ids)
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("name", ["convolutions", "attention"])
def test_layers_of_every_kind_run_in_onnx_runtime(name, folded, tmp_path):
    import onnxruntime

    base, inputs, other = {
        "convolutions": (Convolutions(), {"x": torch.randn(2, 3, 10, 12)}, {"x": torch.randn(3, 3, 10, 12)}),
        "attention": (Attention(), {"ids": torch.randint(17, (2, 5))}, {"ids": torch.randint(17, (3, 5))}),
    }[name]
    model = randomize(oftfx.transform(base.eval(), {"*": OFT(2, on_indivisible="nearest")}), std=0.2)
    expected = model(**other)
    assert rel(expected, base(**other)) > 1e-2
    shapes = {k: {0: "batch"} for k in inputs}
    report = oftfx.export_onnx(
        oftfx.fold(model).model if folded else model, tmp_path / "model.onnx", inputs, dynamic_shapes=shapes
    )
    assert report.path.is_file()
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {k: np.asarray(v) for k, v in other.items()})
    assert rel(torch.from_numpy(got), expected) < 2e-6
