"""Plain float weights: ``nn.Linear`` and its subclasses."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from oftfx.formats import Geometry, WeightFormat, WeightState, register_format

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Dense(WeightFormat):
    """A float ``weight`` Parameter of shape ``(out, in)``. Float8 and tensor subclasses are other formats."""

    name = "dense"
    lossless = True

    def matches(self, module: nn.Module) -> bool:
        """A Linear whose weight is a plain float Parameter, not computed by a parametrization."""
        if isinstance(module, NonDynamicallyQuantizableLinear):
            return False  # nn.MultiheadAttention reads its weight and never calls it
        weight: Any = module._parameters.get("weight") if isinstance(module, nn.Linear) else None
        return type(weight) is nn.Parameter and type(weight.data) is Tensor and weight.dtype in FLOATS

    def geometry(self, module: nn.Module) -> Geometry:
        """From the weight itself: attributes of subclasses are not always kept up to date."""
        out_features, in_features = module.weight.shape
        return Geometry("linear", in_features, out_features)

    def dtype(self, module: nn.Module) -> torch.dtype:
        """The weight's own."""
        return module.weight.dtype

    def dequantize(self, module: nn.Module) -> Tensor:
        """The weight, widened."""
        weight = module.weight.detach()
        wide = torch.promote_types(weight.dtype, torch.float32)
        return weight.to(wide, copy=True)

    def requantize(self, weight: Tensor, like: nn.Module) -> WeightState:
        """Round once to the weight's dtype."""
        old = like.weight
        new = weight.to(dtype=old.dtype, device=old.device).contiguous()
        return {"weight": nn.Parameter(new, requires_grad=old.requires_grad)}

    def read(self, module: nn.Module) -> WeightState:
        """The Parameter."""
        return {"weight": module.weight}

    def write(self, module: nn.Module, state: WeightState) -> None:
        """Replace the Parameter object, so whoever shares the old one keeps it."""
        module._parameters["weight"] = state["weight"]

    def nbytes(self, module: nn.Module) -> int:
        """Elements times their size."""
        return module.weight.numel() * module.weight.element_size()

    def make_tiny(self, in_features: int, out_features: int, *, bias: bool = True) -> nn.Module:
        """A Linear."""
        return nn.Linear(in_features, out_features, bias=bias)


register_format(Dense())
