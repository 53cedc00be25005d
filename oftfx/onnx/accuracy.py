"""How exactly ``MatMulNBits`` multiplies: the level that its nodes ask of ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

from oftfx.errors import ExportError

LEVELS = {0: "as it finds best for floats", 1: "float32", 2: "float16", 3: "bfloat16", 4: "int8"}
"""What activations may be rounded to."""


def check_level(level: int | None, dialect: str) -> None:
    """Refuse a level that is none, or of another runtime.

    Raises:
        ExportError: for a reason that it says.
    """
    if level is None:
        return
    if level not in LEVELS or isinstance(level, bool):
        known = ", ".join(f"{n} ({what})" for n, what in LEVELS.items())
        raise ExportError(f"accuracy_level: got {level!r}, expected None or one of {known}")
    if dialect != "ort":
        raise ExportError(f"accuracy_level is of ONNX Runtime's MatMulNBits; dialect {dialect!r} does not have it")


def set_level(path: Path, level: int) -> None:
    """Set the level of every such product in a file; weights that lie beside it are not read.

    Raises:
        ExportError: it has none.
    """
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    nodes = [n for n in model.graph.node if n.op_type == "MatMulNBits"]
    if not nodes:
        raise ExportError(
            f"accuracy_level={level}: no layer of this model is a MatMulNBits, whose level it is; leave it out"
        )
    for node in nodes:
        kept = [a for a in node.attribute if a.name != "accuracy_level"]
        del node.attribute[:]
        node.attribute.extend([*kept, onnx.helper.make_attribute("accuracy_level", level)])
    onnx.save(model, str(path))
