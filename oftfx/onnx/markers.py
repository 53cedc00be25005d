"""Tensors of quantized layers on their way through an export: under their names, in their types, never folded.

The exporter has no tensors of 4-bit integers, and operators cannot carry one as attribute. So a lowered layer holds two
codes a byte and reads them through a marker, ``oftfx::Marked``, that says what they are. `resolve` replaces the markers
in the exported program, with the objects of onnx-ir: the initializer gets the type and keeps its bytes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

UINT4, INT4 = 21, 22
"""``onnx.TensorProto.DataType``."""
_DOMAIN, _NOTE = "oftfx", "oftfx.marked"


def marked(tensor: Tensor, kind: int | None = None, shape: tuple[int, ...] | None = None) -> Tensor:
    """A buffer of a lowered layer, as its operators read it; only while a model is exported.

    Args:
        tensor: the buffer itself.
        kind: ONNX type of what it holds, two elements a byte and the first in the low bits; None: its own.
        shape: of the elements, where ``kind`` is given.
    """
    return torch.onnx.ops.symbolic(
        f"{_DOMAIN}::Marked",
        (tensor,),
        {"kind": kind or 0},
        dtype=kind or tensor.dtype,
        shape=tensor.shape if shape is None else shape,
        version=1,
    )


def resolve(model: Any) -> None:
    """Replace markers by their initializers; ``model`` is an ``onnx_ir.Model``."""
    import onnx_ir as ir

    for node in list(model.graph):
        if node.domain != _DOMAIN or node.op_type != "Marked":
            continue
        value, out = node.inputs[0], node.outputs[0]
        kind = node.attributes["kind"].as_int()
        if kind and value.const_value.dtype != kind:
            packed = ir.PackedTensor(
                value.const_value.numpy(), ir.DataType(kind), shape=out.shape.numpy(), name=value.name
            )
            value.const_value, value.shape, value.type = packed, packed.shape, ir.TensorType(packed.dtype)
        value.metadata_props[_NOTE] = "1"
        ir.convenience.replace_all_uses_with(out, value)
        model.graph.remove(node, safe=True)


def keeps(node: Any) -> bool | None:
    """What constant folding asks of a node: False where it reads such a tensor, which would be stored in floats."""
    read = any(v is not None and v.is_initializer() and _NOTE in v.metadata_props for v in node.inputs)
    return False if read else None
