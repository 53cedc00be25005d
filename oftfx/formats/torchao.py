"""torchao: ``nn.Linear`` with an ``Int8Tensor``, ``IntxUnpackedToInt8Tensor`` or ``Float8Tensor`` as weight.

Storage: ``qdata`` int8 or float8 ``(out, in)``, one element a code however few bits it has; ``scale`` and, for
integers, ``zero_point``, one for each tile of the weight: ``(out / tile rows, in / tile columns)``. A tile is a part of
a row (per group), a row, a block or the whole weight. ``W = (qdata - zero_point) * scale``, rounded to the weight's
dtype.

The layer's forward and gradients are right, and it changes nothing; but where it rounds activations as well
(``Int8DynamicActivation...``, ``Float8DynamicActivation...``), no gradient passes, silently.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.errors import FormatError, MissingExtraError
from oftfx.formats.base import Geometry, WeightState
from oftfx.formats.dense import kind_of
from oftfx.formats.scalar import ScalarFormat
from oftfx.grids import Codes, Float8, Grid, Integers, Levels, Partition

_SUBCLASSES = ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor")


class TorchAO(ScalarFormat):
    """A Linear with one of these weights, recognised by the weight's class name."""

    name = "torchao"

    def matches(self, module: nn.Module) -> bool:
        """By the weight: the layer's class stays ``nn.Linear``."""
        kind: type = type(module._parameters.get("weight"))
        named = kind.__name__ in _SUBCLASSES and kind.__module__.startswith("torchao.")
        return named and kind_of(module) == "linear"

    def geometry(self, module: nn.Module) -> Geometry:
        """From the weight, which has the logical shape."""
        out_features, in_features = _weight(module).shape
        return Geometry("linear", in_features, out_features)

    def dtype(self, module: nn.Module) -> torch.dtype:
        """The dtype the weight had, as which it still shows."""
        return _weight(module).dtype

    def grid(self, module: nn.Module) -> Grid:
        """Tiles of integers or float8."""
        weight = _weight(module)
        if getattr(weight, "act_pre_scale", None) is not None:
            raise FormatError(
                f"Linear{tuple(weight.shape)[::-1]}: its torchao weight expects inputs that are scaled first "
                "(act_pre_scale), which this version of oftfx does not fold; exclude it by a rule, or do not fold"
            )
        shape, kept = tuple(weight.shape), weight.scale.dtype
        down, across = _counts(weight)
        return Grid(
            Partition.tiles(shape, (shape[0] // down, shape[1] // across)),
            _levels(weight),
            "integer" if _zeros(weight) is not None else 0.0,
            rounded=weight.dtype,
            round_scale=lambda scale: scale.to(kept).float(),
        )

    def codes(self, module: nn.Module) -> Codes:
        """Integers as int16, float8 as its bytes."""
        weight = _weight(module)
        raw = weight.qdata
        codes = raw.to(torch.int16) if raw.dtype == torch.int8 else raw.view(torch.uint8).clone()
        return Codes(codes, weight.scale.float().reshape(-1), _zeros(weight))

    def pack(self, coded: Codes, like: nn.Module) -> WeightState:
        """A weight of the same class and settings."""
        old = _weight(like)
        names, settings = old.__tensor_flatten__()
        tensors = {name: getattr(old, name) for name in names}
        raw = old.qdata.dtype
        tensors["qdata"] = coded.codes.to(raw) if raw == torch.int8 else coded.codes.view(raw)
        tensors["scale"] = coded.scale.reshape(old.scale.shape).to(old.scale.dtype)
        if coded.zero is not None:
            tensors["zero_point"] = coded.zero.reshape(old.zero_point.shape).to(old.zero_point.dtype)
        new = type(old).__tensor_unflatten__(tensors, settings, old.shape, old.stride())
        return {"weight": nn.Parameter(new, requires_grad=old.requires_grad)}

    def native_fault(self, module: nn.Module) -> str | None:
        """Where activations are rounded as well: gradients are lost."""
        if _rounds_activations(_weight(module)):
            return "torchao rounds this layer's inputs in a way that no gradient passes"
        return None

    def read(self, module: nn.Module) -> WeightState:
        """The weight."""
        return {"weight": module._parameters["weight"]}

    def write(self, module: nn.Module, state: WeightState) -> None:
        """Replace it."""
        module._parameters["weight"] = state["weight"]

    def nbytes(self, module: nn.Module) -> int:
        """Codes, scales and zeros, as they are: four bits take a byte here."""
        weight = _weight(module)
        tensors = (getattr(weight, name, None) for name in ("qdata", "scale", "zero_point"))
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def own(self, module: nn.Module) -> None:
        """A weight of its own over the same tensors, so that freezing or moving the copy leaves the original alone."""
        weight = _weight(module)
        module._parameters["weight"] = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)

    def make_tiny(self, in_features: int, out_features: int, *, bias: bool = True) -> nn.Module:
        """Four bits in groups of 32."""
        try:
            from torchao.quantization import IntxWeightOnlyConfig, PerGroup
        except ImportError as error:
            raise _missing() from error
        config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
        return make_torchao(nn.Linear(in_features, out_features, bias=bias), config)


def make_torchao(linear: nn.Linear, config: Any) -> nn.Module:
    """A copy of a float Linear, quantized by torchao; ``linear`` is not changed.

    Args:
        linear: weight ``(out, in)``.
        config: what ``torchao.quantization.quantize_`` takes, e.g. ``Int8WeightOnlyConfig()``.
    """
    try:
        from torchao.quantization import quantize_
    except ImportError as error:
        raise _missing() from error
    model = nn.Sequential(copy.deepcopy(linear).requires_grad_(False))
    quantize_(model, config)
    return model[0]


def _missing() -> MissingExtraError:
    return MissingExtraError("torchao", "torchao", "Making a torchao layer")


def _weight(module: nn.Module) -> Any:
    return module._parameters["weight"]


def _counts(weight: Any) -> tuple[int, int]:
    """Tiles from top to bottom and from left to right."""
    down, across = weight.scale.shape if weight.scale.dim() == 2 else (1, 1)
    if weight.scale.numel() != down * across or weight.shape[0] % down or weight.shape[1] % across:
        raise FormatError(
            f"a torchao weight {tuple(weight.shape)} has scales {tuple(weight.scale.shape)}, which do not divide it"
        )
    return down, across


def _levels(weight: Any) -> Levels:
    raw = weight.qdata.dtype
    if raw != torch.int8:
        return Float8(raw)
    target = getattr(weight, "target_dtype", torch.int8)
    bits = int(str(target).removeprefix("torch.int"))  # torch.int4 has no iinfo
    half = 2 ** (bits - 1) // (2 if getattr(weight, "reduce_range", False) else 1)
    return Integers(-half, half - 1, half - 0.5)


def _zeros(weight: Any) -> Tensor | None:
    """Zero points ``(tiles,)``, float32; None where all are 0, which is how symmetric weights are stored."""
    zero: Tensor | None = getattr(weight, "zero_point", None)
    if zero is None or not bool(zero.any()):
        return None
    if zero.is_floating_point():
        raise FormatError(
            f"a torchao weight {tuple(weight.shape)} has float zero points, which this version of oftfx does not read; "
            "quantize it with zero points of int8"
        )
    return zero.float().reshape(-1)


def _rounds_activations(weight: Any) -> bool:
    settings = (getattr(weight, name, None) for name in ("act_quant_kwargs", "activation_quantization"))
    return any(s is not None for s in settings)
