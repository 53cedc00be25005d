import dataclasses
import errno
import os

import numpy as np
import pytest
import torch
import torch.nn as nn

import oftfx
from oftfx import OFT, files
from oftfx.errors import ExportError
from tests.reference import randomize, rel

pytestmark = pytest.mark.needs("onnx", "onnxruntime", "onnxscript", "transformers")


def session(path):
    import onnxruntime

    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def run(path, inputs):
    names = {i.name for i in session(path).get_inputs()}
    return torch.from_numpy(session(path).run(None, {k: v.numpy() for k, v in inputs.items() if k in names})[0])


def graph(path):
    import onnx

    return onnx.load(str(path)).graph


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("parameterization", ["cayley", "cayley_neumann"])
def test_folded_and_unfolded_equal_torch_at_other_sizes(request, ids, tmp_path, kind, parameterization):
    base = request.getfixturevalue(f"tiny_{kind}")()
    model = randomize(oftfx.transform(base, {"all-linear": OFT(8, parameterization=parameterization)}))
    for name, exported in [("unfolded", model), ("folded", oftfx.fold(model).model)]:
        path = tmp_path / f"{name}.onnx"
        report = oftfx.export_onnx(exported, path, ids(1, 6))  # a batch of one must not be baked in
        for shape in [(3, 10), (1, 1), (5, 2)]:
            inputs = ids(*shape, seed=7)
            with torch.no_grad():
                expected = exported(**inputs).logits
            assert rel(run(path, inputs), expected) < 2e-6
        assert report.inputs == {n: {0: "batch", 1: "sequence"} for n in ("input_ids", "attention_mask")}
        assert report.outputs == ("logits",)
        assert len(report.checks) == 2
        assert max(c.relative_error for c in report.checks) < 2e-6
        assert (report.adapters == ("default",)) == (name == "unfolded")
        assert all((c.adapter_effect is None) == (name == "folded") for c in report.checks)
        assert (tmp_path / f"{name}.onnx").stat().st_size == report.nbytes
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folded.onnx", "unfolded.onnx"]


def test_weights_keep_their_names_and_rotations_are_initializers(tiny_llama, ids, tmp_path):
    import onnx

    model = randomize(oftfx.transform(tiny_llama(), {"all-linear": OFT(16, share_input=True)}))
    report = oftfx.export_onnx(model, tmp_path / "m.onnx", ids())
    found = {i.name: onnx.numpy_helper.to_array(i) for i in graph(tmp_path / "m.onnx").initializer}
    blocks = sorted(n for n in found if n.endswith(".oft.frozen.blocks"))
    assert len(blocks) == 8  # q/k/v, o, gate/up and down of two layers
    assert blocks[0] == "model.layers.0.mlp.down_proj.oft.frozen.blocks"
    rotation = model.get_submodule("model.layers.0.mlp.down_proj.oft.default")
    assert np.allclose(found[blocks[0]], rotation.matrices().detach().numpy(), atol=1e-7)
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert all(f"{n}.weight" in found for n in linears)
    assert "Einsum" not in report.operators
    plain = oftfx.export_onnx(oftfx.fold(model).model, tmp_path / "f.onnx", ids())
    assert report.operators["MatMul"] - plain.operators["MatMul"] == 8  # one product a group


def test_no_local_path_or_trace_is_in_the_file(tiny_llama, ids, tmp_path):
    oftfx.export_onnx(tiny_llama(), tmp_path / "m.onnx", ids())
    data = (tmp_path / "m.onnx").read_bytes()
    assert b".py" not in data
    assert b"stack_trace" not in data
    import onnx

    metadata = {p.key: p.value for p in onnx.load(str(tmp_path / "m.onnx")).metadata_props}
    assert metadata["oftfx.state"] == "plain"
    assert metadata["oftfx.model"] == "LlamaForCausalLM"


