"""What a failed export says: the first layer that differs, or the module that cannot be exported."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn as nn

import oftfx
from oftfx import OFT
from oftfx.errors import ExportError
from tests.reference import randomize, rel

pytestmark = pytest.mark.needs("onnx", "onnxruntime", "onnxscript")


class Scaled(nn.Linear):
    """Computes something else while it is exported."""

    def forward(self, x):
        y = super().forward(x)
        return y * 1.01 if torch.onnx.is_in_onnx_export() else y


class Untranslatable(nn.Module):
    def forward(self, x):
        return torch.linalg.matrix_exp(x.unsqueeze(-1) @ x.unsqueeze(-2)).sum(-1)


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Deep(nn.Module):
    def __init__(self, middle):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(6, 9), middle, nn.Linear(9, 4)

    def forward(self, x):
        return self.last(self.middle(torch.relu(self.first(x))))


@pytest.mark.parametrize("mode", ["fixed", "swappable", "inputs"])
def test_the_first_layer_that_differs_is_named(tmp_path, mode):
    x = torch.randn(2, 6)
    model = Deep(nn.Sequential(nn.Linear(9, 9), Scaled(9, 9)))
    model = randomize(oftfx.transform(model, {"first": OFT(3), "middle.*": OFT(3)}))
    with pytest.raises(
        ExportError, match=r"differs from torch .* The first layer whose result differs is middle\.1 \(Sc"
    ):
        oftfx.export_onnx(model, tmp_path / "m.onnx", (x,), adapters=mode)
    assert not list(tmp_path.iterdir())


def test_a_fault_outside_of_every_layer_is_said_to_be(tmp_path):
    class Twice(Deep):
        def forward(self, x):
            y = super().forward(x)
            return y * 2 if torch.onnx.is_in_onnx_export() else y

    with pytest.raises(ExportError, match="No layer's result differs by itself"):
        oftfx.export_onnx(Twice(nn.Identity()), tmp_path / "m.onnx", (torch.randn(2, 6),))


@pytest.mark.parametrize(
    ("middle", "message"),
    [
        (Untranslatable(), r"middle \(Untranslatable\) calls aten\.linalg_matrix_exp\.default, which ONNX has no oper"),
        (Branching(), r"Deep cannot be exported: middle \(Branching\): \w+: .*data-dependent"),
    ],
)
def test_the_module_that_cannot_be_exported_is_named(tmp_path, middle, message):
    with pytest.raises(ExportError, match=message):
        oftfx.export_onnx(Deep(middle), tmp_path / "m.onnx", (torch.randn(2, 6),))


def test_a_dropped_row_choice_is_noticed(tmp_path, monkeypatch):
    """A mixed file that took the first adapter for all rows."""
    from oftfx.onnx.adapters import mixed

    model = randomize(oftfx.transform(Deep(nn.Identity()), {"first": OFT(3)}))
    turn = mixed.RowRotation.forward

    def first_only(self, x):
        self._choice.rows = torch.zeros_like(self._choice.rows)
        return turn(self, x)

    monkeypatch.setattr(mixed.RowRotation, "forward", first_only)
    with pytest.raises(ExportError, match=r"with adapters \[1, 0, 1\] for its rows: ONNX Runtime differs"):
        oftfx.export_onnx(model, tmp_path / "m.onnx", (torch.randn(2, 6),), adapters="mixed")


SCRIPT = """
import torch, torch.nn as nn, oftfx
torch.manual_seed(3)
model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Conv1d(4, 6, 3, padding=1))
model = oftfx.transform(model, {"*": oftfx.OFT(4, init="normal")})
oftfx.export_onnx(model, "m.onnx", (torch.randn(2, 4, 12),), adapters="swappable", verify=False)
oftfx.export_onnx_adapter(model, "m.onnx_adapter")
"""


def test_the_same_model_gives_the_same_bytes_in_another_process(tmp_path):
    found = []
    for seed in ["1", "2"]:
        folder = tmp_path / seed
        folder.mkdir()
        subprocess.run([sys.executable, "-c", SCRIPT], cwd=folder, check=True, env={"PYTHONHASHSEED": seed})
        found.append([(folder / n).read_bytes() for n in ("m.onnx", "m.onnx_adapter")])
    assert found[0] == found[1]


def test_external_data_of_a_swappable_graph(tmp_path, monkeypatch):
    import onnxruntime

    monkeypatch.setattr("oftfx.onnx.finish.LARGE", 1000)
    model = randomize(oftfx.transform(nn.Sequential(nn.Linear(64, 64)), {"0": OFT(16)}))
    oftfx.export_onnx(model, tmp_path / "m.onnx", (torch.randn(2, 64),), adapters="swappable")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    adapter = onnxruntime.LoraAdapter()
    adapter.Load(str(oftfx.export_onnx_adapter(model, tmp_path / "a.onnx_adapter", graph=tmp_path / "m.onnx")))
    options = onnxruntime.RunOptions()
    options.add_active_adapter(adapter)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    x = torch.randn(3, 64)
    (got,) = session.run(None, {"input": x.numpy()}, options)
    assert rel(torch.from_numpy(got), model(x)) < 1e-6


def test_every_adapter_of_a_mixed_file_is_checked(tmp_path, monkeypatch):
    """More of them than rows in the batch; the last one's blocks are another's."""
    from oftfx.onnx.adapters import mixed

    model = oftfx.transform(Deep(nn.Identity()), {"first": OFT(3)}, adapter="a")
    for name in "bcd":
        oftfx.add_adapter(model, name, {"first": OFT(3)})
    for name in "abcd":
        nn.init.normal_(model.first.oft.get_submodule(name).skew, std=0.2)
    stack = torch.stack
    monkeypatch.setattr(mixed.torch, "stack", lambda t: stack([*t[:-1], t[1]] if len(t) == 5 else t))
    with pytest.raises(ExportError, match="for its rows: ONNX Runtime differs"):
        oftfx.export_onnx(model, tmp_path / "m.onnx", (torch.randn(2, 6),), adapters="mixed")


class Equal(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


def test_exchanged_inputs_are_noticed_before_an_adapter_is_trained(tmp_path, monkeypatch):
    from oftfx.onnx.adapters import swappable

    model = oftfx.transform(Equal(), {"*": OFT(3)})  # the identity at both sites
    caller = swappable.Swappable.caller

    def exchanged(self, module, values):
        if torch.onnx.is_in_onnx_export():
            values = dict(zip(values, reversed(values.values()), strict=True))
        return caller(self, module, values)

    monkeypatch.setattr(swappable.Swappable, "caller", exchanged)
    with pytest.raises(ExportError, match="with random rotations: ONNX Runtime differs"):
        oftfx.export_onnx(model, tmp_path / "m.onnx", (torch.randn(2, 6),), adapters="swappable")


class Masked(nn.Module):
    """Ignores its mask while it is exported."""

    def __init__(self):
        super().__init__()
        self.a = nn.Embedding(9, 4)

    def forward(self, input_ids, attention_mask):
        mask = torch.ones_like(attention_mask) if torch.onnx.is_in_onnx_export() else attention_mask
        return (self.a(input_ids) * mask.unsqueeze(-1)).mean(1) + 0 * attention_mask.sum()


def test_a_file_that_ignores_the_mask_is_noticed(tmp_path):
    ids = torch.randint(9, (2, 5))
    with pytest.raises(ExportError, match="ONNX Runtime differs"):
        oftfx.export_onnx(Masked(), tmp_path / "m.onnx", {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


class Chosen(nn.Module):
    """Gives out whole numbers, or one number for the batch."""

    def __init__(self, mean):
        super().__init__()
        self.a, self.mean = nn.Linear(6, 4), mean

    def forward(self, *args, **kwargs):
        y = self.a(args[0] if args else kwargs["x"])
        return y.mean() if self.mean else y.argmax(-1)


class Named(Chosen):
    def forward(self, x):
        return super().forward(x)


def test_outputs_without_floats_or_rows(tmp_path):
    x = (torch.randn(2, 6),)
    model = randomize(oftfx.transform(Named(False), {"a": OFT(3)}))
    report = oftfx.export_onnx(model, tmp_path / "m.onnx", x)
    assert report.checks[0].adapter_effect is None
    model = randomize(oftfx.transform(Named(True), {"a": OFT(3)}))
    with pytest.raises(ExportError, match="output output_0 is one number for a whole batch"):
        oftfx.export_onnx(model, tmp_path / "n.onnx", x, adapters="mixed")
    with pytest.raises(ExportError, match="1 example inputs by position, and Chosen.forward names 0"):
        oftfx.export_onnx(Chosen(False), tmp_path / "n.onnx", x)


class Cancelling(nn.Module):
    """``(1000 A x + b) - (1000 A x)`` by two layers: float32 itself loses three digits."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 8), nn.Linear(64, 8, bias=False)
        with torch.no_grad():
            self.first.weight.mul_(1000)
            self.second.weight.copy_(self.first.weight)

    def forward(self, x):
        return self.first(x * 1.006) - self.second(x)


def test_a_model_that_rounds_more_than_others_is_held_against_float64(tmp_path):
    """Between a bound and ten times the bound, torch's own distance from float64 decides."""
    model, x = Cancelling(), torch.randn(3, 64)
    report = oftfx.export_onnx(model, tmp_path / "m.onnx", (x,))
    assert 1e-5 < max(c.relative_error for c in report.checks) < 1e-4
    with torch.no_grad():
        assert rel(model(x), copy.deepcopy(model).double()(x.double())) > 5e-6


class Off(nn.Linear):
    """Computes a little else while it is exported."""

    def forward(self, x):
        y = super().forward(x)
        return y * (1 + 3e-5) if torch.onnx.is_in_onnx_export() else y


def test_an_error_that_is_no_rounding_is_refused_just_over_the_bound(tmp_path):
    with pytest.raises(ExportError, match=r"differs from torch by a relative 3\.0\de-05"):
        oftfx.export_onnx(nn.Sequential(nn.Linear(6, 9), Off(9, 4)), tmp_path / "m.onnx", (torch.randn(2, 6),))
