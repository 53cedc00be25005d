"""Put a rotation at every planned site."""

from __future__ import annotations

import torch

from oftfx.errors import AdapterError, PassError
from oftfx.formats.exact import use_kernel
from oftfx.formats.registry import format_named
from oftfx.model.index import ModelIndex
from oftfx.model.site import Site
from oftfx.model.sites import weight_device
from oftfx.passes.protocol import Change, Pass, PassResult
from oftfx.placement.attach import attach
from oftfx.placement.base import Placement
from oftfx.placement.find import rotated_sites
from oftfx.placement.group import InputGroup
from oftfx.placement.input import RotateInput
from oftfx.planning.program import Program
from oftfx.planning.site_plan import SitePlan
from oftfx.rotation.module import Rotation


class InsertRotations(Pass):
    """The node ``y = layer(x)`` becomes ``R = cayley(skew); y = layer(rotate(x, R))``.

    The rotation is a child of its site (``<site>.oft.<adapter>``), or of the first of the sites that share it, and
    acts in a hook: on what the layer reads, on what an embedding gives out, or on the weight (see
    `oftfx.placement`). The layer object, its class and the names of its parameters stay. With skew at zero the product
    is by exact ones and zeros, so the model computes bit for bit what it did.

    Args:
        adapter: name of the adapter that the rotations belong to.
        activate: let it act at once, alone.

    Examples:
        >>> import oftfx, torch
        >>> from oftfx.passes import InsertRotations, MatchRules, PassManager, Program
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> passes = [MatchRules([oftfx.Rule("*", oftfx.OFT(3))]), InsertRotations("news")]
        >>> result = PassManager(passes).run(Program.of(model))
        >>> sorted(model.state_dict())
        ['0.bias', '0.oft.news.skew', '0.weight']
    """

    name = "insert_rotations"
    preserves = "exact"
    after = ("match_rules", "share_inputs")

    def __init__(self, adapter: str = "default", *, activate: bool = True) -> None:
        self.adapter, self.activate = adapter, activate

    def run(self, program: Program) -> PassResult:
        """Make the rotations and attach them, in the model of ``program`` itself.

        Raises:
            AdapterError: a site has this adapter already, or another one that acts in another place.
        """
        plan = program.planned
        modules = program.index.modules
        known = dict(rotated_sites(program.index))
        for entry in plan:
            self._check(entry, known.get(entry.fqn))
        owned: dict[str, Rotation] = {}
        changes = []
        for entry in plan:
            module = modules[entry.site.module]
            notice = format_named(entry.site.format).prepare(module) if entry.site.is_layer else None
            if entry.site.is_layer:
                use_kernel(module, entry.kernel, entry.spec.kernel)
            placement = known.get(entry.fqn) or attach(modules, entry.site, entry.placement, each=entry.each)
            rotation = owned.get(entry.owner)
            if rotation is None:
                rotation = rotation_for(entry, weight_device(module))
                rotation.train(module.training)
                placement.hold(self.adapter, rotation)
                owned[entry.owner] = rotation
            placement.rotations[self.adapter] = rotation
            placement.forget()
            if self.activate:
                placement.active = (self.adapter,)
            known[entry.fqn] = placement
            changes.append(Change(entry.fqn, "rotated", notice or ""))
        for entry in plan:
            _group(entry, known)
        return PassResult(program.with_(index=ModelIndex(program.model)), bool(changes), tuple(changes))

    def _check(self, entry: SitePlan, found: Placement | None) -> None:
        if found is None:
            return
        if self.adapter in found.rotations:
            raise AdapterError(f"{entry.fqn} already has a rotation of adapter {self.adapter!r}")
        if (found.format is None) != entry.site.is_layer:
            raise AdapterError(
                f"{entry.fqn}: one adapter rotates what this layer reads and another what it gives out, which cannot "
                "be in a model together. Fold the first one, or remove it"
            )
        if found.kind != entry.placement:
            raise AdapterError(
                f"{entry.fqn}: another adapter rotates its {found.kind}, this one its {entry.placement}, so they could "
                f"not act in the order named; use OFT(placement={found.kind!r})"
            )
        if entry.site.experts and found.each != entry.each:
            raise AdapterError(f"{entry.fqn}: another adapter has the other setting of OFT(experts=...); use the same")

    def check(self, result: Program) -> None:
        """Every planned site has the rotation."""
        known = dict(rotated_sites(result.index))
        for entry in result.planned:
            if entry.fqn not in known or self.adapter not in known[entry.fqn].rotations:
                raise PassError(f"{entry.fqn} has no rotation of adapter {self.adapter!r}")


def _group(entry: SitePlan, known: dict[str, Placement]) -> None:
    """Join a site with those that read the same tensor."""
    mine = known[entry.fqn]
    others = [p for n in entry.same_input if isinstance(p := known.get(n), RotateInput) and p.axis == -1]
    if not isinstance(mine, RotateInput) or mine.axis != -1 or not others or mine.group is not None:
        return
    group = next((p.group for p in others if p.group is not None), None)
    mine.join(group or InputGroup(entry.fqn, local=entry.local_input))


def skew_dtype(site: Site) -> torch.dtype:
    """Of the rotation of a site: float64 for float64 weights, else float32."""
    return torch.float64 if site.dtype == "float64" else torch.float32


def rotation_for(entry: SitePlan, device: torch.device) -> Rotation:
    """The rotation of one site, at the identity or as its spec begins."""
    site = entry.site
    return Rotation(
        site.in_features,
        entry.spec,
        where=entry.fqn,
        copies=entry.copies,
        tied=entry.tied_blocks,
        dtype=skew_dtype(site),
        device=device,
    )