@pytest.mark.needs("bitsandbytes")
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("folded", [None, "keep", "requantize", "float"])
def test_4bit_weights_keep_their_bytes(tmp_path, quant_type, double_quant, folded):
    import onnx

    from oftfx.formats.bnb4 import make_linear4bit

    options = {"quant_type": quant_type, "double_quant": double_quant}
    base = nn.Sequential(
        make_linear4bit(nn.Linear(256, 192), **options),
        nn.ReLU(),
        make_linear4bit(nn.Linear(192, 64, bias=False), **options),
    )
    model = randomize(oftfx.transform(base, {"*": OFT(16)})).eval()
    exported = model if folded is None else oftfx.fold(model, quantized=folded).model
    report = oftfx.export_onnx(exported, tmp_path / "m.onnx", (torch.randn(2, 5, 256),))
    x = torch.randn(4, 5, 256)
    with torch.no_grad():
        assert rel(run(tmp_path / "m.onnx", {"input": x}), exported(x)) < 2e-6
    if folded == "float":
        assert "com.microsoft::MatMulBnb4" not in report.operators
        return
    assert report.operators["com.microsoft::MatMulBnb4"] == 2
    stored = {i.name: onnx.numpy_helper.to_array(i) for i in graph(tmp_path / "m.onnx").initializer}
    assert np.array_equal(stored["0.weight"], exported[0].weight.data.flatten().numpy())
    packed = 256 * 192 // 2 + 192 * 64 // 2
    assert report.nbytes < packed * (1 + 4 / 32) * 1.03 + (0 if folded == "requantize" else 4 * 16 * (256 + 192)) + 6000


def test_other_models_and_fixed_shapes(tmp_path):
    model = randomize(oftfx.transform(nn.Sequential(nn.Linear(12, 7), nn.Linear(7, 3)), {"0": OFT(4)}))
    report = oftfx.export_onnx(
        model, tmp_path / "a.onnx", (torch.randn(2, 5, 12),), dynamic_shapes={"input": {0: "n", 1: "m"}}
    )
    x = torch.randn(7, 3, 12)
    assert rel(run(tmp_path / "a.onnx", {"input": x}), model(x)) < 1e-6
    assert report.outputs == ("output_0",)
    oftfx.export_onnx(model, tmp_path / "b.onnx", (torch.randn(2, 5, 12),), dynamic_shapes=None, opset=18)
    shape = graph(tmp_path / "b.onnx").input[0].type.tensor_type.shape
    assert [d.dim_value for d in shape.dim] == [2, 5, 12]
    assert rel(run(tmp_path / "b.onnx", {"input": torch.ones(2, 5, 12)}), model(torch.ones(2, 5, 12))) < 1e-6


def test_half_precision(tmp_path):
    model = randomize(oftfx.transform(nn.Sequential(nn.Linear(32, 16)).half(), {"0": OFT(8)}))
    oftfx.export_onnx(model, tmp_path / "h.onnx", (torch.randn(2, 32).half(),))
    x = torch.randn(9, 32).half()
    assert rel(run(tmp_path / "h.onnx", {"input": x}), model(x)) < 2e-3


class Doubling(nn.Module):
    """Computes something else while it is exported: what a broken translation would look like."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x):
        return self.a(x) * (2.0 if torch.onnx.is_in_onnx_export() else 1.0)


class Dropping(nn.Module):
    """Drops its adapter while it is exported."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x):
        if torch.onnx.is_in_onnx_export():
            return nn.functional.linear(x, self.a.weight, self.a.bias)
        return self.a(x)


def test_a_file_that_computes_something_else_is_refused_and_removed(tmp_path):
    x = torch.randn(2, 6)
    with pytest.raises(ExportError, match=r"ONNX Runtime differs from torch by a relative 1\.00e\+00"):
        oftfx.export_onnx(Doubling(), tmp_path / "m.onnx", (x,))
    assert not list(tmp_path.iterdir())
    model = randomize(oftfx.transform(Dropping(), {"a": OFT(3)}), std=1e-7)
    with pytest.raises(ExportError, match="not far below what the adapters change"):
        oftfx.export_onnx(model, tmp_path / "m.onnx", (x,))
    assert not list(tmp_path.iterdir())
    randomize(model, std=0.1)
    with pytest.raises(ExportError, match="ONNX Runtime differs"):
        oftfx.export_onnx(model, tmp_path / "m.onnx", (x,))


class Untranslatable(nn.Module):
    def forward(self, x):
        return torch.linalg.matrix_exp(x)


