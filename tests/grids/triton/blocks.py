"""Grids of every kind that the kernel knows, and blocks of weights for them."""

from dataclasses import replace

import torch

from oftfx.grids import Grid, Integers, Partition, Table
from oftfx.grids.levels import Float4
from oftfx.grids.shifted import Shifted

NF4 = torch.tensor([-1.0, -0.7, -0.52, -0.39, -0.28, -0.18, -0.09, 0.0, 0.08, 0.16, 0.25, 0.34, 0.44, 0.56, 0.72, 1.0])
HALF, BRAIN = torch.float16, torch.bfloat16
PARTITION = Partition.tiles((37, 64), (1, 32))

GRIDS = {
    "integers": Grid(PARTITION, Integers(-8, 7, 7.0)),
    "int8 in float16": Grid(PARTITION, Integers(-128, 127, 127.0), product=HALF),
    "one zero": Grid(PARTITION, Integers(0, 15, 8.0), 8.0, rounded=BRAIN),
    "integer zeros": Grid(PARTITION, Integers(0, 15), "integer", product=HALF),
    "float zeros": Grid(PARTITION, Integers(0, 255), "float", product=BRAIN),
    "nf4": Grid(PARTITION, Table(NF4)),
    "unsorted table": Grid(PARTITION, Table(NF4[torch.randperm(16, generator=torch.Generator().manual_seed(2))])),
    "fp4": Grid(PARTITION, Float4(), product=BRAIN, rounded=HALF),
    "shifts": Shifted(PARTITION, Integers(0, 15, 7.5), "float"),
    "shifts in bfloat16": Shifted(PARTITION, Integers(0, 15, 7.5), "float", product=BRAIN, rounded=BRAIN),
}


def block(grid, columns, rows, groups=(0,), seed=0):
    """What is left of a weight, a factor, scales and zeros, ``(columns, rows)`` each; a group begins at each column."""
    numbers = torch.Generator().manual_seed(seed)
    rest = torch.randn(columns, rows, generator=numbers) * 0.05
    inputs = torch.randn(4 * columns, columns, generator=numbers).double()
    inputs[:, 1:] += 0.7 * inputs[:, :1]
    moments = inputs.T @ inputs
    upper = torch.linalg.cholesky(torch.linalg.inv(moments), upper=True).float() * columns
    span = 15 if not isinstance(grid.levels, Integers) else grid.levels.high - grid.levels.low
    top = 2 * grid.levels.reach if isinstance(grid.levels, Table) else span
    member = (torch.arange(columns).unsqueeze(1) >= torch.tensor(groups)).sum(1) - 1
    scale = (0.2 + 0.1 * torch.rand(len(groups), rows, generator=numbers)) / top
    zero = span / 2 + torch.randn(scale.shape, generator=numbers)
    zero = zero.round() if grid.zero == "integer" else zero
    zero = zero * scale if isinstance(grid, Shifted) else zero
    return rest, upper, scale[member], None if grid.symmetric else zero[member]


def moved(grid, device):
    """The grid with its table on another device."""
    if isinstance(grid.levels, Float4):
        return replace(grid, levels=Float4(device))
    return replace(grid, levels=Table(grid.levels.values.to(device))) if isinstance(grid.levels, Table) else grid
