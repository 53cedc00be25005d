"""Replace trainable rotations by their blocks: fixed numbers, no Cayley transform left."""

from __future__ import annotations

from oftfx.errors import PassError
from oftfx.passes.protocol import Change, Pass, PassResult
from oftfx.placement.find import rotated_sites
from oftfx.placement.frozen import Freezer
from oftfx.planning.program import Program
from oftfx.rotation.module import Rotation


class FreezeRotations(Pass):
    """At each site, the active rotations become buffers; rotations that do not act are removed.

    Used for what is exported with its rotation, and for quantized sites whose weight a fold keeps bit for bit. Several
    adapters in a row become one product where their blocks have the same size, else a chain.

    Examples:
        >>> import oftfx, torch
        >>> from oftfx.passes import FreezeRotations, Program
        >>> model = oftfx.transform(torch.nn.Sequential(torch.nn.Linear(6, 4)), {"*": oftfx.OFT(3)})
        >>> result = FreezeRotations().run(Program.of(model))
        >>> [(name, tuple(blocks.shape)) for name, blocks in model.named_buffers()]
        [('0.oft.frozen.blocks', (2, 3, 3))]
    """

    name = "freeze_rotations"
    preserves = "rounding"
    after = ("insert_rotations",)

    def run(self, program: Program) -> PassResult:
        """Freeze every site, in the model of ``program`` itself."""
        freezer = Freezer()
        changes = []
        for fqn, placement in list(rotated_sites(program.index)):
            changes.append(Change(fqn, "frozen" if placement.in_effect() else "rotation removed: inactive"))
            freezer.freeze(placement)
        return PassResult(program, bool(changes), tuple(changes))

    def check(self, result: Program) -> None:
        """No trainable rotation is left."""
        if left := [n for n, m in result.model.named_modules() if isinstance(m, Rotation)]:
            raise PassError(f"{left[0]} is still trainable")