def test_errors(tiny_llama, ids, tmp_path):
    path = tmp_path / "m.onnx"
    for call, message in [
        (lambda: oftfx.export_onnx(tiny_llama().bfloat16(), path, ids()), "is bfloat16, for which"),
        (
            lambda: oftfx.export_onnx(tiny_llama(), path, ids(), adapters="swappable"),
            "adapters='swappable' takes its sites and block sizes from the active adapter, and there is none",
        ),
        (lambda: oftfx.export_onnx(tiny_llama(), path, ids(), adapters="all"), "adapters: got 'all'"),
        (lambda: oftfx.export_onnx(tiny_llama(), path, ids(), dialect="coreml"), "dialect: got 'coreml'"),
        (
            lambda: oftfx.export_onnx(tiny_llama(), path, {**ids(), "use_cache": False}),
            "'use_cache' is a bool",
        ),
        (
            lambda: oftfx.export_onnx(Untranslatable(), path, (torch.randn(3, 4, 4),)),
            "Untranslatable cannot be exported: Untranslatable calls aten.linalg_matrix_exp.default, which ONNX has no",
        ),
    ]:
        with pytest.raises(ExportError, match=message):
            call()
    assert not path.exists()


def test_the_model_is_not_changed(tiny_llama, ids, tmp_path):
    model = randomize(oftfx.transform(tiny_llama(), {"all-linear": OFT(16)})).train()
    keys, expected = list(model.state_dict()), model(**ids()).logits
    oftfx.export_onnx(model, tmp_path / "m.onnx", ids())
    assert list(model.state_dict()) == keys
    assert torch.equal(model(**ids()).logits, expected)
    assert all(m.training for m in model.modules())
    assert model.config.use_cache


def test_equal_rotations_of_several_layers_stay_apart(tiny_llama, ids, tmp_path):
    """torch's own optimisation merges equal initializers of up to 1024 elements, such as untrained rotations."""
    model = oftfx.transform(tiny_llama(), {"all-linear": OFT(16)})
    oftfx.export_onnx(model, tmp_path / "m.onnx", ids())
    names = [i.name for i in graph(tmp_path / "m.onnx").initializer]
    assert sum(n.endswith(".oft.frozen.blocks") for n in names) == 14


def test_large_weights_lie_beside_the_file_under_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr("oftfx.onnx.finish.LARGE", 1000)
    model = randomize(oftfx.transform(nn.Sequential(nn.Linear(64, 64)), {"0": OFT(8)}))
    report = oftfx.export_onnx(model, tmp_path / "m.onnx", (torch.randn(2, 64),))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert report.nbytes == sum(p.stat().st_size for p in tmp_path.iterdir())
    x = torch.randn(5, 64)
    assert rel(run(tmp_path / "m.onnx", {"input": x}), model(x)) < 1e-6
    monkeypatch.undo()
    oftfx.export_onnx(model, tmp_path / "m.onnx", (torch.randn(2, 64),))
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]  # no data of the older file is left
    assert rel(run(tmp_path / "m.onnx", {"input": x}), model(x)) < 1e-6


def test_a_file_and_its_data_are_replaced_together_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr("oftfx.onnx.finish.LARGE", 1000)

    def export(seed):
        torch.manual_seed(seed)
        model = randomize(oftfx.transform(nn.Sequential(nn.Linear(64, 64)), {"0": OFT(8)}))
        oftfx.export_onnx(model, tmp_path / "m.onnx", (torch.randn(2, 64),), verify=False)
        return model

    old = export(1)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert sorted(before) == ["m.onnx", "m.onnx.data"]
    for last in range(4):  # two leave, two come
        with monkeypatch.context() as patch:
            disk_is_full_after(patch, last)
            with pytest.raises(ExportError, match=f"{tmp_path}: cannot be written to: No space left on device"):
                export(2)
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    x = torch.randn(5, 64)
    assert rel(run(tmp_path / "m.onnx", {"input": x}), old(x)) < 1e-6
    assert rel(run(tmp_path / "m.onnx", {"input": x}), export(2)(x)) > 1e-3


def disk_is_full_after(patch, count):
    """The next rename, and those that put names back, succeed again."""
    real, calls = files.rename, []

    def rename(source, target):
        calls.append(source)
        if len(calls) == count + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        real(source, target)

    patch.setattr(files, "rename", rename)


