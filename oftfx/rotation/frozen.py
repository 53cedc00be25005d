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
        self._cached: tuple[Any, Tensor] | None = None
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
        blocks = self.blocks
        return rotate(x, blocks if blocks.dtype == x.dtype else self._in(x.dtype))

    def _in(self, dtype: torch.dtype) -> Tensor:
        """The blocks in the dtype of activations, kept: casting them costs as much as the product for one token."""
        state = self.state()
        if state is None:
            return self.blocks.to(dtype)
        key, cached = (*state, dtype), self._cached
        if cached is None or cached[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                cached = (key, self.blocks.to(dtype))
            if type(cached[1]) is Tensor:  # neither fake nor functional
                self._cached = cached
        return cached[1]

    def _apply(self, fn: Any, recurse: bool = True) -> FrozenRotation:
        self._cached = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": None}

    def extra_repr(self) -> str:
        return f"blocks={self.blocks.shape[0]}, block_size={self.blocks.shape[1]}"
