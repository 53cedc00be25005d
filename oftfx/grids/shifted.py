"""Grids that keep, instead of a zero point, what is subtracted after scaling."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from oftfx.errors import FormatError
from oftfx.grids.grid import Codes, Grid, shares_of
from oftfx.grids.levels import Integers


@dataclass(frozen=True, eq=False)
class Shifted(Grid):
    """``W = level(code) * scale - shift``: `Codes.zero` is the shift, in units of the weight, and ``zero`` is "float".

    The product and the difference are rounded to ``product`` each, as a runtime does that takes two steps.

    Examples:
        >>> import torch
        >>> from oftfx.formats import Integers, Partition
        >>> from oftfx.grids.shifted import Shifted
        >>> grid = Shifted(Partition.tiles((1, 4), (1, 4)), Integers(0, 3, 1.5), "float")
        >>> coded = grid.fit(torch.tensor([[-0.5, 0.0, 0.5, 1.0]]))
        >>> coded.scale.tolist(), coded.zero.tolist(), grid.values(coded).tolist()
        ([0.5], [0.5], [[-0.5, 0.0, 0.5, 1.0]])
    """

    def value(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Scaled, then shifted."""
        scaled = self.levels.decode(codes).to(self.product) * scale.to(self.product)
        return (scaled if zero is None else scaled - zero.to(self.product)).to(self.rounded).float()

    def scaled(self, values: Tensor, coded: Codes) -> Tensor:
        """What was there before the shift."""
        return values if coded.zero is None else values + self.partition.expand(coded.zero)

    def code(self, values: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Shifted back, then divided."""
        return self.levels.encode((values if zero is None else values + zero) / scale)

    def plain(self, coded: Codes) -> Codes:
        """The same codes with zeros in units of a code, as `Grid` has them."""
        return coded if coded.zero is None else replace(coded, zero=coded.zero / coded.scale)

    def _ranges(self, groups: Tensor, search: bool) -> Iterator[tuple[Tensor, Tensor | None]]:
        if not isinstance(self.levels, Integers):
            raise FormatError(f"a grid with shifts has integers as levels, this one {type(self.levels).__name__}")
        low, high, first = groups.amin(1), groups.amax(1), self.levels.low
        for share in shares_of(search):
            scale = self._scale((high - low) * (share / (self.levels.high - first)))
            yield scale, self.round_scale(first * scale - low * share)
