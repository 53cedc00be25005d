"""What a quantized layer stores, apart from how it packs it: the form from which every operator is made."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.errors import ExportError
from oftfx.formats.scalar import ScalarFormat
from oftfx.grids import Codes, Float8, Grid, Integers, Levels, Partition
from oftfx.grids.shifted import Shifted
from oftfx.precision import relative_error

TOLERATED = 5e-4
"""Largest relative change of a weight by leaving out a rounding of its products: float16's, never bfloat16's."""


@dataclass(frozen=True, eq=False)
class Weight:
    """``W[:, columns] = round((level(codes) - zero) * scale)``, scale and zero by group.

    Attributes:
        codes: ``(out, in)``, int16 or uint8, columns in the order of the groups.
        scale: float32 ``(groups,)``.
        zero: ``(groups,)``, in units of a level, or the one number that all groups have.
        partition: the groups, columns from left to right.
        levels: what codes stand for.
        columns: the layer's column that each of these is, int64 ``(in,)``; None: the same (no act-order).
        rounded: dtype to which products are rounded; None where that changes nothing or they are rounded twice.
        deviation: relative error of the weight without that rounding.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | float
    partition: Partition
    levels: Levels
    columns: Tensor | None
    rounded: torch.dtype | None
    deviation: float

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        return self.partition.rows, self.partition.columns

    @property
    def bits(self) -> int:
        """Of a code, as few as hold all that the grid has."""
        if isinstance(self.levels, Float8):
            return 8
        if isinstance(self.levels, Integers):
            return (self.levels.high - self.levels.low).bit_length()
        return (len(self.levels.values) - 1).bit_length()  # type: ignore[attr-defined]

    @property
    def rounds_coarsely(self) -> bool:
        """Whether the rounding must be part of the graph."""
        return self.deviation > TOLERATED

    def unsigned(self, levels: Integers) -> tuple[Tensor, Tensor]:
        """Codes ``(out, in)`` from 0 and, counted from there, zeros ``(out, groups of a row)``; integers in tiles."""
        zero = self.zero if isinstance(self.zero, Tensor) else torch.full_like(self.scale, self.zero)
        return self.codes - levels.low, self.by_row(zero - levels.low)

    def by_row(self, values: Tensor) -> Tensor:
        """``(out, groups of a row)`` of one value a group; for tiles."""
        high, wide = self.partition.tile
        grid = values.view(-(-self.shape[0] // high), -(-self.shape[1] // wide))
        return grid.repeat_interleave(high, 0)[: self.shape[0]]


def weight_of(module: nn.Module, weight_format: ScalarFormat) -> Weight:
    """Read a prepared layer.

    Raises:
        ExportError: what is stored, multiplied, is not the weight of the layer; a fault of the format.
        FormatError: the format cannot read it.
    """
    return weight_from(weight_format.grid(module), weight_format.codes(module), weight_format.dequantize(module))


def weight_from(grid: Grid, coded: Codes, own: Tensor) -> Weight:
    """The same of what a format reads: grid, codes, and the weight that they are.

    Raises:
        ExportError: they are another one.
    """
    plain = replace(grid, product=torch.float32, rounded=torch.float32).values(coded)
    deviation = relative_error(plain, own) if own.any() else float((plain - own).abs().max())
    rounded = None
    if deviation:
        known = (torch.float16, torch.bfloat16)
        rounded = next((d for d in known if torch.equal(plain.to(d).float(), own)), None)
        if rounded is None and not deviation <= TOLERATED:
            raise ExportError(
                f"its codes and scales give a weight that is {deviation:.1e} from the layer's own, and no rounding to "
                "16 bits explains that"
            )
    partition, columns = grid.partition, grid.partition.order
    if isinstance(grid, Shifted):
        coded = grid.plain(coded)
    zero = coded.zero if coded.zero is not None else float(grid.zero)  # type: ignore[arg-type]
    return Weight(
        coded.codes if columns is None else coded.codes[:, columns],
        coded.scale,
        zero,
        replace(partition, order=None),
        grid.levels,
        columns,
        rounded,
        deviation,
    )


def are_codes(values: Tensor, bits: int) -> bool:
    """Whether all are integers from 0 that ``bits`` hold."""
    return bool((values == values.round()).all()) and float(values.min()) >= 0 and float(values.max()) < 2**bits


def narrowed(values: Tensor) -> Tensor:
    """Floats in the narrowest dtype that holds every one of them exactly: float16, bfloat16, or as they are."""
    found = (values.to(d) for d in (torch.float16, torch.bfloat16))
    return next((n for n in found if torch.equal(n.to(values.dtype), values)), values).contiguous()


def packed(codes: Tensor, bits: int, *, high_first: bool = False) -> Tensor:
    """Codes of ``bits`` (1, 2, 4 or 8), several a byte along the last axis, the first in the low bits.

    Args:
        codes: integers below ``2 ** bits``, ``(..., n)``; those that are missing in the last byte are 0.
        bits: of a code.
        high_first: the first in the high bits.

    Returns:
        uint8 ``(..., ceil(n * bits / 8))``.
    """
    per = 8 // bits
    filled = torch.nn.functional.pad(codes.to(torch.uint8), (0, -codes.shape[-1] % per)).unflatten(-1, (-1, per))
    result = torch.zeros_like(filled[..., 0])
    for place in range(per):
        result |= filled[..., place] << bits * (per - 1 - place if high_first else place)
    return result
