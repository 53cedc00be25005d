"""bitsandbytes 8-bit: LLM.int8() (``bitsandbytes.nn.Linear8bitLt``).

Storage: int8 ``(out, in)`` and one float32 ``SCB`` a row, the row's largest magnitude: ``W = CB * SCB / 127``. Before
the first forward scales hang on the weight (``weight.SCB``), afterwards on the layer's ``state``; both are read.

The layer's forward in training mode multiplies with exactly these values. In eval mode it rounds the activations to
8 bits as well (0.7 % of the output), which is the method and is left alone.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.errors import FormatError, MissingExtraError
from oftfx.formats.base import Geometry, WeightState
from oftfx.formats.by_name import class_named
from oftfx.formats.scalar import ScalarFormat
from oftfx.grids import Codes, Grid, Integers, Partition

_TOP = 127.0


class Bnb8(ScalarFormat):
    """``Linear8bitLt`` and its subclasses, once quantized; recognised by class name and the int8 weight."""

    name = "bnb8"

    def matches(self, module: nn.Module) -> bool:
        """A Linear8bitLt whose weight is int8; one that was never moved to a device still holds floats."""
        named = class_named(module, "bitsandbytes", "Linear8bitLt") is not None
        return named and module._parameters["weight"].dtype == torch.int8  # type: ignore[union-attr]

    def geometry(self, module: nn.Module) -> Geometry:
        """From the weight."""
        out_features, in_features = _bytes(module).shape
        return Geometry("linear", in_features, out_features)

    def dtype(self, module: nn.Module) -> torch.dtype:
        """Of the bias, which the package leaves as it was; float16, which it rounds weights to, without one."""
        bias = module._parameters.get("bias")
        return torch.float16 if bias is None else bias.dtype

    def grid(self, module: nn.Module) -> Grid:
        """Rows of -127 to 127; 127 times a scale is stored."""
        shape = tuple(_bytes(module).shape)
        rows = Partition.tiles(shape, (1, shape[1]))
        return Grid(rows, Integers(-127, 127, _TOP), round_scale=lambda s: s * _TOP / _TOP)

    def codes(self, module: nn.Module) -> Codes:
        """The int8 themselves."""
        return Codes(_bytes(module).to(torch.int16), _rows(module).float() / _TOP)

    def pack(self, coded: Codes, like: nn.Module) -> WeightState:
        """An Int8Params with scales of its own."""
        old = _rows(like)
        scb = (coded.scale * _TOP).to(old.dtype)
        # Dividing by 127 and multiplying again may be off by a bit.
        for other in (old, *(torch.nextafter(scb, torch.full_like(scb, end)) for end in (math.inf, -math.inf))):
            scb = torch.where((scb.float() / _TOP != coded.scale) & (other.float() / _TOP == coded.scale), other, scb)
        scb = torch.where(coded.scale == old.float() / _TOP, old, scb)
        parameter = copy.copy(like.weight)
        parameter.data = coded.codes.to(torch.int8)
        parameter.CB, parameter.SCB = parameter.data, scb
        return {"weight": parameter, "state": _fresh(like.state)}

    def read(self, module: nn.Module) -> WeightState:
        """The Int8Params and the layer's matmul state."""
        return {"weight": module.weight, "state": module.state}

    def write(self, module: nn.Module, state: WeightState) -> None:
        """Replace both: the state's copy of the weight would win over the parameter's."""
        module._parameters["weight"] = state["weight"]
        module.state = state["state"]

    def nbytes(self, module: nn.Module) -> int:
        """Codes and scales."""
        return _bytes(module).numel() + _rows(module).numel() * _rows(module).element_size()

    def own(self, module: nn.Module) -> None:
        """A parameter and a matmul state of its own: the first forward moves the scales from one to the other."""
        parameter = copy.copy(module.weight)
        parameter.data = _bytes(module)
        parameter.CB, parameter.SCB = parameter.data, _rows(module)
        self.write(module, {"weight": parameter, "state": _fresh(module.state)})

    def make_tiny(self, in_features: int, out_features: int, *, bias: bool = True) -> nn.Module:
        """Quantized on the CPU."""
        return make_linear8bit(nn.Linear(in_features, out_features, bias=bias))


def make_linear8bit(linear: nn.Linear, *, threshold: float = 0.0) -> nn.Module:
    """Quantize a float Linear into a ``bitsandbytes.nn.Linear8bitLt``; ``linear`` is not changed.

    Args:
        linear: weight ``(out, in)``.
        threshold: activations beyond it are multiplied in 16 bits; 0 for none.
    """
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise MissingExtraError("bitsandbytes", "bnb", "Making an 8-bit layer") from error
    layer = bnb.nn.Linear8bitLt(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        has_fp16_weights=False,
        threshold=threshold,
    )
    layer.load_state_dict({k: v.detach().clone() for k, v in linear.state_dict().items()})
    return layer.to(linear.weight.device).requires_grad_(False)


def _bytes(module: nn.Module) -> Tensor:
    weight: Any = module.weight
    return weight.data


def _rows(module: nn.Module) -> Tensor:
    """Largest magnitude of each row."""
    for holder in (module.state, module.weight):
        scb = getattr(holder, "SCB", None)
        if scb is not None:
            return scb
    raise FormatError(
        f"{type(module).__name__}({module.in_features}, {module.out_features}) has int8 weights and no scales: they "
        "were lost when only its `weight` was copied. Load the layer's whole state_dict (weight, SCB, weight_format)"
    )


def _fresh(state: Any) -> Any:
    """The settings of a matmul state without what it caches of the weight."""
    result = copy.copy(state)
    result.reset_grads()
    return result
