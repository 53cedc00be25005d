"""Small ONNX files written node by node, so that the expected outputs are a line of numpy."""

import json

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto as T
from onnx import helper, numpy_helper

BLOCKS = "layer.oft.blocks"
INTERFACE = 4711


def save(path, nodes, inputs, outputs, initializers, metadata):
    graph = helper.make_graph(nodes, "g", inputs, outputs, [numpy_helper.from_array(v, n) for n, v in initializers])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))
    return path


def value(name, kind, shape):
    return helper.make_tensor_value_info(name, kind, shape)


def swappable(path, interface=INTERFACE, size=4):
    """``y = x @ blocks``, the blocks overridable and the identity by default."""
    return save(
        path,
        [helper.make_node("MatMul", ["x", BLOCKS], ["y"])],
        [value("x", T.FLOAT, ["batch", "length", size]), value(BLOCKS, T.FLOAT, [size, size])],
        [value("y", T.FLOAT, ["batch", "length", size])],
        [(BLOCKS, np.eye(size, dtype=np.float32))],
        {"oftfx.adapter_mode": "swappable", "oftfx.interface": str(interface)},
    )


def mixed(path, adapters):
    """``y[i] = x[i] @ stack[adapter_index[i]]``; row 0 of the stack is the identity, the base."""
    stack = np.stack([np.eye(4, dtype=np.float32), *adapters.values()])
    return save(
        path,
        [
            helper.make_node("Gather", ["stack", "adapter_index"], ["chosen"]),
            helper.make_node("MatMul", ["x", "chosen"], ["y"]),
        ],
        [value("x", T.FLOAT, ["batch", "length", 4]), value("adapter_index", T.INT64, ["batch"])],
        [value("y", T.FLOAT, ["batch", "length", 4])],
        [("stack", stack)],
        {"oftfx.adapter_mode": "mixed", "oftfx.adapter_names": json.dumps(["", *adapters])},
    )


def fixed(path, factor=2.0, axis="batch"):
    """``y = factor * x``, no adapters."""
    return save(
        path,
        [helper.make_node("Mul", ["x", "factor"], ["y"])],
        [value("x", T.FLOAT, [axis, 4])],
        [value("y", T.FLOAT, [axis, 4])],
        [("factor", np.float32(factor))],
        {},
    )


TYPES = {
    "text": (T.STRING, "BYTES"),
    "flag": (T.BOOL, "BOOL"),
    "half": (T.FLOAT16, "FP16"),
    "double": (T.DOUBLE, "FP64"),
    "small": (T.INT8, "INT8"),
    "large": (T.INT64, "INT64"),
    "byte": (T.UINT8, "UINT8"),
}


def types(path):
    """A copy of each input of each type, ``(batch, 3)``, and of `rows`, which has the batch axis alone."""
    names = {**{n: (kind, ["batch", 3]) for n, (kind, _) in TYPES.items()}, "rows": (T.INT32, ["batch"])}
    return save(
        path,
        [helper.make_node("Identity", [n], [f"{n}_out"]) for n in names],
        [value(n, kind, shape) for n, (kind, shape) in names.items()],
        [value(f"{n}_out", kind, shape) for n, (kind, shape) in names.items()],
        [],
        {},
    )


def typed_inputs(rows=2):
    generator = np.random.default_rng(rows)
    shape = (rows, 3)
    return {
        "text": np.array([f"größe {i} \0x" for i in range(3 * rows)], dtype=object).reshape(shape),
        "flag": generator.random(shape) > 0.5,
        "half": generator.standard_normal(shape).astype(np.float16),
        "double": generator.standard_normal(shape),
        "small": generator.integers(-128, 128, shape, dtype=np.int8),
        "large": generator.integers(-(2**62), 2**62, shape),
        "byte": generator.integers(0, 256, shape, dtype=np.uint8),
        "rows": generator.integers(-9, 9, rows, dtype=np.int32),
    }


def write_adapter(path, blocks, interface=INTERFACE, name=BLOCKS):
    """An ``.onnx_adapter`` file, put in its place by renaming."""
    found = onnxruntime.AdapterFormat()
    found.set_adapter_version(1)
    found.set_model_version(interface)
    value = onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(blocks))
    found.set_parameters({name: value})
    partial = path.with_name(path.name + ".part")
    found.export_adapter(str(partial))
    partial.replace(path)
    return path


def rotations(*names, size=4):
    """A random orthogonal matrix for each name."""
    generator = np.random.default_rng(0)
    return {n: np.linalg.qr(generator.standard_normal((size, size)))[0].astype(np.float32) for n in names}
