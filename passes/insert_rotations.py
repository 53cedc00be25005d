"""Put a rotation in front of every planned site."""

from __future__ import annotations

import torch

from oftfx.errors import AdapterError, PassError
from oftfx.formats import format_named
from oftfx.hooks import attach, hold, rotate_input_of
from oftfx.passes.protocol import Change, Pass, PassResult
from oftfx.plans import SitePlan
from oftfx.program import Program, weight_device
from oftfx.rotation.module import Rotation, SharedRotation


class InsertRotations(Pass):
    """The node ``y = layer(x)`` becomes ``R = cayley(skew); y = layer(rotate(x, R))``.

    The rotation is a child of its site (``<site>.oft.<adapter>``), or of the first of the sites that share it, and
    acts in a forward pre-hook. The layer object, its class and the names of its parameters stay. With skew at zero the
    product is by exact ones and zeros, so the model computes bit for bit what it did.

    Args:
        adapter: name of the adapter that the rotations belong to.
        activate: let it act at once, alone.
    """

    name = "insert_rotations"
    preserves = "exact"
    after = ("match_rules", "share_inputs")

    def __init__(self, adapter: str = "default", *, activate: bool = True) -> None:
        self.adapter, self.activate = adapter, activate

    def run(self, program: Program) -> PassResult:
        """Make the rotations and attach them, in the model of ``program`` itself."""
        plan = program.plan
        assert plan is not None
        modules = dict(program.model.named_modules())
        for entry in plan:
            hook = rotate_input_of(modules[entry.fqn])
            if hook is not None and self.adapter in hook.rotations:
                raise AdapterError(f"{entry.fqn} already has a rotation of adapter {self.adapter!r}")
        owned: dict[str, Rotation] = {}
        changes = []
        for entry in plan:
            module = modules[entry.fqn]
            notice = format_named(entry.site.format).prepare(module)
            rotation = owned.get(entry.owner)
            if rotation is None:
                rotation = _make(entry, [e.fqn for e in plan if e.owner == entry.owner], weight_device(module))
                rotation.train(module.training)
                hold(module, self.adapter, rotation)
                owned[entry.owner] = rotation
            hook = attach(module, entry.fqn)
            hook.rotations[self.adapter] = rotation
            if self.activate:
                hook.active = (self.adapter,)
            changes.append(Change(entry.fqn, "rotated", notice or ""))
        return PassResult(program, bool(changes), tuple(changes))

    def check(self, result: Program) -> None:
        """Every planned site has the rotation."""
        assert result.plan is not None
        for entry in result.plan:
            hook = rotate_input_of(result.model.get_submodule(entry.fqn))
            if hook is None or self.adapter not in hook.rotations:
                raise PassError(f"{entry.fqn} has no rotation of adapter {self.adapter!r}")


def _make(entry: SitePlan, members: list[str], device: torch.device) -> Rotation:
    wide = torch.float64 if entry.site.dtype == "float64" else torch.float32
    if len(members) > 1:
        return SharedRotation(
            entry.site.in_features,
            entry.spec,
            where=entry.fqn,
            dtype=wide,
            device=device,
            members=tuple(members),
        )
    return Rotation(entry.site.in_features, entry.spec, where=entry.fqn, dtype=wide, device=device)