def test_a_place_that_cannot_be_written_to_is_refused_before_the_work(tmp_path):
    class Unused(nn.Linear):
        def forward(self, x):
            raise AssertionError("the model was run")

    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(ExportError, match=r"is a directory; name a file in it"):
        oftfx.export_onnx(Unused(2, 2), tmp_path, (torch.randn(1, 2),))
    with pytest.raises(ExportError, match=r"file: cannot be written to: .*a file is where a directory is wanted"):
        oftfx.export_onnx(Unused(2, 2), tmp_path / "file" / "m.onnx", (torch.randn(1, 2),))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


class Outputs(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.a, self.kind = nn.Linear(6, 6), kind

    def forward(self, x):
        y = self.a(x)
        return {"names": {"x": y, "y": y + 1}, "twice": (y, y), "input": (y, x)}[self.kind]


def test_output_names_and_aliases(tmp_path):
    x = torch.randn(2, 6)
    report = oftfx.export_onnx(Outputs("names"), tmp_path / "m.onnx", {"x": x})
    assert report.outputs == ("x_out", "y")
    with pytest.raises(ExportError, match="output output_1 is the same tensor as output output_0"):
        oftfx.export_onnx(Outputs("twice"), tmp_path / "m.onnx", {"x": x})
    with pytest.raises(ExportError, match="output output_1 is the same tensor as input x"):
        oftfx.export_onnx(Outputs("input"), tmp_path / "m.onnx", {"x": x})
    with pytest.raises(ExportError, match="dynamic_shapes: no input 'X'; the inputs are x"):
        oftfx.export_onnx(Outputs("names"), tmp_path / "m.onnx", {"x": x}, dynamic_shapes={"X": {0: "n"}})


def test_a_recorded_graph_exports_as_its_model(tmp_path):
    model = randomize(oftfx.transform(nn.Sequential(nn.Linear(12, 7)), {"0": OFT(4)}))
    graph = oftfx.graph(model, (torch.randn(3, 12),))
    oftfx.export_onnx(graph, tmp_path / "m.onnx", (torch.randn(2, 12),))
    x = torch.randn(5, 12)
    assert rel(run(tmp_path / "m.onnx", {"input": x}), model(x)) < 1e-6


def test_a_weight_that_is_also_a_result_stays_as_it_is(tmp_path):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 4, bias=False), nn.Linear(6, 4, bias=False)

        def forward(self, x):
            return self.a(x) + self.b(x), self.a.weight.T

    model = Both()
    oftfx.export_onnx(model, tmp_path / "m.onnx", {"x": torch.randn(2, 6)})
    x = torch.randn(5, 6)
    values = session(tmp_path / "m.onnx").run(None, {"x": x.numpy()})
    assert rel(torch.from_numpy(values[0]), model(x)[0]) < 1e-6
    assert np.array_equal(values[1], model.a.weight.detach().numpy().T)


@dataclasses.dataclass
class Scores:
    logits: torch.Tensor
    parts: tuple[torch.Tensor, torch.Tensor]


def test_outputs_in_a_dataclass_have_their_fields_names(tmp_path):
    class Model(nn.Sequential):
        def forward(self, x):
            y = super().forward(x)
            return Scores(y, (y * 2, y + 1))

    model = randomize(oftfx.transform(Model(nn.Linear(16, 6)), {"*": OFT(4)}))
    oftfx.export_onnx(model, tmp_path / "m.onnx", (torch.randn(3, 16),))
    x = torch.randn(5, 16)
    file = session(tmp_path / "m.onnx")
    assert [o.name for o in file.get_outputs()] == ["logits", "parts_0", "parts_1"]
    expected = model(x)
    got = file.run(None, {"x": x.numpy()})
    for a, b in zip(got, (expected.logits, *expected.parts), strict=True):
        assert rel(torch.from_numpy(a), b) < 1e-5


def test_a_result_without_tensors_is_named(tmp_path):
    class Model(nn.Sequential):
        def forward(self, x):
            return str(super().forward(x).shape)

    with pytest.raises(ExportError, match="the model returns a str, in which no tensor is found"):
        oftfx.export_onnx(
            oftfx.transform(Model(nn.Linear(16, 6)), {"*": OFT(4)}), tmp_path / "m.onnx", (torch.ones(2, 16),)
        )
