"""Formats that store each element of a weight as a code on a grid of scales: rounding is the same for all of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.formats.base import WeightFormat, WeightState
from oftfx.grids import Codes, Grid, compensated, joined


class ScalarFormat(WeightFormat):
    """A `WeightFormat` by three functions: the layer's grid, its codes, and how codes are packed.

    Examples:
        >>> from oftfx.formats import ScalarFormat, format_named
        >>> bnb8 = format_named("bnb8")
        >>> layer = bnb8.make_tiny(66, 10)
        >>> isinstance(bnb8, ScalarFormat), tuple(bnb8.codes(layer).codes.shape), bnb8.grid(layer).partition.groups
        (True, (10, 66), 10)
    """

    @abstractmethod
    def grid(self, module: nn.Module) -> Grid:
        """The values that the layer can store; tensors in it on the device of the weight."""

    @abstractmethod
    def codes(self, module: nn.Module) -> Codes:
        """What is stored, whatever the packing; never a view of it."""

    @abstractmethod
    def pack(self, coded: Codes, like: nn.Module) -> WeightState:
        """Codes on the grid of ``like`` in the way it stores its own; ``like`` is not changed."""

    def dequantize(self, module: nn.Module) -> Tensor:
        """``(level(code) - zero) * scale``, multiplied in the dtype in which the format's runtime does."""
        geometry = self.geometry(module)
        return joined(self.rows(module), (geometry.out_features, geometry.in_features))

    def rows(self, module: nn.Module) -> Iterator[tuple[slice, Tensor]]:
        """Rows that share no scale with others, or all."""
        yield from self.grid(module).rows(self.codes(module))

    @torch.no_grad()
    def nearest(self, weight: Tensor, like: nn.Module) -> Codes:
        """Nearest codes of ``weight (out, in)``; groups whose weights have not changed keep theirs."""
        return self.grid(like).nearest(weight.float(), self.codes(like))

    def requantize(self, weight: Tensor, like: nn.Module) -> WeightState:
        """`nearest`, packed."""
        return self.pack(self.nearest(weight, like), like)

    @torch.no_grad()
    def calibrate(self, weight: Tensor, like: nn.Module, moments: Tensor) -> WeightState:
        """Error-compensated rounding with new scales or the stored ones; see `oftfx.grids.compensated`.

        A small update is nearer to the grid that it came from than to most others; quantizers choose scales in other
        ways than the search here would, and levels that are not even about zero (-8 to 7) find none of theirs again.
        """
        return self.pack(compensated(self.grid(like), weight, moments, old=self.codes(like)), like)
