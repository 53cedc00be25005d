"""A block's columns, rounded by one launch of the kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from oftfx.grids.grid import Grid
from oftfx.grids.levels import Float4, Integers, Table
from oftfx.grids.shifted import Shifted
from oftfx.grids.triton.kernels import columns_kernel
from oftfx.kernels.launch import on_device_of

HEIGHT, WARPS = 16, 1
"""Rows of a program. With 64 columns a thread has 32 weights; by one warp, nobody waits for another one."""

OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": False}


def rounded(grid: Grid, rest: Tensor, upper: Tensor, scales: Tensor, zeros: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes of a block's columns, one after another, and the errors that are left to those after the block.

    Args:
        grid: one of which `oftfx.grids.triton.choose.possible` holds.
        rest: float32 ``(columns, rows)``, each column contiguous; not changed.
        upper: ``(columns, columns)``, upper triangular; any strides.
        scales: ``(columns, rows)``.
        zeros: the same, or None.

    Returns:
        Codes ``(columns, rows)`` in the dtype of the grid's levels, and float32 errors of that shape.
    """
    count, rows = rest.shape
    errors = rest.new_empty(rest.shape)
    levels = grid.levels
    codes = torch.empty_like(errors, dtype=torch.int16 if isinstance(levels, Integers) else torch.uint8)
    limits, names, values = _table(levels, rest.device)
    low, high = (levels.low, levels.high) if isinstance(levels, Integers) else (0, 0)
    scales = scales.contiguous()
    with on_device_of(rest):
        columns_kernel[(-(-rows // HEIGHT),)](
            rest, upper, scales, scales if zeros is None else zeros.contiguous(), limits, names, values,
            codes, errors, rows, count, rest.stride(0), *upper.stride(),
            0.0 if isinstance(grid.zero, str) else float(grid.zero), float(low), float(high), limits.numel(),
            **constants(grid, count, zeros is not None), **OPTIONS,
        )  # fmt: skip
    return codes, errors


def constants(grid: Grid, columns: int, own: bool) -> dict[str, Any]:
    """What the kernel is compiled for; ``own``: whether each group has a zero of its own."""
    return {
        "zero": ("shift" if isinstance(grid, Shifted) else "each") if own else "constant" if grid.zero else "none",
        "table": isinstance(grid.levels, Table),
        "signed": isinstance(grid.levels, Float4),
        "product": str(grid.product).removeprefix("torch."),
        "rounded": str(grid.rounded).removeprefix("torch."),
        "width": max(16, 1 << (columns - 1).bit_length()),
        "height": HEIGHT,
    }


def _table(levels: Any, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Limits, names and values."""
    if not isinstance(levels, Table):
        none = torch.empty(0, device=device)
        return none, none, none
    limits, names = levels.searched()
    return limits.to(device), names.to(device), levels.values.to(device)
