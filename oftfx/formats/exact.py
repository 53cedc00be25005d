"""How a quantized layer multiplies: by its package's own forward, or exactly, by its dequantized weight."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from oftfx.errors import FormatError
from oftfx.formats.base import WeightFormat
from oftfx.formats.registry import format_of
from oftfx.rotation.accelerate import FORWARD, place_of_forward


class ExactForward:
    """The forward of one layer as ``y = x @ dequantize(layer)^T + bias``, in the dtype of ``x``.

    For layers whose own forward races, repacks the weight in place, loses gradients or cannot run where the model is.
    Nothing but ``x``'s own graph is kept for the backward: the weight is dequantized again.

    Args:
        module: the layer; the object takes the place of its ``forward``, the class stays.
        weight_format: how its weight is read.
    """

    def __init__(self, module: nn.Module, weight_format: WeightFormat) -> None:
        self.module, self.format = module, weight_format
        self.native = module.__dict__.get(place_of_forward(module))  # some packages keep theirs in the instance

    def __call__(self, x: Tensor | None = None, *, input: Tensor | None = None) -> Tensor:
        """``x (..., in)`` to ``(..., out)``; given by position or by either name that forwards have for it."""
        x = input if x is None else x
        if x is None:
            raise TypeError(f"a {type(self.module).__name__} was called without its input")
        bias: Tensor | None = getattr(self.module, "bias", None)
        trains = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
        if trains and not torch.compiler.is_compiling():
            return _Product.apply(x, bias, self)
        return self.product(x, bias)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The product itself."""
        return F.linear(x, self.weight(x.dtype), None if bias is None else bias.to(x.dtype))

    def weight(self, dtype: torch.dtype) -> Tensor:
        """``(out, in)``."""
        return self.format.dequantize(self.module).to(dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, exact: ExactForward) -> Tensor:  # type: ignore[override]
        ctx.exact, ctx.dtype = exact, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return exact.product(x, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        needs_x, needs_bias, _ = ctx.needs_input_grad
        to_x = (grad @ ctx.exact.weight(grad.dtype)).to(ctx.dtype) if needs_x else None
        to_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype) if needs_bias else None
        return to_x, to_bias, None


def choose_kernel(module: nn.Module, asked: str) -> tuple[str, str]:
    """``"native"`` or ``"exact"`` for a layer, and a note for the plan where the choice needs one.

    Args:
        module: the layer.
        asked: ``"auto"``, ``"native"`` or ``"exact"``.

    Raises:
        FormatError: ``"native"``, and the layer has no forward of its own.
    """
    weight_format = format_of(module)
    if weight_format is None or weight_format.lossless:
        return "native", ""
    fault = weight_format.native_fault(module)
    if asked == "auto":
        return ("native", "") if fault is None else ("exact", f"multiplies exactly, by its dequantized weight: {fault}")
    if asked == "native" and not weight_format.runs(module):
        raise FormatError(f"kernel='native' is not possible for this {type(module).__name__}: {fault}; use 'auto'")
    warning = f"keeps its own forward, as asked, although {fault}" if asked == "native" and fault else ""
    return asked, warning


def is_exact(module: nn.Module) -> bool:
    """Whether a layer multiplies by its dequantized weight."""
    forward = module.__dict__.get(place_of_forward(module))
    return isinstance(getattr(forward, "beneath", forward), ExactForward)  # or something of ours stands over it


def use_exact(module: nn.Module) -> None:
    """Let a layer multiply exactly from now on."""
    weight_format = format_of(module)
    if weight_format is None:
        raise FormatError(f"no known format reads this {type(module).__name__}, so it cannot multiply exactly")
    if not is_exact(module):
        module.__dict__[place_of_forward(module)] = ExactForward(module, weight_format)


def use_native(module: nn.Module) -> None:
    """Give a layer its own forward back, unless that cannot be relied on here."""
    place = place_of_forward(module)
    exact = module.__dict__.get(place)
    if isinstance(exact, ExactForward) and exact.format.native_fault(module) is None:
        del module.__dict__[place]
        if exact.native is not None or place == FORWARD:  # which accelerate calls by this name
            module.__dict__[place] = exact.native or type(module).forward.__get__(module)
