"""Every quantized format exported with its own bits, in every dialect, against float64 algebra."""

from itertools import pairwise

import onnx
import pytest
import torch

import oftfx
from oftfx.formats.registry import format_of
from tests.onnx.lowered import CASES, OPERATORS, RAGGED, marks, network
from tests.reference import rel

pytestmark = pytest.mark.needs("onnx", "onnxruntime", "onnxscript")
DIALECTS = ("ort", "standard", "openvino")
SHAPES = {"input": {0: "batch", 1: "sequence"}}


def over_dialects(cases):
    return [
        pytest.param(name, dialect, id=f"{name}-{dialect}", marks=marks(found, dialect))
        for name, found in cases.items()
        for dialect in DIALECTS
    ]


def product(layer, x):
    """In float64."""
    y = x @ format_of(layer).dequantize(layer).double().T
    return y if layer.bias is None else y + layer.bias.detach().double()


def expected(model, x):
    return product(model[2], product(model[0], x.double()).relu())


def in_onnx_runtime(path, x):
    """With all its optimisations, as by default."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"input": x.numpy()})[0])


def in_openvino(path, x):
    """Without the 8-bit activations that are its default."""
    import openvino

    core = openvino.Core()
    settings = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 0, "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    return torch.from_numpy(core.compile_model(core.read_model(str(path)), "CPU", settings)([x.numpy()])[0])


def initializers(path):
    return {i.name: i for i in onnx.load(str(path)).graph.initializer}


def check(found, sizes, dialect, path):
    model = network(found, sizes)
    report = oftfx.export_onnx(model, path, (torch.randn(2, 3, sizes[0]),), dynamic_shapes=SHAPES, dialect=dialect)
    x = torch.randn(5, 4, sizes[0])
    assert rel(in_onnx_runtime(path, x), expected(model, x)) <= found.bound
    if dialect == "openvino":
        assert rel(in_openvino(path, x), expected(model, x)) <= found.bound
    wanted = OPERATORS[found.ways[dialect]]
    counted = {name: report.operators.get(name, 0) for name in wanted}
    assert counted == wanted
    assert report.operators.get("Gather", 0) == wanted.get("Gather", 2 * found.ordered)
    assert report.opset == found.opset[dialect]
    assert onnx.load(str(path)).opset_import[0].version == found.opset[dialect]
    if dialect == "standard":
        assert not [name for name in report.operators if "::" in name]
    return model, report


@pytest.mark.parametrize(("name", "dialect"), over_dialects(CASES))
def test_two_layers_keep_their_bits(name, dialect, tmp_path):
    found = CASES[name]
    model, _ = check(found, found.sizes, dialect, tmp_path / "m.onnx")
    tensors = initializers(tmp_path / "m.onnx")
    held = sum(len(t.raw_data) for t in tensors.values())
    if found.package == "aqlm":  # whatever the size of its codebooks
        wanted = sum(format_of(model[i]).nbytes(model[i]) for i in (0, 2))
    else:
        wanted = sum(found.nbytes(rows, columns, dialect) for columns, rows in pairwise(found.sizes))
    wanted += model[0].bias.numel() * model[0].bias.element_size()
    shapes = 2 * 150  # of reshapes and the like, for two layers
    assert wanted * 0.97 <= held <= wanted * 1.03 + shapes
    weights = [n for n in tensors if n.split(".")[-1] in ("qweight", "weight", "codes")]
    assert sorted(n.split(".")[0] for n in weights) == ["0", "2"]


@pytest.mark.parametrize(
    ("name", "dialect"),
    over_dialects({name: found for name, (found, _) in RAGGED.items()}),
)
def test_groups_that_do_not_end_with_the_rows(name, dialect, tmp_path):
    found, sizes = RAGGED[name]
    check(found, sizes, dialect, tmp_path / "m.onnx")
