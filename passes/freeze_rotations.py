"""Replace trainable rotations by their blocks: fixed numbers, no Cayley transform left."""

from __future__ import annotations

import torch

from oftfx.errors import PassError
from oftfx.passes.protocol import Change, Pass, PassResult
from oftfx.placement import Placement, rotated_sites
from oftfx.program import Program
from oftfx.rotation.module import FrozenRotation, Rotation

FROZEN = "frozen"
"""Name under which a frozen rotation stays at its site, ``<site>.oft.frozen``."""


class FreezeRotations(Pass):
    """At each site, the active rotations become buffers; rotations that do not act are removed.

    Used for what is exported with its rotation, and for quantized sites whose weight a fold keeps bit for bit. Several
    adapters in a row become one product where their blocks have the same size, else a chain.
    """

    name = "freeze_rotations"
    preserves = "rounding"
    after = ("insert_rotations",)

    def run(self, program: Program) -> PassResult:
        """Freeze every site, in the model of ``program`` itself."""
        freezer = Freezer()
        changes = []
        for fqn, placement in list(rotated_sites(program.model)):
            changes.append(Change(fqn, "frozen" if placement.in_effect() else "rotation removed: inactive"))
            freezer.freeze(placement)
        return PassResult(program, bool(changes), tuple(changes))

    def check(self, result: Program) -> None:
        """No trainable rotation is left."""
        if left := [n for n, m in result.model.named_modules() if isinstance(m, Rotation)]:
            raise PassError(f"{left[0]} is still trainable")


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
    result: list[torch.Tensor] = []
    for rotation in rotations:
        blocks = blocks_of(rotation)
        if result and result[-1].shape == blocks.shape:
            result[-1] = torch.bmm(result[-1], blocks.to(result[-1].dtype))
        else:
            result.append(blocks)
    return result
