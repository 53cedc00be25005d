"""Replace the quantized layers of a model by modules that export to operators with the weights' own bits."""

from __future__ import annotations

from contextlib import suppress
from typing import NamedTuple

import torch.nn as nn
from torch import Tensor

from oftfx.errors import ExportError, FormatError
from oftfx.formats.aqlm import Aqlm
from oftfx.formats.base import WeightFormat
from oftfx.formats.registry import format_of
from oftfx.formats.scalar import ScalarFormat
from oftfx.model.names import CHILD
from oftfx.model.structure import HOOKS, replace_module
from oftfx.onnx.lower.additive import AdditiveCodebooks, sums_deviation
from oftfx.onnx.lower.computed import lower_parameters
from oftfx.onnx.lower.dequantize_linear import DequantizeLinear
from oftfx.onnx.lower.look_up import LookUp, WholeValues
from oftfx.onnx.lower.matmul_bnb4 import MatMulBnb4
from oftfx.onnx.lower.matmul_nbits import MatMulNBits
from oftfx.onnx.lower.stand_in import StandIn, UnfitError
from oftfx.onnx.lower.weight import weight_of
from oftfx.placement.find import placements_on

OPERATORS: dict[str, tuple[type[StandIn], ...]] = {
    "ort": (MatMulNBits, MatMulBnb4, DequantizeLinear, LookUp),
    "standard": (DequantizeLinear, LookUp),
    "openvino": (MatMulNBits, DequantizeLinear, LookUp, WholeValues),
}
"""Of each dialect, the first that fits is taken."""


class Lowered(NamedTuple):
    """A model without quantized layers, for export only.

    Attributes:
        model: the model given.
        opset: the least opset that its operators need; 0 where no layer was replaced.
        needs: path of the layer that needs it.
        deviation: the largest relative change of a weight, by products that the layer rounds to 16 bits and the
            operator does not.
    """

    model: nn.Module
    opset: int = 0
    needs: str = ""
    deviation: float = 0.0


def lower_quantized(model: nn.Module, dialect: str) -> Lowered:
    """Replace every quantized layer of ``model``, in place, by a module that exports to its operators.

    What is exported is the product with the dequantized weight. Formats that round activations as well (LLM.int8,
    neural-compressor's float8) do so in their own runtime only.

    Args:
        model: its layers may be rotated; placements stay.
        dialect: ``"ort"``, ``"standard"`` or ``"openvino"``.

    Raises:
        ExportError: a layer that no operator of the dialect computes right.
    """
    lower_parameters(model, dialect)
    opset, needs, largest = 0, "", 0.0
    for fqn, module in list(model.named_modules()):
        weight_format = format_of(module)
        if weight_format is None or weight_format.lossless:
            continue
        new, deviation = _stand_in(fqn, module, weight_format, dialect)
        if new.opset > opset:  # type: ignore[operator]
            opset, needs = new.opset, fqn  # type: ignore[assignment]
        largest = max(largest, deviation)
        _replace(model, module, new)
    return Lowered(model, opset, needs, largest)


def _stand_in(fqn: str, module: nn.Module, weight_format: WeightFormat, dialect: str) -> tuple[nn.Module, float]:
    remedy = "fold with quantized='float' first" + ("" if dialect == "ort" else ", or use dialect='ort'")
    weight_format.prepare(module)
    try:
        if isinstance(weight_format, Aqlm):
            sums = weight_format.sums(module)
            return AdditiveCodebooks(sums), sums_deviation(sums)
        if isinstance(weight_format, ScalarFormat):
            weight = weight_of(module, weight_format)
            for operator in OPERATORS[dialect]:
                with suppress(UnfitError):
                    new = operator(weight, dialect)
                    # What rounds in the graph as the layer does is the layer's own weight.
                    return new, 0.0 if getattr(new, "rounded", None) is not None else weight.deviation
    except (FormatError, ExportError) as error:
        raise ExportError(f"{fqn}: {error}; {remedy}") from error
    raise ExportError(f"{fqn}: format {weight_format.name} has no operator in dialect {dialect!r}; {remedy}")


def _replace(model: nn.Module, module: nn.Module, new: nn.Module) -> None:
    """Put ``new`` where ``module`` is, with its bias, its rotations and its hooks."""
    bias: Tensor | None = getattr(module, "bias", None)  # a Parameter, a buffer or a plain attribute
    new.register_buffer("bias", None if bias is None else bias.detach())
    new.train(module.training)
    if (rotations := module._modules.get(CHILD)) is not None:
        new._modules[CHILD] = rotations
    for name in HOOKS:
        getattr(new, name).update(getattr(module, name))
    for placement in placements_on(module):
        placement.module = new
    replace_module(model, module, new)
