"""The module that holds a rotation whose blocks are fixed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.rotation.caching import caching
from oftfx.rotation.glimpse import Glimpse
from oftfx.rotation.identity import Identity
from oftfx.rotation.rotate import rotate


class FrozenRotation(nn.Module):
    """A rotation whose blocks are fixed: what stays in front of a quantized weight, and what is exported.

    Attributes:
        blocks: buffer ``(blocks, b, b)``.
    """

    blocks: Tensor

    def __init__(self, blocks: Tensor) -> None:
        super().__init__()
        self._identity = Identity()
        self._glimpse = Glimpse()
        self.register_buffer("blocks", blocks)

    @property
    def shape(self) -> tuple[int, int]:
        """``(blocks, b)``."""
        return self.blocks.shape[0], self.blocks.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the blocks are."""
        return self.blocks.device

    def stamp(self) -> tuple[Any, ...]:
        """What tells this rotation from another, and from itself after a change."""
        return self._identity.of(self.blocks), 0 if self.blocks.is_inference() else self.blocks._version

    def effective(self) -> Tensor:
        """Blocks ``(blocks, b, b)``."""
        return self.blocks

    def state(self) -> tuple[Any, ...] | None:
        """What the blocks depend on; see `Rotation.state`."""
        if not caching() or self.blocks.is_meta or self.blocks.is_inference():
            return None
        blocks = self.blocks
        return self._identity.of(blocks), blocks._version, blocks.data_ptr(), self._glimpse.of(blocks), blocks.device

    def forward(self, x: Tensor) -> Tensor:
        """Rotate ``x (..., n)``; shape and dtype are kept."""
        return rotate(x, self.blocks)

    def extra_repr(self) -> str:
        return f"blocks={self.blocks.shape[0]}, block_size={self.blocks.shape[1]}"
