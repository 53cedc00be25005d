"""Error-compensated rounding: each column's error is made up for by the columns that are still to be rounded."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from oftfx.grids.grid import Codes, Grid
from oftfx.grids.triton import choose

_BLOCK = 64  # columns whose corrections are applied to the rest in one product


@torch.no_grad()
def compensated(
    grid: Grid, weight: Tensor, moments: Tensor, *, damping: float = 0.01, old: Codes | None = None
) -> Codes:
    """Codes for ``weight`` that keep what the layer computes: small ``|X (Q - W)^T|`` where ``moments = X^T X``.

    The columns are rounded one after another, those with the largest inputs first as far as the groups allow it. The
    error of each is spread over the remaining ones by the inverse of the moments, and a group's scale is searched when
    its turn comes, for what its weights have become by then.

    Args:
        grid: the values that the format can store.
        weight: float ``(rows, columns)``.
        moments: second moments of the layer's inputs, ``(columns, columns)``, or any positive multiple of them.
        damping: share of the mean diagonal that is added to the diagonal.
        old: codes of the weight before, whose scales and zeros are tried as well.

    Returns:
        Codes on the grid; ``grid.values(...)`` is the rounded weight. On CUDA they may be found by a kernel of Triton's
        (`oftfx.grids.triton.choose`), and differ from torch's where a last bit decides one.

    Source: Frantar et al., GPTQ, arXiv 2210.17323.
    """
    weight = weight.float()
    moments = moments.to(weight)
    sets = _largest_first(grid.partition.column_sets(weight.device), moments.diagonal())
    order = torch.cat(sets)
    upper = inverse_factor(moments, damping, order)
    # What an error in a column costs once the later ones make up for it.
    importance = upper.diagonal().square().reciprocal()
    fixed: Codes | None = None
    if grid.couple is not None or len(sets) == 1:  # scales that tie all columns are chosen before any is rounded
        fixed = grid.fit(weight, search=True, importance=importance[torch.argsort(order)], old=old)
        scale, zero = fixed.scale, fixed.zero
    else:
        scale = weight.new_empty(grid.partition.groups)
        zero = None if grid.symmetric else torch.empty_like(scale)

    rest = weight.T[order]  # (columns, rows), in the order of rounding; what is still to be rounded changes
    codes = grid.levels.encode(rest[:0]).new_empty(weight.shape)
    start = 0
    for columns in sets:
        stop = start + len(columns)
        if fixed is None:
            part, at = grid.narrowed(len(columns)), grid.partition.groups_of(columns)
            known = None if old is None else _narrowed(old, columns, at, part)
            coded = part.fit(rest[start:stop].T.contiguous(), search=True, importance=importance[start:stop], old=known)
            scale[at] = part.partition.expand(coded.scale)
            if zero is not None and coded.zero is not None:
                zero[at] = part.partition.expand(coded.zero)
        for first in range(start, stop, _BLOCK):
            block = slice(first, min(first + _BLOCK, stop))
            at = grid.partition.groups_of(order[block]).T
            rounded = _rounded(grid, rest, block, upper, scale[at], None if zero is None else zero[at])
            codes[:, order[block]] = rounded.T
        start = stop
    return Codes(codes, scale, zero) if fixed is None else replace(fixed, codes=codes)


def _narrowed(old: Codes, columns: Tensor, at: Tensor, part: Grid) -> Codes:
    """Of some columns, whose elements are in the groups ``at``."""
    scale, zero = (None if t is None else part.partition.pick(t[at]) for t in (old.scale, old.zero))
    assert scale is not None
    return Codes(old.codes[:, columns], scale, zero)


def _rounded(grid: Grid, rest: Tensor, block: slice, upper: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """Codes of the block's columns, ``(columns, rows)`` like its scales; ``rest`` is changed for their errors."""
    operands = grid, rest[block], upper[block, block], scales, zeros
    if choose.rounds(grid, rest[block], zeros, _in_torch):
        from oftfx.grids.triton.columns import rounded as by_triton

        codes, errors = by_triton(*operands)
    else:
        codes, errors = _in_torch(*operands)
    rest[block.stop :].addmm_(upper[block, block.stop :].T, errors, alpha=-1)
    return codes


def _in_torch(grid: Grid, rest: Tensor, upper: Tensor, scales: Tensor, zeros: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes and errors of a block; see `oftfx.grids.triton.columns.rounded`, but that ``rest`` is changed."""
    codes, errors = [], torch.empty_like(rest)
    for j in range(len(rest)):
        zero = None if zeros is None else zeros[j]
        codes.append(grid.code(rest[j], scales[j], zero))
        errors[j] = (rest[j] - grid.value(codes[-1], scales[j], zero)) / upper[j, j]
        rest[j + 1 :].addr_(upper[j, j + 1 :], errors[j], alpha=-1)
    return torch.stack(codes), errors


def _largest_first(sets: list[Tensor], diagonal: Tensor) -> list[Tensor]:
    """Sets of columns, and the columns of each, by the size of their inputs; errors are better made up for later."""
    size = torch.stack([diagonal[s].mean() for s in sets])
    return [
        sets[i][torch.argsort(diagonal[sets[i]], descending=True)]
        for i in torch.argsort(size, descending=True).tolist()
    ]


def inverse_factor(moments: Tensor, damping: float, order: Tensor) -> Tensor:
    """Upper triangular ``U`` with ``U^T U = (moments[order][:, order] + damping)^-1``, in one new matrix."""
    mean = moments.diagonal().mean()
    if not mean > 0:  # the layer has only seen zeros: every rounding is as good
        return torch.eye(len(moments), device=moments.device)
    for factor in (1, 10, 100, 1000):  # few inputs or strongly dependent ones: more damping
        # By columns, as the solver wants it, so that each step takes the place of the one before.
        matrix = moments[order, order.unsqueeze(1)].mT
        matrix.diagonal().add_(damping * factor * mean)
        failed = torch.empty((), dtype=torch.int32, device=moments.device)
        torch.linalg.cholesky_ex(matrix, out=(matrix, failed))
        if not failed:
            torch.cholesky_inverse(matrix, out=matrix)
            torch.linalg.cholesky_ex(matrix, upper=True, out=(matrix, failed))
            if not failed:
                return matrix
    return torch.diag(1 / (moments.diagonal()[order] + damping * mean).sqrt())
