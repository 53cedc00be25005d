"""Quantized layers as ONNX operators that keep their bytes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.errors import ExportError
from oftfx.formats import format_of
from oftfx.passes.formats.bnb4 import scales_of
from oftfx.placement import CHILD, placements_on
from oftfx.structure import HOOKS, replace_module


class MatMulBnb4(nn.Module):
    """``com.microsoft::MatMulBnb4``: bitsandbytes' own bytes, scales in float32, a bias added after it.

    Only for export; torch never runs it.
    """

    weight: Tensor
    absmax: Tensor

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        state = layer.weight.quant_state
        self.out_features, self.in_features = state.shape
        self.block_size, self.quant_type = state.blocksize, {"fp4": 0, "nf4": 1}[state.quant_type]
        self.register_buffer("weight", layer.weight.data.reshape(-1).view(torch.uint8))
        self.register_buffer("absmax", scales_of(layer))
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """``x (..., in)`` to ``(..., out)``."""
        y = torch.onnx.ops.symbolic(
            "com.microsoft::MatMulBnb4",
            (x, self.weight, self.absmax),
            {
                "K": self.in_features,
                "N": self.out_features,
                "block_size": self.block_size,
                "quant_type": self.quant_type,
            },
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.out_features),
            version=1,
        )
        return y if self.bias is None else y + self.bias


LOWERINGS: dict[str, Callable[[nn.Module], nn.Module]] = {"bnb4": MatMulBnb4}


def lower_quantized(model: nn.Module, dialect: str) -> nn.Module:
    """Replace every quantized layer of ``model``, in place, by a module that exports to its operator.

    Raises:
        ExportError: a format without an operator in this dialect.
    """
    for fqn, module in list(model.named_modules()):
        weight_format = format_of(module)
        if weight_format is None or weight_format.lossless:
            continue
        lowering = LOWERINGS.get(weight_format.name)
        if lowering is None or dialect != "ort":
            raise ExportError(
                f"{fqn}: format {weight_format.name} has no operator in dialect {dialect!r}; fold with "
                "quantized='float' first" + ("" if lowering is None else ", or use dialect='ort'")
            )
        weight_format.prepare(module)
        new = lowering(module).train(module.training)
        if (rotations := module._modules.get(CHILD)) is not None:
            new._modules[CHILD] = rotations
        for name in HOOKS:
            getattr(new, name).update(getattr(module, name))
        for placement in placements_on(module):
            placement.module = new
        replace_module(model, module, new)
    return model
