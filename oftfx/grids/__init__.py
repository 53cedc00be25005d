"""Grids that weights are rounded to: which elements share a scale, which levels there are, and how to round."""

from oftfx.grids.compensate import compensated
from oftfx.grids.grid import Codes, Grid
from oftfx.grids.levels import Float4, Float8, Integers, Levels, Table
from oftfx.grids.partition import Partition, joined

__all__ = ["Codes", "Float4", "Float8", "Grid", "Integers", "Levels", "Partition", "Table", "compensated", "joined"]
