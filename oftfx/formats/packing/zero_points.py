"""Integers less a zero point, times a scale, by groups of columns: what GPTQ and AWQ store, however they pack it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from oftfx.grids import Codes, Grid, Integers, Partition
from oftfx.precision import piece_on


class Stored(NamedTuple):
    """A weight ``W[n, k] = (codes[n, k] - zeros[g(k), n]) * scales[g(k), n]``, unpacked.

    Attributes:
        codes: int16 ``(out, in)``.
        zeros: int16 ``(groups of a row, out)``.
        scales: ``(groups of a row, out)``, in the dtype in which the runtime multiplies.
    """

    codes: Tensor
    zeros: Tensor
    scales: Tensor

    def rows(self, groups: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The weight, some rows at a time and in order, float32; all at once for a compiler.

        Args:
            groups: the group of each column, int64 ``(in,)``.
        """
        count, columns = self.codes.shape
        step = count if torch.compiler.is_compiling() else max(1, piece_on(groups.device) // columns)
        for start in range(0, count, step):
            rows = slice(start, start + step)
            levels = self.codes[rows] - self.zeros.T[rows].index_select(1, groups)
            scales = self.scales.T[rows].index_select(1, groups)
            yield rows, (levels.to(scales.dtype) * scales).float()

    def is_symmetric(self, bits: int) -> bool:
        """Whether all zeros are in the middle; a quantizer that chose them one by one would not have hit that."""
        return bool((self.zeros == 2 ** (bits - 1)).all())

    def coded(self, *, symmetric: bool) -> Codes:
        """As `Grid` counts groups: row by row."""
        zero = None if symmetric else self.zeros.T.reshape(-1).float()
        return Codes(self.codes, self.scales.T.reshape(-1).float(), zero)

    @classmethod
    def of(cls, coded: Codes, bits: int, dtype: torch.dtype) -> Stored:
        """Inverse of `coded`, scales in ``dtype``."""
        scales = coded.scale.view(len(coded.codes), -1).T.to(dtype).contiguous()
        if coded.zero is None:
            zeros = torch.full(scales.shape, 2 ** (bits - 1), dtype=torch.int16, device=scales.device)
        else:
            zeros = coded.zero.view(len(coded.codes), -1).T.to(torch.int16).contiguous()
        return cls(coded.codes, zeros, scales)


def grid_of(
    shape: tuple[int, int],
    size: int,
    bits: int,
    dtype: torch.dtype,
    *,
    symmetric: bool,
    order: Tensor | None = None,
    least_zero: int | None = None,
) -> Grid:
    """The grid of groups of ``size`` columns.

    Args:
        shape: ``(out, in)``.
        size: columns of a group; the last group of a row may be shorter.
        bits: of a code.
        dtype: of the scales, and of their product with the integers.
        symmetric: whether the zero is ``2**(bits - 1)`` for all.
        order: the columns in the order in which groups are cut.
        least_zero: the smallest zero of a group that is rounded anew.
    """
    top, range_of = 2**bits - 1, torch.finfo(dtype)
    return Grid(
        Partition.tiles(shape, (1, size), order),
        Integers(0, top, top / 2),
        float(2 ** (bits - 1)) if symmetric else "integer",
        product=dtype,
        round_scale=lambda scale: scale.clamp(max=range_of.max).to(dtype).float(),
        least_scale=max(1e-8, range_of.tiny * range_of.eps),  # no scale may become 0 in float16
        least_zero=least_zero,
    )
