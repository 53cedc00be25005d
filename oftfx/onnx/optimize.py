"""Simplify an exported program with the passes of torch's own optimisation, in an order that keeps weights' names.

The exporter's own order transposes weights as nameless constants, merges equal small initializers, so two layers could
end up reading one tensor, and matches a pattern of several outputs (slice_split) that is quadratic in the number of
nodes, which takes most of the export time of a deep model.
"""

from __future__ import annotations

from typing import Any

from oftfx.onnx.fused.leftovers import drop_empty_rotations, drop_round_trips, has_fused_attention
from oftfx.onnx.markers import keeps, resolve

RULES = [
    "add_0_rule",
    "cast_cast_rule",
    "cast_constant_of_shape_rule",
    "collapse_slice_rule",
    "collapse_slice2_rule",
    "div_by_1_rule",
    "dropout_inference_rule",
    "dropout_zero_rule",
    "flatten_to_reshape_rule",
    "fuse_batchnorm_into_conv_rule",
    "fuse_pad_into_conv_rule",
    "materialize_reshape_shape_rule",
    "mul_by_1_rule",
    "no_op_cast_rule",
    "no_op_expand_rule",
    "no_op_transpose_rule",
    "one_reshape_matmul_reshape_rule",
    "remove_optional_bias_from_conv_rule",
    "remove_optional_bias_from_gemm_rule",
    "reshape_reshape_rule",
    "squeeze_reshape_1d_rule",
    "sub_0_rule",
    "transpose_transpose_rule",
    "two_reshapes_matmul_reshape_rule",
    "unsqueeze_unsqueeze_rule",
]
"""Names in ``onnxscript.rewriter.rules.common``."""


def optimize(model: Any) -> None:
    """Fold constants, merge equal subexpressions, drop what is unused; ``model`` is an ``onnx_ir.Model``."""
    import onnx_ir.passes.common as common
    from onnxscript.optimizer import fold_constants
    from onnxscript.rewriter import rewrite
    from onnxscript.rewriter.rules import common as rules

    common.InlinePass()(model)
    common.RemoveUnusedNodesPass()(model)
    resolve(model)
    transpose_weights(model)
    weights = set(model.graph.initializers)
    fused = has_fused_attention(model)
    for _ in range(2):
        fold_constants(model, onnx_shape_inference=True, should_fold=keeps)
        common.RemoveUnusedNodesPass()(model)
        if fused:
            drop_empty_rotations(model)
        rewrite(model, [getattr(rules, name) for name in RULES])
    common.RemoveUnusedNodesPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    merge_constants(model, keep=weights)
    if fused:
        drop_round_trips(model)
    common.CommonSubexpressionEliminationPass()(model)
    tidy(model)


def tidy(model: Any) -> None:
    """Drop what is unused, and give values and nodes names of their own."""
    import onnx_ir.passes.common as common

    for step in (
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    ):
        step(model)


def merge_constants(model: Any, keep: set[str]) -> None:
    """Merge equal constants, so equal expressions over them can be merged; never the weights named in ``keep``."""
    import onnx_ir as ir

    first: dict[tuple[Any, ...], Any] = {}
    for name, value in list(model.graph.initializers.items()):
        if name in keep or value.const_value is None or value.is_graph_output():
            continue
        tensor = value.const_value
        known = first.setdefault((tensor.dtype, tuple(tensor.shape), tensor.tobytes()), value)
        if known is not value:
            ir.convenience.replace_all_uses_with(value, known)
            del model.graph.initializers[name]


def transpose_weights(model: Any) -> None:
    """Replace ``Transpose(weight)`` by a weight stored transposed, under the weight's own name.

    A weight that is read both ways (a tied embedding), or whose transpose is a result, keeps the node.
    """
    import onnx_ir as ir

    for name, value in list(model.graph.initializers.items()):
        consumers = [use.node for use in value.uses()]
        if not consumers or value.const_value is None or value.const_value.dtype.itemsize < 1:
            continue
        if any(n.op_type != "Transpose" or n.outputs[0].is_graph_output() for n in consumers):
            continue
        orders = {tuple(n.attributes["perm"].as_ints()) if "perm" in n.attributes else () for n in consumers}
        order = orders.pop()
        if orders or not order:
            continue
        new = _transposed(ir, name, value.const_value, order)
        del model.graph.initializers[name]
        model.graph.initializers[name] = new
        for node in consumers:
            ir.convenience.replace_all_uses_with(node.outputs[0], new)
            model.graph.remove(node, safe=True)


def _transposed(ir: Any, name: str, tensor: Any, order: tuple[int, ...]) -> Any:
    shape = [tensor.shape[i] for i in order]

    def make() -> Any:
        import numpy as np

        return ir.tensor(np.ascontiguousarray(tensor.numpy().transpose(order)), name=name)

    # Lazy: never two copies of all weights in memory, not even of a model that fills it.
    lazy = ir.LazyTensor(make, dtype=tensor.dtype, shape=ir.Shape(shape), name=name)
    return ir.Value(name=name, const_value=lazy, shape=ir.Shape(shape), type=ir.TensorType(tensor.dtype))
