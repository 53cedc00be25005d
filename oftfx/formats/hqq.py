"""HQQ: half-quadratic quantization (``hqq.core.quantize.HQQLinear``), 8 to 1 bit.

Storage: ``W_q`` uint8 (int32 for 3 bits) with several codes an element, and ``meta`` with scale and zero, both floats:
``W = (q - zero) * scale``. Groups are runs of the flattened weight (axis 1) or the columns of ``weight.reshape(g, -1)``
(axis 0). Codes are packed by parts of the rows of that grouped matrix: the first half of its rows in the high bits (4
bits), quarters (2), eighths (1), ten rows in an int32 from bit 27 down (3).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.errors import FormatError, MissingExtraError
from oftfx.formats.base import Geometry, WeightState
from oftfx.formats.by_name import class_named
from oftfx.formats.scalar import ScalarFormat
from oftfx.grids import Codes, Grid, Integers, Partition

_PARTS = {"8bit_u8": (1, 8), "4bit_u8": (2, 4), "2bit_u8": (4, 2), "1bit_u8": (8, 1), "3bit_32": (10, 3)}
"""Packing to codes an element, and bits a code."""


class Hqq(ScalarFormat):
    """``HQQLinear``, recognised by class name and ``meta``."""

    name = "hqq"

    def matches(self, module: nn.Module) -> bool:
        """Quantized: it has codes and their meta."""
        named = class_named(module, "", "HQQLinear") is not None
        return named and getattr(module, "W_q", None) is not None and bool(getattr(module, "meta", None))

    def geometry(self, module: nn.Module) -> Geometry:
        """From meta, which keeps the logical shape."""
        out_features, in_features = module.meta["shape"]
        return Geometry("linear", in_features, out_features)

    def dtype(self, module: nn.Module) -> torch.dtype:
        """The dtype the layer computes in."""
        return module.compute_dtype

    def grid(self, module: nn.Module) -> Grid:
        """Float zeros; scales in the dtype they are kept in."""
        meta = _plain_meta(module)
        shape = tuple(meta["shape"])
        size = meta["group_size"] or (shape[1] if meta["axis"] == 1 else shape[0])
        cut = Partition.flat if meta["axis"] == 1 else Partition.strided
        kept = meta["scale"].dtype
        top = round(2 ** meta["nbits"]) - 1  # 1.58 bits are three levels
        return Grid(
            cut(shape, size),
            Integers(0, top),
            "float",
            product=kept if kept.itemsize >= 4 else module.compute_dtype,
            round_scale=lambda scale: scale.to(kept).float(),
        )

    def codes(self, module: nn.Module) -> Codes:
        """Unpacked and put into the weight's order."""
        meta = _plain_meta(module)
        rows = _unpacked(_packed(module, meta), meta["packing"], _grouped_shape(meta)[0])
        zero, scale = (meta[k].float().reshape(-1) for k in ("zero", "scale"))
        codes = rows.to(torch.int16).reshape(tuple(meta["shape"]))
        return Codes(codes, scale, zero)

    def pack(self, coded: Codes, like: nn.Module) -> WeightState:
        """In the packing of ``like``; its meta with new scales and zeros."""
        meta = dict(_plain_meta(like))
        old = _packed(like, meta)
        packed = _repacked(coded.codes.reshape(_grouped_shape(meta)), meta["packing"], old.dtype)
        zero = torch.zeros_like(coded.scale) if coded.zero is None else coded.zero
        for key, value in (("scale", coded.scale), ("zero", zero)):
            meta[key] = value.reshape(meta[key].shape).to(meta[key].dtype)
        if meta.get("view_as_float"):
            packed = packed.view(meta["compute_dtype"])
        return {"W_q": nn.Parameter(packed, requires_grad=False), "meta": meta}

    def read(self, module: nn.Module) -> WeightState:
        """Codes and meta."""
        return {"W_q": module.W_q, "meta": module.meta}

    def write(self, module: nn.Module, state: WeightState) -> None:
        """Replace both."""
        module._parameters["W_q"] = state["W_q"]
        module.meta = state["meta"]

    def nbytes(self, module: nn.Module) -> int:
        """Codes, scales and zeros."""
        tensors: list[Tensor] = [module.W_q.data, module.meta["scale"], module.meta["zero"]]
        return sum(t.numel() * t.element_size() for t in tensors)

    def own(self, module: nn.Module) -> None:
        """A meta of its own; nothing in it is written in place."""
        module.meta = dict(module.meta)

    def make_tiny(self, in_features: int, out_features: int, *, bias: bool = True) -> nn.Module:
        """Four bits, groups of 64 along the input (32 where 64 do not fit)."""
        return make_hqq(nn.Linear(in_features, out_features, bias=bias))


