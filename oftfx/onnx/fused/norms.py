"""RMS norms as ``SimplifiedLayerNormalization``, with the sum in front of them ``SkipSimplifiedLayerNormalization``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

NORM, SKIP = "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"


class _Norm(NamedTuple):
    """``x / sqrt(mean(x ** 2) + epsilon) * scale``, over the last axis: its values and its last node."""

    x: Any
    scale: Any
    epsilon: float
    last: Any


def fuse_norms(model: Any) -> int:
    """Replace RMS norms in float32 by ONNX Runtime's operators; ``model`` is an ``onnx_ir.Model``.

    The scale is whatever the graph multiplies by, so a weight that counts from one (Gemma's) stays the sum that it is.
    A norm in float16 is spelled with casts, which round twice where the operator rounds once: it stays.

    Returns:
        How many were replaced.
    """
    import onnx_ir as ir

    count = 0
    for node in list(model.graph):
        norm = _matched(ir, node)
        if norm is None:
            continue
        added = _sum_before(norm.x)
        old = norm.last.outputs[0]
        attributes = {"epsilon": norm.epsilon}
        if added is None:
            attributes |= {"axis": -1, "stash_type": 1}
            new = ir.node(NORM, [norm.x, norm.scale], attributes)
        else:
            inputs = [*added.inputs, norm.scale]
            new = ir.node(SKIP, inputs, attributes, domain="com.microsoft", num_outputs=4)
            model.graph.opset_imports.setdefault("com.microsoft", 1)
        made = new.outputs[0]
        made.name, made.shape, made.type = old.name, old.shape, old.type
        model.graph.insert_before(norm.last if added is None else added, new)
        ir.convenience.replace_all_uses_with(old, made, replace_graph_outputs=True)
        if added is not None:
            before, sum_ = added.outputs[0], new.outputs[3]
            sum_.name, sum_.shape, sum_.type = before.name, before.shape, before.type
            # What is left of the norm's own nodes still reads it, and goes with them.
            ir.convenience.replace_all_uses_with(before, sum_)
        count += 1
    # A sum is where it was, since others read it; what its norm's scale is computed from may be further down.
    model.graph.sort()
    return count


def blank_unused(model: Any) -> None:
    """Results of `SKIP` that nobody reads get no name, which tells ONNX Runtime not to make them; the last change."""
    for node in model.graph:
        if node.op_type == SKIP:
            for value in node.outputs[1:]:
                if not value.uses() and not value.is_graph_output():
                    value.name = ""


@contextmanager
def known_to_checker() -> Iterator[None]:
    """The checker knows `NORM`, which ONNX Runtime has in the standard's domain and the standard does not."""
    from onnx import defs

    schema, kinds = defs.OpSchema, ["tensor(float)", "tensor(double)", "tensor(float16)"]
    made = schema(
        NORM,
        "",
        1,
        inputs=[schema.FormalParameter("X", "T"), schema.FormalParameter("scale", "T")],
        outputs=[schema.FormalParameter("Y", "T")],
        type_constraints=[("T", kinds, "")],
        attributes=[
            schema.Attribute("epsilon", schema.AttrType.FLOAT, ""),
            schema.Attribute("axis", schema.AttrType.INT, ""),
            schema.Attribute("stash_type", schema.AttrType.INT, ""),
        ],
    )
    if defs.has(NORM):
        yield
        return
    defs.register_schema(made)
    try:
        yield
    finally:
        defs.deregister_schema(NORM, 1, "")


def _matched(ir: Any, power: Any) -> _Norm | None:
    """The norm that begins with ``Pow``; None where a node is another, or is read by others as well."""
    if not _is(power, "Pow") or _constant(power.inputs[1]) != 2:
        return None
    x = power.inputs[0]
    if x.dtype != ir.DataType.FLOAT or x.shape is None:
        return None
    mean = _only_user(power, "ReduceMean")
    if mean is None or len(mean.inputs) != 2 or _constant(mean.inputs[1]) not in (-1, len(x.shape) - 1):
        return None
    if "keepdims" in mean.attributes and mean.attributes["keepdims"].as_int() != 1:
        return None
    raised = _only_user(mean, "Add")
    epsilon = None if raised is None else _constant(_other(raised, mean.outputs[0]))
    root = None if raised is None else _only_user(raised, "Sqrt")
    inverse = None if root is None else _only_user(root, "Reciprocal")
    scaled = None if inverse is None else _only_user(inverse, "Mul")
    last = None if scaled is None else _only_user(scaled, "Mul")
    if epsilon is None or last is None or _other(scaled, inverse.outputs[0]) is not x:  # type: ignore[union-attr]
        return None
    scale = _other(last, scaled.outputs[0])  # type: ignore[union-attr]
    wide = x.shape[-1]
    if scale.shape is None or list(scale.shape) != [wide] or not isinstance(wide, int) or scale.dtype != x.dtype:
        return None
    return _Norm(x, scale, float(epsilon), last)


def _sum_before(x: Any) -> Any:
    """The sum of two tensors of one shape that makes ``x``; None where there is none, or one of them is a bias."""
    node = x.producer()
    if not _is(node, "Add") or x.is_graph_output() or x.shape is None or len(x.shape) != 3:
        return None
    shapes = [v.shape for v in node.inputs]
    return node if all(s is not None and list(s) == list(x.shape) for s in shapes) else None


def _is(node: Any, kind: str) -> bool:
    return node is not None and node.op_type == kind and node.domain == ""


def _only_user(node: Any, kind: str) -> Any:
    value = node.outputs[0]
    uses = list(value.uses())
    found = uses[0].node if len(uses) == 1 and not value.is_graph_output() else None
    return found if _is(found, kind) else None


def _other(node: Any, value: Any) -> Any:
    first, second = node.inputs
    return second if first is value else first


def _constant(value: Any) -> float | None:
    """The one number of an initializer that nothing can override."""
    if value is None or value.const_value is None or value.is_graph_input() or value.const_value.size != 1:
        return None
    return float(value.const_value.numpy().reshape(-1)[0])
