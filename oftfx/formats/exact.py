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
        fast: whether the package's own kernel may run where the input of a call is on an accelerator: if nothing is
            wrong with it there, as in any such layer; if only its gradients are, forward, with the exact backward.
        anywhere: whether it may run on a CPU as well: nothing was wrong with it where the layer was when this was
            decided, and something is on other devices, to which it may be moved.
    """

    anywhere = False  # of those that were pickled before there was such a thing

    def __init__(
        self, module: nn.Module, weight_format: WeightFormat, *, fast: bool = False, anywhere: bool = False
    ) -> None:
        self.module, self.format, self.fast, self.anywhere = module, weight_format, fast, anywhere
        self.native = module.__dict__.get(place_of_forward(module))  # some packages keep theirs in the instance

    def __call__(self, x: Tensor | None = None, *, input: Tensor | None = None) -> Tensor:
        """``x (..., in)`` to ``(..., out)``; given by position or by either name that forwards have for it."""
        x = input if x is None else x
        if x is None:
            raise TypeError(f"a {type(self.module).__name__} was called without its input")
        bias: Tensor | None = getattr(self.module, "bias", None)
        asks = self.fast and (self.anywhere or accelerates(x.device))
        own, fault = self.own_forward(x) if asks else (None, None)
        if own is not None and fault is None:
            result: Tensor = own(x)
            return result
        trains = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
        if trains and not torch.compiler.is_compiling():
            return _Product.apply(x, bias, self, own or self.product)
        return self.product(x, bias) if own is None else own(x)

    def own_forward(self, x: Tensor) -> tuple[Any, str | None]:  # noqa: ARG002
        """What the layer would run without us where it is right here, and what is wrong with its gradients."""
        fault = self.format.native_fault(self.module)
        if not self.format.runs(self.module) or (fault is not None and not self.format.forward_is_right(self.module)):
            return None, fault
        native = getattr(self, "native", None) or type(self.module).forward.__get__(self.module)
        return lambda x, bias=None: native(x), fault  # noqa: ARG005

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The product itself."""
        return F.linear(x, self.weight(x.dtype), None if bias is None else bias.to(x.dtype))

    def weight(self, dtype: torch.dtype) -> Tensor:
        """``(out, in)``."""
        return self.format.dequantize(self.module).to(dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, exact: ExactForward, product: Any) -> Tensor:  # type: ignore[override]
        ctx.exact, ctx.dtype = exact, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        result: Tensor = product(x, bias)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # type: ignore[override]
        needs_x, needs_bias, *_ = ctx.needs_input_grad
        to_x = (grad @ ctx.exact.weight(grad.dtype)).to(ctx.dtype) if needs_x else None
        to_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype) if needs_bias else None
        return to_x, to_bias, None, None


def accelerates(device: torch.device) -> bool:
    """Whether packages bring kernels of their own for a device."""
    return device.type not in ("cpu", "meta")


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
        if fault is None:
            return "native", ""
        if weight_format.forward_is_right(module):
            return "exact", f"runs its own kernel forward and multiplies exactly backward: {fault}"
        return "exact", f"multiplies exactly, by its dequantized weight: {fault}"
    if asked == "native" and not weight_format.runs(module):
        raise FormatError(f"kernel='native' is not possible for this {type(module).__name__}: {fault}; use 'auto'")
    warning = f"keeps its own forward, as asked, although {fault}" if asked == "native" and fault else ""
    return asked, warning


def use_kernel(module: nn.Module, chosen: str, asked: str = "auto") -> None:
    """Let a layer multiply as `choose_kernel` has said, and as it would say where the layer is moved to."""
    if chosen == "exact":
        use_exact(module, fast=asked == "auto")
    elif asked == "auto" and (found := format_of(module)) is not None and found.fault_depends_on_device(module):
        use_exact(module, fast=True, anywhere=True)


def is_exact(module: nn.Module) -> bool:
    """Whether a layer multiplies by its dequantized weight, if only where its own forward cannot be relied on."""
    forward = module.__dict__.get(place_of_forward(module))
    return isinstance(getattr(forward, "beneath", forward), ExactForward)  # or something of ours stands over it


def is_fast(module: nn.Module) -> bool:
    """Whether a layer that multiplies exactly may run its own kernel on an accelerator."""
    forward = module.__dict__.get(place_of_forward(module))
    return bool(getattr(getattr(forward, "beneath", forward), "fast", False))


def is_own_anywhere(module: nn.Module) -> bool:
    """Whether it may on a CPU as well."""
    forward = module.__dict__.get(place_of_forward(module))
    return bool(getattr(getattr(forward, "beneath", forward), "anywhere", False))


def use_exact(module: nn.Module, *, fast: bool = False, anywhere: bool = False) -> None:
    """Let a layer multiply exactly from now on; ``fast``, ``anywhere``: but for what `ExactForward` leaves to it."""
    weight_format = format_of(module)
    if weight_format is None:
        raise FormatError(f"no known format reads this {type(module).__name__}, so it cannot multiply exactly")
    if is_exact(module):
        forward = module.__dict__[place_of_forward(module)]
        exact = getattr(forward, "beneath", forward)
        exact.fast, exact.anywhere = exact.fast and fast, exact.anywhere and anywhere
    else:
        forward = ExactForward(module, weight_format, fast=fast, anywhere=anywhere)
        module.__dict__[place_of_forward(module)] = forward


def use_native(module: nn.Module) -> None:
    """Give a layer its own forward back, unless that cannot be relied on here."""
    place = place_of_forward(module)
    exact = module.__dict__.get(place)
    if isinstance(exact, ExactForward) and exact.format.native_fault(module) is None:
        del module.__dict__[place]
        if exact.native is not None or place == FORWARD:  # which accelerate calls by this name
            module.__dict__[place] = exact.native or type(module).forward.__get__(module)
