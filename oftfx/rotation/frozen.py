"""The module that holds a rotation whose blocks are fixed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.rotation.caching import keeping, steps
from oftfx.rotation.kept import Source, forget_kept, may_be_kept, source_of
from oftfx.rotation.operators import in_graph, rotate_in_graph
from oftfx.rotation.rotate import rotate


class FrozenRotation(nn.Module):
    """A rotation whose blocks are fixed: what stays in front of a quantized weight, and what is exported.

    Attributes:
        blocks: buffer ``(blocks, b, b)``.
    """

    blocks: Tensor
    recipe_text = ""

    def __init__(self, blocks: Tensor) -> None:
        super().__init__()
        self._source: Source | None = None
        self.register_buffer("blocks", blocks)

    @property
    def shape(self) -> tuple[int, int]:
        """``(blocks, b)``."""
        return self.blocks.shape[0], self.blocks.shape[1]

    @property
    def tensor(self) -> Tensor:
        """What the blocks are made from: themselves."""
        return self.blocks

    @property
    def device(self) -> torch.device:
        """Where the blocks are."""
        return self.blocks.device

    def stamp(self) -> tuple[Any, ...]:
        """What tells this rotation from another, and from itself after a change."""
        return self.source(self.blocks).stamp(self.blocks)

    def source(self, blocks: Tensor) -> Source:
        """What is known of the tensor that stands here now."""
        source = self._source  # read once: another thread may replace it
        if source is None or source.tensor() is not blocks:
            source = self._source = source_of(blocks)
        return source

    def effective(self) -> Tensor:
        """Blocks ``(blocks, b, b)``."""
        return self.blocks

    def state(self) -> tuple[Any, ...] | None:
        """What the blocks depend on; see `Rotation.state`."""
        return self.source(self.blocks).state(self.blocks) if keeping() and may_be_kept(self.blocks) else None

    def is_in_graph(self, *xs: Tensor) -> bool:
        """See `Rotation.is_in_graph`."""
        return in_graph(self.blocks, *xs)

    def forward(self, x: Tensor) -> Tensor:
        """Rotate ``x (..., n)``; shape and dtype are kept."""
        blocks = self.blocks
        # Casting blocks costs as much as the product for one token.
        if blocks.dtype != x.dtype:
            if self.is_in_graph(x):
                return rotate_in_graph(x, blocks, self.recipe_text)
            state = self.state()
            if state is not None:
                kept = self.source(blocks).kept((), (self.recipe_text,), x.dtype)
                blocks = kept.read((blocks,), (state, steps()))
        return rotate(x, blocks)

    def _apply(self, fn: Any, recurse: bool = True) -> FrozenRotation:
        forget_kept(self.blocks)
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_source": None}

    def extra_repr(self) -> str:
        return f"blocks={self.blocks.shape[0]}, block_size={self.blocks.shape[1]}"
