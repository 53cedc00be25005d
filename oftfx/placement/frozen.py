"""Rotations as fixed numbers: their blocks, no Cayley transform left."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from oftfx.placement.base import Placement
from oftfx.rotation.autocast import without_autocast
from oftfx.rotation.frozen import FrozenRotation
from oftfx.rotation.ieee import ieee_products
from oftfx.rotation.module import Rotation

FROZEN = "frozen"
"""Name under which a frozen rotation stays at its site, ``<site>.oft.frozen``."""


class Freezer:
    """Freezes sites one by one; sites that shared a rotation share its frozen blocks."""

    def __init__(self) -> None:
        self._done: dict[tuple[int, ...], list[FrozenRotation]] = {}
        self._alive: list[object] = []

    def freeze(self, placement: Placement) -> None:
        """Freeze what acts at one site."""
        rotations = placement.in_effect()
        key = tuple(id(r) for r in rotations)
        first = key not in self._done
        if first:
            self._done[key] = [FrozenRotation(b) for b in product_of(rotations)]
            self._alive += rotations
        frozen = self._done[key]
        placement.settle(frozen)
        for index, rotation in enumerate(frozen if first else ()):
            placement.hold(FROZEN if len(frozen) == 1 else f"{FROZEN}_{index}", rotation)


@torch.no_grad()
def blocks_of(rotation: Rotation | FrozenRotation) -> torch.Tensor:
    """Blocks ``(blocks, b, b)`` of either kind of rotation; a tensor of its own, float32 or wider."""
    blocks = rotation.matrices() if isinstance(rotation, Rotation) else rotation.blocks
    return blocks.detach().clone(memory_format=torch.contiguous_format)


def product_of(rotations: list[Rotation | FrozenRotation]) -> list[torch.Tensor]:
    """Rotations in a row as few block tensors as possible: ``x R1 R2 = x (R1 R2)`` for blocks of one size."""
    return together([blocks_of(r) for r in rotations])


def together(chain: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The same for their blocks, whatever autocast says; differentiable."""
    result: list[torch.Tensor] = []
    for blocks in chain:
        if result and result[-1].shape == blocks.shape:
            with without_autocast(blocks.device), ieee_products():
                result[-1] = torch.bmm(result[-1], blocks.to(result[-1].dtype))
        else:
            result.append(blocks)
    return result
