"""Codes that stand still under scales that train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.errors import FoldError
from oftfx.formats.scalar import ScalarFormat
from oftfx.grids import Codes, Grid, Integers
from oftfx.placement.aware import Aware, Product
from oftfx.placement.base import Placement
from oftfx.rotation.module import whole

GAIN = 4.0
"""What one unit of `shift` does to the logarithm of a scale, so that a learning rate that is good for rotations is good
for scales. SmolLM2 in NF4, 2.5e-4 being good for rotations: 20 steps brought a calibrated fold from 97.2 % of the gain
to 98.0 % at 1e-3 in the logarithm of a scale, and to 95.9 % at 2.5e-3."""


class AwareScales(Aware):
    """``W_folded = (level(code) - zero) * scale * exp(4 * shift)``: codes of a calibrated fold, one ``shift`` a group.

    The rotations stand still, so the unfolded adapter stays what it was. Scales are rounded as the format stores them,
    second quantization included, in every forward; gradients go straight through that rounding.

    Args:
        placement: of the site.
        names: the adapters.
        coded: where to start.

    Attributes:
        shift: trainable, float32 ``(groups,)``; starts at 0.

    Source: quantization step sizes as parameters are those of Esser et al., LSQ, arXiv 1902.08153.
    """

    how = "calibrate"
    turns = False
    packed: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(self, placement: Placement, names: Sequence[str], coded: Codes) -> None:
        super().__init__(placement, names)
        grid = self._grid()
        self.shape = tuple(coded.codes.shape)
        self.register_buffer("packed", _packed(coded.codes, grid, placement.site))
        self.register_buffer("scale", coded.scale.detach().clone())
        self.register_buffer("zero", None if coded.zero is None else coded.zero.detach().clone())
        self.shift = nn.Parameter(torch.zeros_like(self.scale))

    @classmethod
    def restored(cls, placement: Placement, names: Sequence[str], tensors: Mapping[str, Tensor]) -> AwareScales:
        """Inverse of `tensors`, on the device of the layer.

        Raises:
            KeyError: one is missing.
            ValueError: a shape is not the layer's.
        """
        weight_format = placement.weight_format()
        if not isinstance(weight_format, ScalarFormat):
            raise ValueError("its format stores no code for each weight")
        now = weight_format.codes(placement.module)
        result = cls(placement, names, now)
        for name, wanted in result.tensors().items():
            found = tensors[name]
            if found.shape != wanted.shape or found.dtype != wanted.dtype:
                raise ValueError(f"{name} is {_said(found)}, expected {_said(wanted)}")
            with torch.no_grad():
                wanted.copy_(found)
        return result

    def tensors(self) -> dict[str, Tensor]:
        """What it takes to make it again: codes, scales, zeros where there are, and ``shift``."""
        found = {"packed": self.packed, "scale": self.scale, "zero": self.zero, "shift": self.shift.detach()}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def _grid(self) -> Grid:
        return self.format.grid(self.layer)

    @torch.no_grad()
    def coded(self, inputs: Sequence[Tensor] | None = None) -> Codes:
        """Under the scales as they are now."""
        grid = self._grid()
        (shift,) = self.inputs() if inputs is None else inputs
        scale, parts = grid.stored(self.scale * torch.exp(GAIN * shift))
        return Codes(_unpacked(self.packed, self.shape, grid), scale, self.zero, parts)

    def _fixed(self) -> Codes:
        """What does not train; no codes are unpacked."""
        return Codes(self.packed, self.scale, self.zero)

    def inputs(self) -> list[Tensor]:
        """``shift``."""
        return [whole(self.shift)]

    def gradients(self, product: Product, inputs: Sequence[Tensor]) -> list[Tensor]:
        """``dL/dshift = 4 * sum of dL/dW * S`` over the group, S being what of W is proportional to the scale."""
        grid = self._grid()
        return [GAIN * grid.partition.split(product.to_weight * grid.scaled(product.values, self._fixed())).sum(1)]

    def weight(self) -> Tensor:
        """A factor of 1 that knows how the scale moves it."""
        shift, grid, values = whole(self.shift), self._grid(), self.values()
        return values + GAIN * grid.partition.expand(shift - shift.detach()) * grid.scaled(values, self._fixed())


def _said(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"


def _packed(codes: Tensor, grid: Grid, site: str) -> Tensor:
    """Codes as bytes, two to a byte where they fit."""
    low, count = _range(grid)
    if count > 2**8:
        raise FoldError(f"{site}: {count} levels; fold-aware training knows formats of up to 256")
    flat = (codes.reshape(-1).to(torch.int32) - low).to(torch.uint8)
    if count > 2**4:
        return flat
    if flat.numel() % 2:
        flat = torch.nn.functional.pad(flat, (0, 1))
    return flat[::2] << 4 | flat[1::2]


def _unpacked(packed: Tensor, shape: tuple[int, ...], grid: Grid) -> Tensor:
    low, count = _range(grid)
    flat = packed if count > 2**4 else torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1)
    codes = flat[: shape[0] * shape[1]].view(shape)
    return codes.to(torch.int16) + low if isinstance(grid.levels, Integers) else codes


def _range(grid: Grid) -> tuple[int, int]:
    """The smallest code and how many there are."""
    levels = grid.levels
    if isinstance(levels, Integers):
        return levels.low, levels.high - levels.low + 1
    values = getattr(levels, "values", None)
    return 0, 2**8 if values is None else len(values)
