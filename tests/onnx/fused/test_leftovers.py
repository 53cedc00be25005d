"""What fused attention leaves behind goes, and nothing else does."""

import pytest

from oftfx.onnx.fused.leftovers import drop_empty_rotations, drop_round_trips

pytestmark = pytest.mark.needs("onnx", "onnx_ir")


def graph(inputs, nodes):
    import onnx_ir as ir

    text = f'<ir_version: 10, opset_import: ["" : 20]> g ({inputs}) => (float[b, s, 8] y) {{ {nodes} }}'
    return ir.from_onnx_text(text)


def read_by_last(model):
    """Names of what the last node reads."""
    return [v.name for v in model.graph[-1].inputs]


ROTATION = """
one = Constant <value = float[1, 1, 8] {1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, %s}> ()
nothing = Constant <value = float[1, 1, 8] {0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, %s}> ()
a = Mul(x, one)
b = Mul(nothing, other)
c = Add(%s)
y = Relu(c)
"""


@pytest.mark.parametrize(
    ("one", "nothing", "order", "read"),
    [
        ("1.0", "0.0", "a, b", "x"),
        ("1.0", "0.0", "b, a", "x"),
        ("0.5", "0.0", "a, b", "c"),
        ("1.0", "0.1", "a, b", "c"),
    ],
)
def test_a_rotation_by_nothing(one, nothing, order, read):
    model = graph("float[b, s, 8] x, float[b, s, 8] other", ROTATION % (one, nothing, order))
    drop_empty_rotations(model)
    assert read_by_last(model) == [read]


def test_a_factor_that_widens_is_kept():
    model = graph(
        "float[1, 1, 8] x, float[b, s, 8] other",
        ROTATION.replace("1, 1, 8] {1", "2, 1, 8] {1") % ("1.0, " + "1.0, " * 7 + "1.0", "0.0", "a, b"),
    )
    drop_empty_rotations(model)
    assert read_by_last(model) == ["c"]


@pytest.mark.parametrize(("between", "last", "read"), [("b, s, 2, 4", "b, s, 8", "x"), ("b, s, 2, 4", "s, b, 8", "d")])
def test_reshapes_there_and_back(between, last, read):
    model = graph(
        "float[b, s, 8] x, int64[4] first, int64[3] second",
        "c = Reshape(x, first) d = Reshape(c, second) y = Relu(d)",
    )
    import onnx_ir as ir

    for node, shape in zip(model.graph, (between, last), strict=False):
        node.outputs[0].shape = ir.Shape([int(d) if d.isdigit() else d for d in shape.split(", ")])
    drop_round_trips(model)
    assert read_by_last(model) == [read]


def test_axes_of_which_nothing_is_known_are_not_equal():
    import onnx_ir as ir

    model = graph(
        "float[b, s, 8] x, int64[4] first, int64[3] second",
        "c = Reshape(x, first) d = Reshape(c, second) y = Relu(d)",
    )
    model.graph.inputs[0].shape = ir.Shape([None, None, 8])
    model.graph[1].outputs[0].shape = ir.Shape([None, None, 8])
    drop_round_trips(model)
    assert read_by_last(model) == ["d"]
