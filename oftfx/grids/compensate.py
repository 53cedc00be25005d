"""Error-compensated rounding: each column's error is made up for by the columns that are still to be rounded."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from oftfx.grids.grid import Codes, Grid

_BLOCK = 64  # columns whose corrections are applied to the rest in one product


@torch.no_grad()
def compensated(grid: Grid, weight: Tensor, moments: Tensor, *, damping: float = 0.01) -> Codes:
    """Codes for ``weight`` that keep what the layer computes: small ``|X (Q - W)^T|`` where ``moments = X^T X``.

    The columns are rounded one after another, those with the largest inputs first as far as the groups allow it. The
    error of each is spread over the remaining ones by the inverse of the moments, and a group's scale is searched when
    its turn comes, for what its weights have become by then.

    Args:
        grid: the values that the format can store.
        weight: float ``(rows, columns)``.
        moments: second moments of the layer's inputs, ``(columns, columns)``, or any positive multiple of them.
        damping: share of the mean diagonal that is added to the diagonal.

    Returns:
        Codes on the grid; ``grid.values(...)`` is the rounded weight.

    Source: Frantar et al., GPTQ, arXiv 2210.17323.
    """
    weight, moments = weight.float(), moments.float()
    sets = _largest_first(grid.partition.column_sets(), moments.diagonal())
    order = torch.cat(sets)
    back = torch.argsort(order)
    upper = inverse_factor(moments[order][:, order], damping)
    # What an error in a column costs once the later ones make up for it.
    importance = upper.diagonal().square().reciprocal()
    fixed: Codes | None = None
    if grid.couple is not None or len(sets) == 1:  # scales that tie all columns are chosen before any is rounded
        fixed = grid.fit(weight, search=True, importance=importance[back])

    rest = weight.T[order]  # (columns, rows), in the order of rounding; what is still to be rounded changes
    scales, zeros = torch.empty_like(rest), None if grid.symmetric else torch.empty_like(rest)
    if fixed is not None:
        scales = grid.partition.expand(fixed.scale).T[order]
        zeros = None if fixed.zero is None else grid.partition.expand(fixed.zero).T[order]
    codes = []
    start = 0
    for columns in sets:
        stop = start + len(columns)
        if fixed is None:
            part = grid.narrowed(len(columns))
            coded = part.fit(rest[start:stop].T.contiguous(), search=True, importance=importance[start:stop])
            scales[start:stop] = part.partition.expand(coded.scale).T
            if zeros is not None and coded.zero is not None:
                zeros[start:stop] = part.partition.expand(coded.zero).T
        for first in range(start, stop, _BLOCK):
            block = slice(first, min(first + _BLOCK, stop))
            codes.append(_rounded(grid, rest, block, upper, scales, zeros))
        start = stop
    ordered = torch.cat(codes)[back].T.contiguous()
    if fixed is not None:
        return replace(fixed, codes=ordered)
    pick = grid.partition.pick
    return Codes(ordered, pick(scales[back].T), None if zeros is None else pick(zeros[back].T))


def _rounded(grid: Grid, rest: Tensor, block: slice, upper: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """Codes ``(columns of the block, rows)``; ``rest`` is changed to make up for their errors."""
    codes, errors = [], torch.empty_like(rest[block])
    for j in range(block.start, block.stop):
        zero = None if zeros is None else zeros[j]
        codes.append(grid.code(rest[j], scales[j], zero))
        error = (rest[j] - grid.value(codes[-1], scales[j], zero)) / upper[j, j]
        rest[j + 1 : block.stop].addr_(upper[j, j + 1 : block.stop], error, alpha=-1)
        errors[j - block.start] = error
    rest[block.stop :].addmm_(upper[block, block.stop :].T, errors, alpha=-1)
    return torch.stack(codes)


def _largest_first(sets: list[Tensor], diagonal: Tensor) -> list[Tensor]:
    """Sets of columns, and the columns of each, by the size of their inputs; errors are better made up for later."""
    size = torch.stack([diagonal[s].mean() for s in sets])
    return [sets[i][torch.argsort(diagonal[sets[i]], descending=True)] for i in torch.argsort(size, descending=True)]


def inverse_factor(moments: Tensor, damping: float) -> Tensor:
    """Upper triangular ``U`` with ``U^T U = (moments + damping)^-1``."""
    diagonal = moments.diagonal()
    mean = diagonal.mean()
    if not mean > 0:  # the layer has only seen zeros: every rounding is as good
        return torch.eye(len(moments), device=moments.device)
    for factor in (1, 10, 100, 1000):  # few inputs or strongly dependent ones: more damping
        damped = moments + torch.diag_embed((damping * factor * mean).expand(len(moments)))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
    return torch.diag(1 / (diagonal + damping * mean).sqrt())
