"""Adapters in a graph: swappable, required, and one for each row; in ONNX Runtime against each adapter's own model."""

import json
import threading

import numpy as np
import pytest
import torch
import torch.nn as nn

import oftfx
from oftfx import OFT
from oftfx.errors import AdapterError, ExportError
from tests.reference import randomize, rel

pytestmark = pytest.mark.needs("onnx", "onnxruntime", "onnxscript", "transformers")


def session(path):
    import onnxruntime

    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def lora(path):
    import onnxruntime

    adapter = onnxruntime.LoraAdapter()
    adapter.Load(str(path))
    return adapter


def options(adapter=None):
    import onnxruntime

    result = onnxruntime.RunOptions()
    if adapter is not None:
        result.add_active_adapter(adapter)
    return result


def feed(inputs, **more):
    return {k: np.asarray(v) for k, v in {**inputs, **more}.items()}


@pytest.fixture
def tenants(tiny_llama):
    """A model with three adapters; the last one rotates fewer sites."""
    model = oftfx.transform(tiny_llama(), {"all-linear": OFT(8, share_input=True)}, adapter="a")
    oftfx.add_adapter(model, "b", {"all-linear": OFT(8, share_input=True)})
    oftfx.add_adapter(model, "c", {"*.mlp.*": OFT(8, share_input=True)})
    for index, name in enumerate("abc"):
        torch.manual_seed(10 + index)
        for parameter in oftfx.adapter_parameters(model, name):
            nn.init.normal_(parameter, std=0.1)
    oftfx.set_adapter(model, "a")
    return model


@torch.no_grad()
def expected(model, name, inputs):
    before = oftfx.active_adapters(model)
    oftfx.set_adapter(model, name)
    result = model(**inputs).logits
    oftfx.set_adapter(model, list(before))
    return result


def test_one_session_serves_all_adapters(tenants, ids, tmp_path):
    report = oftfx.export_onnx(tenants, tmp_path / "m.onnx", ids(), adapters="swappable")
    names = [n for n in report.inputs if n.endswith(".oft.blocks")]
    assert len(names) == 8  # q/k/v, o, gate/up and down of two layers
    cases = ["without an adapter", "with adapter 'a'", "with random rotations"]
    assert [c.case for c in report.checks] == cases * 2
    graph = tmp_path / "m.onnx"
    files = {
        n: oftfx.export_onnx_adapter(tenants, tmp_path / f"{n}.onnx_adapter", adapter=n, graph=graph) for n in "abc"
    }
    run = session(tmp_path / "m.onnx")
    assert sorted(i.name for i in run.get_inputs()) == ["attention_mask", "input_ids"]
    assert sorted(i.name for i in run.get_overridable_initializers()) == sorted(names)
    adapters = {n: lora(f) for n, f in files.items()} | {None: None}
    inputs = ids(3, 9, seed=4)
    wanted = {n: expected(tenants, n, inputs) for n in adapters}
    assert min(rel(wanted[a], wanted[b]) for a in wanted for b in wanted if a != b) > 1e-2
    for name in ["a", None, "b", "a", "c", None, "c", "b"]:
        (got,) = run.run(["logits"], feed(inputs), options(adapters[name]))
        assert rel(torch.from_numpy(got), wanted[name]) < 2e-6

    errors = []

    def client(name):
        for _ in range(10):
            (got,) = run.run(["logits"], feed(inputs), options(adapters[name]))
            errors.append(rel(torch.from_numpy(got), wanted[name]))

    threads = [threading.Thread(target=client, args=(n,)) for n in adapters]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 40
    assert max(errors) < 2e-6


