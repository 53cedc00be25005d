"""How the columns of a block-diagonal product are cut into tiles, each a power of two wide."""

from __future__ import annotations

from dataclasses import dataclass

import torch

NARROWEST = 16
"""The least that a product of tiles takes on any side."""

WIDEST = {torch.float32: 32, torch.bfloat16: 64, torch.float16: 64}
"""A row of a tile is 128 bytes, what the memory of a GPU hands over at once; float32 is multiplied without tensor
cores, where the zeros around small blocks cost."""

HIGHEST = 64


@dataclass(frozen=True)
class Tiling:
    """Tiles of the last axis of ``(rows, blocks * size)``: each holds whole blocks, or a part of one.

    Attributes:
        width: columns of a tile, with those that are masked.
        per: whole blocks in a tile; 1 where a block has parts.
        parts: tiles of a block; 1 where a tile holds whole ones.
        groups: tiles, or blocks with ``parts`` tiles each, of the axis.
        height: rows of a tile, with those that are masked.
    """

    width: int
    per: int
    parts: int
    groups: int
    height: int

    @property
    def tiles(self) -> int:
        """Tiles of the axis."""
        return self.groups * self.parts

    @staticmethod
    def of(rows: int, blocks: int, size: int, dtype: torch.dtype) -> Tiling:
        """For an operand of ``(rows, blocks * size)``."""
        width = min(power(blocks * size), WIDEST[dtype])
        per = max(1, width // size)
        return Tiling(width, per, -(-size // width), -(-blocks // per), min(power(rows), HIGHEST))


def power(number: int) -> int:
    """The least power of two that is not smaller, nor than a tile may be."""
    return max(NARROWEST, 1 << (number - 1).bit_length())


def splits(rows: int, programs: int) -> int:
    """In how many runs the rows of a sum are added up, each by a program of its own.

    By shape alone, so that the order of a sum, and its last bit, is the same on every device and in every run.
    """
    return max(1, min(1024 // max(1, programs), rows // 512))