def make_hqq(
    linear: nn.Linear, *, nbits: float = 4, group_size: int | None = None, axis: int = 1, **kwargs: Any
) -> nn.Module:
    """Quantize a float Linear into an ``HQQLinear`` that computes in its dtype; ``linear`` is not changed.

    Args:
        linear: weight ``(out, in)``.
        nbits: 8, 6, 5, 4, 3, 2, 1.58 or 1.
        group_size: elements that share a scale; None: 64, or 32 where 64 do not divide the weight.
        axis: 1 for runs of a row, 0 across rows.
        **kwargs: further arguments of ``BaseQuantizeConfig``.
    """
    try:
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
    except ImportError as error:
        raise MissingExtraError("hqq", "hqq", "Making an HQQ layer") from error
    if group_size is None:
        group_size = 64 if linear.weight.numel() % 64 == 0 else 32
    config = BaseQuantizeConfig(nbits=nbits, group_size=group_size, axis=axis, **kwargs)
    source = copy.deepcopy(linear).requires_grad_(False)
    dtype, device = linear.weight.dtype, str(linear.weight.device)
    return HQQLinear(source, config, compute_dtype=dtype, device=device, del_orig=True)


def _plain_meta(module: nn.Module) -> dict[str, Any]:
    meta: Any = module.meta
    nested = [k for k in ("quant_scale", "quant_zero") if meta.get(k)]
    if nested or "scale" not in meta or "zero" not in meta:
        raise FormatError(
            f"HQQLinear{tuple(meta['shape'])}: its {' and '.join(nested) or 'scales'} are quantized as well, which "
            "this version of oftfx does not read; quantize with quant_zero=False and quant_scale=False"
        )
    return meta


def _packed(module: nn.Module, meta: dict[str, Any]) -> Tensor:
    data = module.W_q.data
    if meta.get("view_as_float"):
        data = data.view(torch.int32 if meta["packing"] == "3bit_32" else torch.uint8)
    return data


def _grouped_shape(meta: dict[str, Any]) -> tuple[int, int]:
    """Shape of the matrix whose rows are packed: groups are its rows (axis 1) or columns (axis 0)."""
    rows, columns = meta["shape"]
    size = meta["group_size"]
    if size is None:
        return rows, columns
    return (rows * columns // size, size) if meta["axis"] == 1 else (size, rows * columns // size)


def _unpacked(packed: Tensor, packing: str, rows: int) -> Tensor:
    """The grouped matrix of codes; the first part of its rows is in the highest bits."""
    parts, bits = _layout(packing)
    shifts = range(bits * (parts - 1), -1, -bits)
    mask = 2**bits - 1
    return torch.cat([(packed >> s) & mask for s in shifts])[:rows]


def _repacked(codes: Tensor, packing: str, dtype: torch.dtype) -> Tensor:
    parts, bits = _layout(packing)
    codes = codes.to(dtype)
    if missing := -len(codes) % parts:
        codes = torch.nn.functional.pad(codes, (0, 0, 0, missing))
    shifts = range(bits * (parts - 1), -1, -bits)
    packed = torch.zeros_like(codes[: len(codes) // parts])
    for part, shift in zip(codes.chunk(parts), shifts, strict=True):
        packed |= part << shift
    return packed


def _layout(packing: str) -> tuple[int, int]:
    if packing not in _PARTS:
        raise FormatError(f"an HQQ layer is packed as {packing!r}; known: {', '.join(_PARTS)}")
    return _PARTS[packing]
