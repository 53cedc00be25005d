"""optimum-quanto: ``QLinear`` with frozen weights of 8, 4 or 2 bits.

Storage: the layer is an ``nn.Linear`` whose weight is a tensor subclass. ``WeightQBytesTensor``: ``_data`` int8 or
float8 ``(out, in)``, ``_scale`` one a row, ``W = _scale * _data``. ``WeightQBitsTensor``: ``_data`` unsigned codes
``(groups, group size)``, or ``(out, in)`` without groups, packed so that a byte holds codes of rows that are far
apart; ``_scale`` and ``_shift`` one a group, ``W = _scale * _data - _shift``, or ``_scale * (_data - _shift)`` where
shifts are integers. Products and differences are rounded to the dtype of the scales.

Forward and gradients are right, and it changes nothing. For some kernels (bfloat16 in groups of 128: TinyGemm, also on
a CPU) the package lays codes out anew and rounds shifts; its own files never hold that.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.errors import FormatError, MissingExtraError
from oftfx.formats.base import Geometry, WeightState
from oftfx.formats.by_name import class_named
from oftfx.formats.dense import kind_of
from oftfx.formats.scalar import ScalarFormat
from oftfx.grids import Codes, Float8, Grid, Integers, Partition
from oftfx.grids.shifted import Shifted

_BYTES, _BITS = "WeightQBytesTensor", "WeightQBitsTensor"
_BACK = {_BYTES: "weight_qbytes_tensor", _BITS: "weight_qbits_tensor"}
"""What turns the layout of a kernel into that of the package's files, by the class that it is derived from."""


class Quanto(ScalarFormat):
    """``QLinear``, recognised by the class of the layer; whether it is frozen, by the weight's."""

    name = "quanto"

    def matches(self, module: nn.Module) -> bool:
        """Layers of the package that have a weight; also those that `refuses` then names."""
        return class_named(module, "optimum.quanto", "QModuleMixin") is not None and kind_of(module) is not None

    def refuses(self, module: nn.Module) -> str | None:
        """Convolutions, layers that are not frozen or round activations, and weights on an axis of their own."""
        layer: Any = module
        if kind_of(module) != "linear":
            return f"a {type(module).__name__} of optimum-quanto; its linear layers can be rotated"
        if layer.activation_qtype is not None:
            return "optimum-quanto rounds its activations as well, which this version of oftfx does not read"
        if _class(layer.weight) is None:
            return "optimum-quanto has not frozen its weight, and rounds it anew in every forward; call freeze() first"
        axis = layer.weight.axis
        return None if axis in (0, None) else f"its weight is quantized along axis {axis}; known: 0"

    def geometry(self, module: nn.Module) -> Geometry:
        """From the weight, which has the logical shape."""
        weight: Any = module._parameters["weight"]
        return Geometry(
            kind_of(module) or "", weight[:1].numel() if weight.dim() != 2 else weight.shape[1], len(weight)
        )

    def dtype(self, module: nn.Module) -> torch.dtype:
        """Of the scales, as which the weight shows."""
        return module._parameters["weight"].dtype  # type: ignore[union-attr]

    def grid(self, module: nn.Module) -> Grid:
        """Rows of signed integers or float8, or groups of unsigned integers with a shift."""
        weight = self._weight(module)
        shape, kept = tuple(weight.shape), weight.dtype
        options: dict[str, Any] = {
            "product": kept,
            "rounded": kept,
            "round_scale": lambda scale: scale.to(kept).float(),
            "least_scale": 2.0**-24 if kept == torch.float16 else 1e-8,
        }
        if _class(weight) == _BYTES:
            tile = shape if weight._scale.numel() == 1 else (1, shape[1])
            levels = Float8(weight._data.dtype) if weight._data.dtype != torch.int8 else Integers(-128, 127, 127.0)
            return Grid(Partition.tiles(shape, tile), levels, **options)
        tile = shape if weight._scale.numel() == 1 else (1, weight._group_size or shape[1])
        top = 2**weight.qtype.bits - 1
        kind, zero = (Shifted, "float") if weight._shift.is_floating_point() else (Grid, "integer")
        return kind(Partition.tiles(shape, tile), Integers(0, top, top / 2), zero, **options)  # type: ignore[arg-type]

    def codes(self, module: nn.Module) -> Codes:
        """Unpacked."""
        weight = self._weight(module)
        scale = weight._scale.detach().float().reshape(-1)
        if _class(weight) == _BYTES:
            data = weight._data.detach()
            return Codes(data.to(torch.int16) if data.dtype == torch.int8 else data.view(torch.uint8).clone(), scale)
        data = unpacked(weight._data._data, weight.qtype.bits, weight._data.shape[0])
        return Codes(data.reshape(weight.shape), scale, weight._shift.detach().float().reshape(-1))

    def pack(self, coded: Codes, like: nn.Module) -> WeightState:
        """A new tensor of the package's class, in the layout of its files."""
        old = self._weight(like)
        scale = coded.scale.reshape(old._scale.shape).to(old._scale.dtype)
        place = old.size(), old.stride()
        if _class(old) == _BYTES:
            stored = old._data.dtype
            data = coded.codes.to(stored) if stored == torch.int8 else coded.codes.contiguous().view(stored)
            new = type(old)(old.qtype, old.axis, *place, data, scale, old.activation_qtype)
        else:
            held, shift = old._data, coded.zero.reshape(old._shift.shape).to(old._shift.dtype)  # type: ignore[union-attr]
            raw = packed(coded.codes.reshape(held.shape).to(torch.uint8), old.qtype.bits)
            data = type(held)(raw, old.qtype.bits, held.size(), held.stride())
            new = type(old)(old.qtype, old.axis, old._group_size, *place, data, scale, shift)
        return {"weight": nn.Parameter(new, requires_grad=False)}

    def read(self, module: nn.Module) -> WeightState:
        """The weight."""
        return {"weight": module._parameters["weight"]}

    def write(self, module: nn.Module, state: WeightState) -> None:
        """Replace it."""
        module._parameters["weight"] = state["weight"]

    def nbytes(self, module: nn.Module) -> int:
        """Codes as packed, scales and shifts."""
        if self.refuses(module):
            whole: Any = module._parameters["weight"]
            return whole.numel() * whole.element_size()
        weight = self._weight(module)
        data = weight._data if _class(weight) == _BYTES else weight._data._data
        tensors = (data, weight._scale, getattr(weight, "_shift", None))
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def own(self, module: nn.Module) -> None:
        """A weight of its own over the same tensors, so that freezing or moving the copy leaves the original alone."""
        weight: Any = module._parameters["weight"]
        if _class(weight) is not None:
            module._parameters["weight"] = nn.Parameter(weight.detach(), requires_grad=False)

    def prepare(self, module: nn.Module) -> str | None:
        """Take a weight out of a kernel's layout, in which shifts have been rounded."""
        held: Any = module._parameters["weight"]
        standard = self._weight(module)
        if type(held) is type(standard):
            return None
        module._parameters["weight"] = nn.Parameter(standard, requires_grad=False)
        return f"its weight was laid out for a kernel ({type(held).__name__}); it has the layout of the package's files"

    def make_tiny(self, in_features: int, out_features: int, *, bias: bool = True) -> nn.Module:
        """Four bits, in groups where the package makes some: rows of more than 128."""
        return make_quanto(nn.Linear(in_features, out_features, bias=bias), "qint4")

    def _weight(self, module: nn.Module) -> Any:
        """The weight in the layout of the package's files."""
        if reason := self.refuses(module):
            raise FormatError(f"a {type(module).__name__} cannot be read: {reason}")
        weight: Any = module._parameters["weight"]
        plain = _class(weight)
        return weight if type(weight).__name__ == plain else getattr(weight.detach(), _BACK[plain or ""])()


