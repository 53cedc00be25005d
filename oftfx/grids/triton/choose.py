"""Whether a block's columns are rounded by Triton's kernel or by torch's operators.

By `OFTFX_TRITON`, as rotations (see `oftfx.rotation.triton.choose`). Where nothing was set, on CUDA, the first block of
a kind is an occasion to hold the kernel against torch's operators, on numbers of its own, and to time both; the answer
is kept for the process. Rounding carries on: where a last bit decides a code, all later columns of its row differ.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from oftfx.errors import OftfxError
from oftfx.grids.grid import Grid
from oftfx.grids.levels import Float4, Integers, Table
from oftfx.grids.shifted import Shifted
from oftfx.kernels.measure import is_faster
from oftfx.kernels.setting import THERE, on_cpu, setting, wanted

SETTING = setting()

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

WIDEST = 64
"""Columns of a block; more do not fit in registers."""

Loop = Callable[[Grid, Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]

_CPU = on_cpu(SETTING)
_THERE = THERE
_DECIDED: dict[tuple[Any, ...], bool] = {}
_LOCK = threading.Lock()


def rounds(grid: Grid, rest: Tensor, zeros: Tensor | None, in_torch: Loop) -> bool:
    """Whether Triton's kernel rounds this block ``rest (columns, rows)``."""
    if not (rest.is_cuda or (_CPU and rest.device.type == "cpu")) or not possible(grid, rest):
        return False
    if SETTING != "auto":
        return wanted(SETTING, _THERE)
    if torch.are_deterministic_algorithms_enabled():
        return False
    levels = grid.levels.values.numel() if isinstance(grid.levels, Table) else 0
    kind = type(grid), type(grid.levels), levels, zeros is not None, bool(grid.zero), grid.product, grid.rounded
    key = (rest.device, *kind, rest.shape[0], rest.shape[1].bit_length())
    with _LOCK:
        if key not in _DECIDED:
            _DECIDED[key] = _THERE and _holds(grid, rest, zeros is not None, in_torch)
        return _DECIDED[key]


def possible(grid: Grid, rest: Tensor) -> bool:
    """Whether the kernel knows such a grid: integers or a table, under the scales and zeros of `Grid` or `Shifted`."""
    known = type(grid) in (Grid, Shifted) and type(grid.levels) in (Integers, Table, Float4)
    narrow = grid.product in DTYPES and grid.rounded in DTYPES
    plain = type(rest) is Tensor and rest.dtype == torch.float32 and rest.stride(1) == 1
    return known and narrow and plain and 0 < rest.shape[0] <= WIDEST and rest.shape[1] > 0


def _holds(grid: Grid, rest: Tensor, own: bool, in_torch: Loop) -> bool:
    def by_triton(weight: Tensor) -> tuple[Tensor, Tensor]:
        from oftfx.grids.triton.columns import rounded

        return rounded(grid, *problem(grid, weight, own))

    def by_torch(weight: Tensor) -> tuple[Tensor, Tensor]:
        return in_torch(grid, *problem(grid, weight, own))

    return is_faster(rest.device, by_torch, by_triton, [(rest.shape, rest.dtype, False)], check)


def problem(grid: Grid, weight: Tensor, own: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Factor, scales and zeros for a weight ``(columns, rows)``, with which codes of the whole range occur."""
    levels = grid.levels
    low, high = (levels.low, levels.high) if isinstance(levels, Integers) else (-levels.reach, levels.reach)
    scale = (2 * weight.abs().amax(0) / (high - low)).expand_as(weight).contiguous()
    zero = torch.full_like(scale, (low + high) // 2) if own else None
    count = torch.arange(len(weight), device=weight.device, dtype=weight.dtype)
    upper = torch.triu(0.3 * torch.sin(count.unsqueeze(1) * 7 + count * 3), 1) + torch.diag(1 + 0.5 * torch.cos(count))
    if zero is not None and isinstance(grid, Shifted):
        zero = zero * scale
    return weight.clone(), upper, scale, zero


def check(first: Callable[..., Any], second: Callable[..., Any], operands: Sequence[Tensor]) -> None:
    """Hold the second way of rounding against the first.

    Raises:
        OftfxError: in more than one of a hundred rows (and more than one row) a code differs, or errors do elsewhere.
    """
    (codes, errors), (others, found) = first(*operands), second(*operands)
    differs = (codes != others).any(0)
    rows = int(differs.sum())
    if codes.dtype != others.dtype or rows > max(1, len(differs) // 100):
        raise OftfxError(f"its result is wrong here: codes of {rows} of {len(differs)} rows are others than torch's")
    missed, size = ((e[:, ~differs]).abs().amax() for e in (found - errors, errors))
    if not missed <= 1e-4 * size:
        raise OftfxError(f"its result is wrong here: errors are off by {float(missed / size):.1e}")