def test_required_inputs(tenants, ids, tmp_path):
    report = oftfx.export_onnx(tenants, tmp_path / "m.onnx", ids(), adapters="inputs")
    run = session(tmp_path / "m.onnx")
    assert {i.name for i in run.get_inputs()} == set(report.inputs)
    assert not run.get_overridable_initializers()
    inputs = ids(1, 4, seed=9)
    blocks = {
        n.removesuffix(".a") + ".blocks": m.matrices().detach()
        for n, m in tenants.named_modules()
        if n.endswith(".oft.a")
    }
    (got,) = run.run(["logits"], feed(inputs, **blocks))
    assert rel(torch.from_numpy(got), expected(tenants, "a", inputs)) < 2e-6
    with pytest.raises(Exception, match=r"oft\.blocks"):
        run.run(["logits"], feed(inputs))


@pytest.mark.needs("openvino")
@pytest.mark.parametrize("mode", ["inputs", "mixed"])
def test_openvino_runs_what_has_no_default(tenants, ids, tmp_path, mode):
    import openvino

    report = oftfx.export_onnx(tenants, tmp_path / "m.onnx", ids(), adapters=mode)
    compiled = openvino.Core().compile_model(tmp_path / "m.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    inputs = ids(2, 5, seed=3)
    more = {"adapter_index": np.array([2, 2])}
    if mode == "inputs":
        found = {n: m for n, m in tenants.named_modules() if n.endswith(".oft.b")}
        more = {n.removesuffix(".b") + ".blocks": m.matrices().detach().numpy() for n, m in found.items()}
    assert set(report.inputs) == {*inputs, *more}
    got = compiled(feed(inputs, **more))["logits"]
    assert rel(torch.from_numpy(got), expected(tenants, "b", inputs)) < 1e-5


def test_each_row_of_a_batch_has_its_adapter(tenants, ids, tmp_path):
    report = oftfx.export_onnx(tenants, tmp_path / "m.onnx", ids(), adapters="mixed")
    run = session(tmp_path / "m.onnx")
    names = json.loads(run.get_modelmeta().custom_metadata_map["oftfx.adapter_names"])
    assert names == ["", "a", "b", "c"]
    assert report.inputs["adapter_index"] == {0: "batch"}
    inputs = ids(7, 5, seed=2)
    rows = np.array([2, 0, 3, 1, 1, 0, 2])
    (got,) = run.run(["logits"], feed(inputs, adapter_index=rows))
    for index, row in enumerate(rows):
        alone = {k: v[index : index + 1] for k, v in inputs.items()}
        assert rel(torch.from_numpy(got[index : index + 1]), expected(tenants, names[row] or None, alone)) < 2e-6
        (single,) = run.run(["logits"], feed(alone, adapter_index=rows[index : index + 1]))
        assert rel(torch.from_numpy(single), torch.from_numpy(got[index : index + 1])) < 1e-6
    for wrong in [rows + 4, rows - 1]:
        with pytest.raises(Exception, match="out of"):
            run.run(["logits"], feed(inputs, adapter_index=wrong))


def test_untrained_rotations_of_several_layers_stay_apart(tiny_llama, ids, tmp_path):
    model = oftfx.transform(tiny_llama(), {"all-linear": OFT(16)})
    report = oftfx.export_onnx(model, tmp_path / "m.onnx", ids(), adapters="swappable")
    assert sum(n.endswith(".oft.blocks") for n in report.inputs) == 14
    randomize(model)
    oftfx.export_onnx_adapter(model, tmp_path / "a.onnx_adapter", graph=tmp_path / "m.onnx")
    inputs = ids(2, 6, seed=1)
    adapter = lora(tmp_path / "a.onnx_adapter")
    (got,) = session(tmp_path / "m.onnx").run(None, feed(inputs), options(adapter))
    assert rel(torch.from_numpy(got), model(**inputs).logits) < 2e-6


class Odd(nn.Module):
    """A convolution (rotated weight), an embedding, a grouped 1x1 convolution, and a linear layer of 3-D input."""

    def __init__(self):
        super().__init__()
        self.embed, self.conv = nn.Embedding(19, 12), nn.Conv1d(12, 10, 3, padding=1)
        self.point, self.out = nn.Conv1d(10, 8, 1, groups=2), nn.Linear(8, 5)

    def forward(self, ids):
        x = self.embed(ids).transpose(1, 2)
        return self.out(self.point(torch.relu(self.conv(x))).transpose(1, 2))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("mode", ["swappable", "mixed"])
def test_other_layers(mode, half, tmp_path):
    rules = {"embed": OFT(4), "out": OFT(4)} | ({} if mode == "mixed" else {"conv": OFT(6), "point": OFT(5)})
    base = Odd().eval().half() if half else Odd().eval()
    model = oftfx.transform(base, rules, adapter="x")
    oftfx.add_adapter(model, "y", rules)
    randomize(model, std=0.3)
    ids, other = torch.randint(19, (2, 6)), torch.randint(19, (5, 9))
    oftfx.set_adapter(model, "y")
    oftfx.export_onnx(model, tmp_path / "m.onnx", {"ids": ids}, adapters=mode)
    run = session(tmp_path / "m.onnx")
    bound = 3e-3 if half else 2e-6
    for place, name in enumerate([None, "x", "y"]):
        oftfx.set_adapter(model, name)
        more, given = {}, None
        if mode == "mixed":
            more = {"adapter_index": np.full(5, place)}
        elif name:
            given = lora(oftfx.export_onnx_adapter(model, tmp_path / "a.onnx_adapter", adapter=name))
        (got,) = run.run(None, feed({"ids": other}, **more), options(given))
        assert rel(torch.from_numpy(got), model(other)) < bound


def test_what_cannot_be_swapped_is_refused(tenants, tiny_llama, ids, tmp_path):
    path = tmp_path / "m.onnx"
    oftfx.set_adapter(tenants, ["a", "b"])
    with pytest.raises(ExportError, match="from the active adapter, and there are 2: a, b"):
        oftfx.export_onnx(tenants, path, ids(), adapters="swappable")
    oftfx.set_adapter(tenants, "c")
    with pytest.raises(ExportError, match="adapter 'a' rotates model.layers.0.self_attn.q_proj, which the graph"):
        oftfx.export_onnx(tenants, path, ids(), adapters="mixed")
    oftfx.export_onnx(tenants, path, ids(), adapters="swappable", verify=False)
    with pytest.raises(ExportError, match="adapter 'a' rotates model.layers.0.self_attn.q_proj, which the graph"):
        oftfx.export_onnx_adapter(tenants, tmp_path / "a.onnx_adapter", adapter="a", graph=path)
    with pytest.raises(AdapterError, match="no adapter 'd'"):
        oftfx.export_onnx_adapter(tenants, tmp_path / "d.onnx_adapter", adapter="d")
    oftfx.add_adapter(tenants, "wide", {"*.mlp.*": OFT(16, share_input=True)})
    with pytest.raises(ExportError, match=r"adapter 'wide' has blocks \(4, 16, 16\) at .*gate_proj, the graph \(8"):
        oftfx.export_onnx_adapter(tenants, tmp_path / "w.onnx_adapter", adapter="wide", graph=path)
    whole = oftfx.transform(tiny_llama(), {"*.mlp.*": OFT(8)}, train=["lm_head"])
    with pytest.raises(ExportError, match="adapter 'default' also has lm_head.weight of its own, trained whole"):
        oftfx.export_onnx(whole, path, ids(), adapters="swappable")
    conv = oftfx.transform(nn.Sequential(nn.Conv1d(6, 4, 3)), {"0": OFT(3)})
    with pytest.raises(ExportError, match="0: this rotation acts on the weight, which all rows of a batch share"):
        oftfx.export_onnx(conv, path, (torch.randn(2, 6, 8),), adapters="mixed")
    flat = oftfx.transform(Flattened(), {"a": OFT(3)})
    with pytest.raises(ExportError, match=r"a: its input has the shape .*rows of the batch cannot be told"):
        oftfx.export_onnx(flat, path, {"x": torch.randn(2, 5, 6)}, adapters="mixed")
    with pytest.raises(ExportError, match="needs a dynamic batch"):
        oftfx.export_onnx(flat, path, {"x": torch.randn(2, 5, 6)}, adapters="mixed", dynamic_shapes=None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx"]
    poisoned = oftfx.transform(nn.Sequential(nn.Linear(6, 4)), {"0": OFT(3)})
    poisoned[0].oft.default.skew.data.fill_(float("nan"))
    with pytest.raises(ExportError, match=r"adapter 'default': 0.oft.blocks is not finite"):
        oftfx.export_onnx_adapter(poisoned, tmp_path / "p.onnx_adapter")


class Flattened(nn.Module):
    """Reads its rows flattened, as expert layers do."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 4)

    def forward(self, x):
        return self.a(x.flatten(0, 1)).unflatten(0, x.shape[:2])


@pytest.mark.needs("bitsandbytes")
def test_a_kept_rotation_cannot_be_swapped(tmp_path):
    from oftfx.formats.bnb4 import make_linear4bit

    model = randomize(oftfx.transform(nn.Sequential(make_linear4bit(nn.Linear(64, 32))), {"0": OFT(8)}))
    folded = oftfx.fold(model, quantized="keep").model
    again = oftfx.transform(folded, {"0": OFT(8)})
    with pytest.raises(ExportError, match="0 has a fixed rotation, left by fold"):
        oftfx.export_onnx(again, tmp_path / "m.onnx", (torch.randn(2, 64),), adapters="swappable")


def test_the_file_says_what_is_in_it(tenants, ids, tmp_path):
    import onnxruntime

    oftfx.export_onnx(tenants, tmp_path / "m.onnx", ids(), adapters="swappable")
    notes = session(tmp_path / "m.onnx").get_modelmeta().custom_metadata_map
    assert notes["oftfx.adapter_mode"] == "swappable"
    file = oftfx.export_onnx_adapter(tenants, tmp_path / "b.onnx_adapter", adapter="b")
    held = onnxruntime.AdapterFormat.read_adapter(str(file))
    assert held.get_model_version() == int(notes["oftfx.interface"])
    stranger = oftfx.transform(nn.Sequential(nn.Linear(8, 4)), {"0": OFT(4)}, adapter="b")
    other = oftfx.export_onnx_adapter(stranger, tmp_path / "o.onnx_adapter", adapter="b")
    assert onnxruntime.AdapterFormat.read_adapter(str(other)).get_model_version() != held.get_model_version()

    result = oftfx.fold(tenants, adapter="b")
    oftfx.export_onnx(result.model, tmp_path / "f.onnx", ids())
    notes = session(tmp_path / "f.onnx").get_modelmeta().custom_metadata_map
    (fold,) = json.loads(notes["oftfx.folds"])
    assert notes["oftfx.state"] == "folded"
    assert fold["sites"] == {"dense: folded": 14}
    assert list(fold["adapters"]) == ["b"]
    assert len(fold["adapters"]["b"]) == 64
    oftfx.set_adapter(tenants, "b")
    oftfx.export_onnx(tenants, tmp_path / "u.onnx", ids())
    notes = session(tmp_path / "u.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(notes["oftfx.adapter_hashes"]) == fold["adapters"]
    assert notes["oftfx.state"] == "unfolded"
    inner = oftfx.transform(nn.Sequential(nn.Linear(6, 4)), {"0": OFT(3)})
    outer = nn.Sequential(nn.Linear(6, 6), oftfx.fold(inner).model)
    oftfx.export_onnx(outer, tmp_path / "p.onnx", (torch.randn(2, 6),))
    notes = session(tmp_path / "p.onnx").get_modelmeta().custom_metadata_map
    assert [f["module"] for f in json.loads(notes["oftfx.folds"])] == ["1"]
    plain = oftfx.unfold(oftfx.fold(tenants, inplace=True, undo=True))
    assert "_oftfx_folds" not in vars(plain)


def test_equal_models_give_equal_bytes(tenants, ids, tmp_path):
    for mode in ["swappable", "mixed", "fixed"]:
        for name in ["one", "two"]:
            oftfx.export_onnx(tenants, tmp_path / f"{name}.onnx", ids(), adapters=mode, verify=False)
            oftfx.export_onnx_adapter(tenants, tmp_path / f"{name}.onnx_adapter", adapter="b")
        for suffix in ["onnx", "onnx_adapter"]:
            assert (tmp_path / f"one.{suffix}").read_bytes() == (tmp_path / f"two.{suffix}").read_bytes()


def test_an_adapter_that_shares_fits_a_graph_that_does_not_and_not_the_other_way_round(tiny_llama, ids, tmp_path):
    model = oftfx.transform(tiny_llama(), {"all-linear": OFT(8)}, adapter="each")
    oftfx.add_adapter(model, "shared", {"all-linear": OFT(8, share_input=True)})
    for name in ["each", "shared"]:
        for parameter in oftfx.adapter_parameters(model, name):
            nn.init.normal_(parameter, std=0.1)
    oftfx.set_adapter(model, "each")
    path = tmp_path / "m.onnx"
    oftfx.export_onnx(model, path, ids(), adapters="swappable")
    adapter = lora(oftfx.export_onnx_adapter(model, tmp_path / "s.onnx_adapter", adapter="shared", graph=path))
    inputs = ids(2, 5, seed=8)
    (got,) = session(path).run(None, feed(inputs), options(adapter))
    assert rel(torch.from_numpy(got), expected(model, "shared", inputs)) < 2e-6
    import onnxruntime

    loose = oftfx.export_onnx_adapter(model, tmp_path / "l.onnx_adapter", adapter="shared")  # without the graph
    number = session(path).get_modelmeta().custom_metadata_map["oftfx.interface"]
    assert str(onnxruntime.AdapterFormat.read_adapter(str(loose)).get_model_version()) != number
    oftfx.export_onnx(model, path, ids(), adapters="mixed")
    (got,) = session(path).run(None, feed(inputs, adapter_index=np.array([2, 2])))
    assert rel(torch.from_numpy(got), expected(model, "shared", inputs)) < 2e-6
    oftfx.set_adapter(model, "shared")
    with pytest.raises(ExportError, match="one rotation for .*q_proj and .*k_proj, adapter 'each' has not"):
        oftfx.export_onnx(model, path, ids(), adapters="mixed")
    oftfx.export_onnx(model, path, ids(), adapters="swappable", verify=False)
    with pytest.raises(ExportError, match="adapter 'each' has not"):
        oftfx.export_onnx_adapter(model, tmp_path / "e.onnx_adapter", adapter="each", graph=path)


def test_an_adapter_of_other_weights_is_refused(tmp_path):
    torch.manual_seed(1)
    first, second = nn.Sequential(nn.Linear(8, 4)), nn.Sequential(nn.Linear(8, 4))
    models = [randomize(oftfx.transform(m, {"0": OFT(4)})) for m in (first, second)]
    oftfx.export_onnx(models[0], tmp_path / "m.onnx", (torch.randn(2, 8),), adapters="swappable")
    with pytest.raises(ExportError, match="was exported from another model: Sequential with other layers or weights"):
        oftfx.export_onnx_adapter(models[1], tmp_path / "a.onnx_adapter", graph=tmp_path / "m.onnx")


def test_double_precision(tmp_path):
    model = randomize(oftfx.transform(nn.Sequential(nn.Linear(12, 7)).double(), {"0": OFT(4)}))
    oftfx.export_onnx(model, tmp_path / "m.onnx", (torch.randn(2, 12).double(),), adapters="swappable")
    adapter = lora(oftfx.export_onnx_adapter(model, tmp_path / "a.onnx_adapter", graph=tmp_path / "m.onnx"))
    x = torch.randn(3, 12).double()
    (got,) = session(tmp_path / "m.onnx").run(None, feed({"input": x}), options(adapter))
    assert rel(torch.from_numpy(got), model(x)) < 1e-12