def make_quanto(linear: nn.Linear, weights: str, *, zeropoint: bool = False) -> nn.Module:
    """A frozen ``QLinear`` with the weights of a float Linear; ``linear`` is not changed.

    Args:
        linear: weight ``(out, in)``.
        weights: ``"qint8"``, ``"qint4"``, ``"qint2"``, ``"qfloat8"``, ...
        zeropoint: integer shifts, for those of 4 and 2 bits.
    """
    try:
        from optimum.quanto import MaxOptimizer, QLinear, qtypes
        from optimum.quanto.tensor import quantize_weight
    except ImportError as error:
        raise MissingExtraError("optimum.quanto", "quanto", "Making a quanto layer") from error
    layer = QLinear.from_module(linear, weights=qtypes[weights])
    layer.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
    if zeropoint:
        options = {"axis": 0, "group_size": layer.weight_group_size}
        weight, kind = linear.weight.detach(), qtypes[weights]
        scale, shift = MaxOptimizer()(weight, qtype=kind, zeropoint=True, **options)
        layer.weight = nn.Parameter(quantize_weight(weight, kind, scale=scale, shift=shift, **options))
    else:
        with torch.no_grad():
            layer.freeze()
    return layer.requires_grad_(False)


def unpacked(raw: Tensor, bits: int, rows: int) -> Tensor:
    """Codes of bytes whose lowest bits are the first rows, the next bits those that follow, and so on.

    Args:
        raw: uint8 ``(ceil(rows * bits / 8), n)``.
        bits: 2 or 4.
        rows: of what is packed.

    Returns:
        uint8 ``(rows, n)``.
    """
    return torch.cat([(raw >> shift) & (2**bits - 1) for shift in range(0, 8, bits)])[:rows]


def packed(codes: Tensor, bits: int) -> Tensor:
    """Inverse of `unpacked`; bits of rows that there are not are 0."""
    per = 8 // bits
    padded = torch.nn.functional.pad(codes, (0, 0, 0, -len(codes) % per))
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device).view(-1, 1, 1)
    return (padded.unflatten(0, (per, -1)) << shifts).sum(0, dtype=torch.uint8)


def _class(weight: Any) -> str | None:
    """Which of the package's two classes a weight is one of, or is derived from."""
    names = [c.__name__ for c in type(weight).__mro__ if c.__module__.startswith("optimum.quanto.")]
    return next((n for n in names if n in _BACK), None)
