"""Parameters in 4 bits: what computes them, by operators that look their codes up."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.errors import ExportError, FormatError
from oftfx.formats.bnb4_experts import four_bit_parameters, stored_codes
from oftfx.formats.parametrized import parametrization_of
from oftfx.onnx.lower.look_up import LookUp, WholeValues
from oftfx.onnx.lower.stand_in import FloatProduct, UnfitError
from oftfx.onnx.lower.weight import Weight, weight_from


class Computed(nn.Module):
    """The first step of a parametrization: the parameter's values from its codes, in the graph.

    Args:
        weight: the codes, the first axes of the parameter as one.
        shape: of the parameter.
        dtype: in which readers get it.
        dialect: see `oftfx.onnx.lower.layers.lower_quantized`.

    Raises:
        UnfitError: no operator of the dialect computes it right.
    """

    def __init__(self, weight: Weight, shape: tuple[int, ...], dtype: torch.dtype, dialect: str) -> None:
        super().__init__()
        self.values, self.shape, self.dtype = _values(weight, dialect), shape, dtype

    def forward(self, original: Tensor) -> Tensor:  # noqa: ARG002
        """As readers get it; the codes are the values' own."""
        found = self.values.weight()
        if self.values.rounded is not None:
            found = found.to(self.values.rounded)
        return found.to(self.dtype).reshape(self.shape)


def lower_parameters(model: nn.Module, dialect: str) -> None:
    """Let every 4-bit parameter of ``model``, in place, be computed by operators; rotations stay behind them.

    Raises:
        ExportError: none of the dialect computes one right.
    """
    for path in [*four_bit_parameters(model)]:
        parent, _, name = path.rpartition(".")
        module = model.get_submodule(parent)
        computes: Any = parametrization_of(module, name)
        try:
            grid, codes, own = stored_codes(computes)
            new = Computed(weight_from(grid, codes, own), tuple(computes[0].quant_state.shape), own.dtype, dialect)
        except (FormatError, ExportError, UnfitError) as error:
            raise ExportError(
                f"{path}: this parameter in 4 bits has no operator in dialect {dialect!r}"
                + (f": {error}" if str(error) else "")
                + "; fold with quantized='float' first"
            ) from error
        computes._modules["0"] = new.train(computes.training)
        computes._parameters["original"] = nn.Parameter(torch.zeros(()), requires_grad=False)


def _values(weight: Weight, dialect: str) -> FloatProduct:
    with suppress(UnfitError):
        return LookUp(weight, dialect)
    return WholeValues(weight, dialect)
