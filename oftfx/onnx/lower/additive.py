"""AQLM: sums of codebook entries by ``Gather`` and ``ReduceSum``, times a scale a row."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.errors import ExportError
from oftfx.grids.codebooks import Additive
from oftfx.onnx.lower.stand_in import biased, multiplied
from oftfx.onnx.lower.weight import TOLERATED, narrowed
from oftfx.onnx.markers import marked
from oftfx.precision import relative_error


class AdditiveCodebooks(nn.Module):
    """``W[tile] = scale * sum_c codebooks[c, codes[..., c]]``, in operators of any opset; only for export.

    Summed and multiplied in float32; where the layer does that in float16, the weight is rounded once.
    """

    opset = 18
    codes: Tensor
    codebooks: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, sums: Additive) -> None:
        super().__init__()
        rows, columns, count = sums.codes.shape
        size, *self.tile = sums.codebooks.shape[1:]
        self.grid, self.dtype = (rows, columns), sums.dtype
        self.out_features, self.in_features = rows * self.tile[0], columns * self.tile[1]
        wide = torch.uint8 if size <= 256 else torch.uint16 if size <= 65536 else torch.int32
        self.register_buffer("codes", sums.codes.to(wide))
        self.register_buffer("codebooks", narrowed(sums.codebooks.reshape(count * size, -1)))
        self.register_buffer("scales", narrowed(sums.scales))
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """``x (..., in)`` to ``(..., out)``."""
        return biased(multiplied(x, self.weight().to(self.dtype).to(x.dtype)), self.bias)

    def weight(self) -> Tensor:
        """``(out, in)``."""
        count = self.codes.shape[2]
        first = self.size * torch.arange(count, dtype=torch.int32)
        places = (marked(self.codes).to(torch.int32) + first).flatten()
        entries = torch.index_select(marked(self.codebooks).to(torch.float32), 0, places)
        sums = entries.reshape(*self.grid, count, -1).sum(2) * marked(self.scales).to(torch.float32).reshape(-1, 1, 1)
        tiles = sums.reshape(*self.grid, *self.tile)
        if self.tile[0] > 1:
            tiles = tiles.transpose(1, 2)
        return tiles.reshape(self.out_features, self.in_features)


def sums_deviation(sums: Additive) -> float:
    """How far one rounding at the end is from the layer's own, which also rounds sums.

    Raises:
        ExportError: too far: in bfloat16.
    """
    once = replace(sums, dtype=torch.float32).weight().to(sums.dtype).float()
    deviation = relative_error(once, sums.weight())
    if not deviation <= TOLERATED:
        raise ExportError(f"its sums are rounded to {sums.dtype}, which changes the weight by {deviation:.1e}")
    return deviation
