"""Modules that stand in for quantized layers while a model is exported."""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.onnx.lower.weight import Weight
from oftfx.onnx.markers import marked


class StandIn(nn.Module):
    """``y = x[..., columns] @ W^T + bias`` in operators of ONNX; torch never runs it.

    Attributes:
        opset: the least opset of the standard operators that it takes.
    """

    opset = 18
    columns: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: Weight, dialect: str) -> None:  # noqa: ARG002
        super().__init__()
        self.out_features, self.in_features = weight.shape
        columns = None if weight.columns is None else weight.columns.to(torch.int32)
        self.register_buffer("columns", columns)

    @classmethod
    @abstractmethod
    def fits(cls, weight: Weight, dialect: str) -> bool:
        """Whether the operator takes this weight, and computes it right in the runtimes of the dialect."""

    def forward(self, x: Tensor) -> Tensor:
        """``x (..., in)`` to ``(..., out)``, in the dtype of ``x``."""
        if self.columns is not None:
            # Not the operators' own input for act-order: with packed zero points ONNX Runtime computes that wrong.
            x = torch.index_select(x, -1, marked(self.columns))
        return biased(self.product(x), self.bias)

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """``x @ W^T``, columns of ``x`` in the order of those of ``W``."""


class FloatProduct(StandIn):
    """A stand-in whose weight is computed in the graph and then multiplied."""

    rounded: torch.dtype | None = None

    @abstractmethod
    def weight(self) -> Tensor:
        """``(out, in)``, before products are rounded."""

    def product(self, x: Tensor) -> Tensor:
        """By ``Gemm``."""
        weight = self.weight()
        if self.rounded is not None:
            weight = weight.to(self.rounded)
        return multiplied(x, weight.to(x.dtype))


def multiplied(x: Tensor, weight: Tensor) -> Tensor:
    """``x (..., in) @ weight (out, in)^T`` by ``Gemm``.

    Not by ``Transpose`` and ``MatMul``: ONNX Runtime draws the transpose through ``DequantizeLinear``, finds the two
    side by side, and rounds activations to 8 bits (relative error 5e-3).
    """
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    shape = (flat.shape[0], weight.shape[0])
    y = torch.onnx.ops.symbolic("Gemm", (flat, weight), {"transB": 1}, dtype=x.dtype, shape=shape)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], weight.shape[0])


def biased(y: Tensor, bias: Tensor | None) -> Tensor:
    """``y + bias``, in the dtype of ``y``."""
    return y if bias is None else y + marked(bias).to(y.dtype)
