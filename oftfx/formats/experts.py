"""Quantized experts, a parameter of three axes, seen one by one: each a matrix on a grid of its own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.formats.base import Geometry, WeightFormat, WeightState
from oftfx.formats.layout import Layout
from oftfx.formats.scalar import ScalarFormat
from oftfx.grids import Codes, Grid, Integers, Partition


class Apart(NamedTuple):
    """Experts one by one.

    Attributes:
        grid: of each one's matrix ``(out, in)``.
        codes: of every expert, on it.
    """

    grid: Grid
    codes: list[Codes]


class ExpertsFormat(WeightFormat):
    """A `WeightFormat` of a parameter that holds experts, each of which can be rounded for what it alone reads."""

    @abstractmethod
    def apart(self, module: nn.Module) -> Apart | None:
        """The experts one by one; None where some scale is of more than one, or not of a grid of ``(out, in)``."""

    @abstractmethod
    def together(self, coded: Sequence[Codes], like: nn.Module) -> WeightState:
        """All experts with these codes, in the way ``like`` stores its own.

        Where scales are quantized together as well, they are so now: their values may move by a rounding.
        """

    def each(self, matrix: Tensor, module: nn.Module) -> Tensor:
        """``(experts, out, in)`` of the matrix that a rotation turns."""
        geometry, layout = self.geometry(module), self.layout(module)
        if layout.each:
            return matrix.unflatten(1, (geometry.experts, -1)).transpose(0, 1)
        return matrix.unflatten(0, (geometry.experts, -1))


class ExpertLayer(nn.Module):
    """One expert as a layer of its own, for code that rounds layers.

    Args:
        grid: of its matrix.
        coded: what is stored.
    """

    def __init__(self, grid: Grid, coded: Codes) -> None:
        super().__init__()
        self.grid, self.coded = grid, coded


class OneExpert(ScalarFormat):
    """The format of an `ExpertLayer`: its codes are not packed. Not registered; no model has one."""

    name = "expert"

    def matches(self, module: nn.Module) -> bool:
        """Nothing else."""
        return isinstance(module, ExpertLayer)

    def grid(self, module: nn.Module) -> Grid:
        """As given."""
        return module.grid  # type: ignore[return-value]

    def codes(self, module: nn.Module) -> Codes:
        """As given."""
        return module.coded  # type: ignore[return-value]

    def pack(self, coded: Codes, like: nn.Module) -> WeightState:  # noqa: ARG002
        """They are kept as they are."""
        return {"coded": coded}

    def read(self, module: nn.Module) -> WeightState:
        """The codes."""
        return {"coded": module.coded}

    def write(self, module: nn.Module, state: WeightState) -> None:
        """Replace them."""
        module.coded = state["coded"]

    def geometry(self, module: nn.Module) -> Geometry:
        """Of the grid."""
        partition = self.grid(module).partition
        return Geometry("linear", partition.columns, partition.rows)

    def layout(self, module: nn.Module) -> Layout:  # noqa: ARG002
        """A matrix."""
        return Layout()

    def dtype(self, module: nn.Module) -> torch.dtype:
        """Of its values."""
        return self.grid(module).rounded

    def nbytes(self, module: nn.Module) -> int:
        """Of the codes, unpacked."""
        return self.codes(module).codes.nbytes

    def make_tiny(self, in_features: int, out_features: int, *, bias: bool = True) -> nn.Module:  # noqa: ARG002
        """On 4-bit integers, a scale for each row."""
        grid = Grid(Partition.tiles((out_features, in_features), (1, in_features)), Integers(-7, 7, reach=7))
        return ExpertLayer(grid, grid.fit(torch.randn(out_features, in_features)))
