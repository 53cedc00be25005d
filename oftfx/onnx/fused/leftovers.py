"""Take out what attention in one operator leaves of the model's own: rotations by nothing, reshapes there and back."""

from __future__ import annotations

from typing import Any


def has_fused_attention(model: Any) -> bool:
    """Whether an ``onnx_ir.Model`` has a ``GroupQueryAttention``."""
    return any(n.op_type == "GroupQueryAttention" for n in model.graph)


def drop_empty_rotations(model: Any) -> None:
    """Replace ``x * 1 + half * 0`` by ``x``: what `FusedRotary` leaves of the model's own rotation."""
    import onnx_ir as ir

    for node in list(model.graph):
        if node.op_type != "Add" or node.domain or node.outputs[0].is_graph_output():
            continue
        for one, nothing in (node.inputs, node.inputs[::-1]):
            x = _factor(ir, one, 1)
            if x is not None and _factor(ir, nothing, 0) is not None:
                ir.convenience.replace_all_uses_with(node.outputs[0], x)
                break


def drop_round_trips(model: Any) -> None:
    """Replace by ``x`` what reshapes make of it where that has the shape of ``x`` again, by the names of its axes."""
    import onnx_ir as ir

    for node in model.graph:
        old = node.outputs[0]
        if node.domain or old.is_graph_output():
            continue
        if node.op_type == "Identity":
            ir.convenience.replace_all_uses_with(old, node.inputs[0])
        if node.op_type != "Reshape" or old.shape is None:
            continue
        x = old
        while (maker := x.producer()) is not None and maker.op_type == "Reshape" and not maker.domain:
            x = maker.inputs[0]
            if x.shape is not None and list(x.shape) == list(old.shape) and None not in _names(x.shape):
                ir.convenience.replace_all_uses_with(old, x)
                break


def _names(shape: Any) -> list[Any]:
    """Of its axes, or their lengths; None for one of which nothing is known."""
    return [d if isinstance(d, int) else d.value for d in shape]


def _factor(ir: Any, value: Any, number: float) -> Any:
    """``x`` where ``value`` is ``x`` times a constant of nothing but ``number``, which does not widen it."""
    node = value.producer()
    if node is None or node.op_type != "Mul" or node.domain:
        return None
    for x, constant in (node.inputs, node.inputs[::-1]):
        tensor = ir.convenience.get_const_tensor(constant)
        if tensor is None or x.shape is None or len(tensor.shape) > len(x.shape):
            continue
        fits = all(a in (1, b) for a, b in zip(reversed(tensor.shape), reversed(x.shape), strict=False))
        if fits and bool((tensor.numpy() == number).all()):
            return x
    return None
