"""Which modules of a model become one node of its recorded program."""

from __future__ import annotations

from collections.abc import Collection

import torch.nn as nn

from oftfx.formats.registry import format_of
from oftfx.model.sites import is_experts
from oftfx.model.structure import is_own_module
from oftfx.placement.find import rotated_sites
from oftfx.rotation.module import Rotation


def leaf_modules(root: nn.Module, look_into: Collection[nn.Module] = ()) -> set[nn.Module]:
    """Layers, attention and experts, and whatever has none of these inside. Rotations are looked through.

    ``look_into`` names modules that are looked through all the same, as are those whose weight rotates inside.
    """
    rotated = {p.reader for _, p in rotated_sites(root) if p.kind == "weight" and p.in_effect()}
    kept = rotated.union(look_into)
    opaque = {m for m in root.modules() if _is_opaque(m)} - kept
    above = _holding(root, opaque | kept)
    leaves: set[nn.Module] = set()
    for module in root.modules():
        if isinstance(module, Rotation) or (is_own_module(module) and any(module.children())):
            continue
        if module in opaque or module not in above:
            leaves.add(module)
    leaves.discard(root)
    return leaves


def _is_opaque(module: nn.Module) -> bool:
    return format_of(module) is not None or isinstance(module, nn.MultiheadAttention) or is_experts(module)


def _holding(root: nn.Module, wanted: set[nn.Module]) -> set[nn.Module]:
    """Modules that are one of these or have one inside."""
    found, seen = set[nn.Module](), set[nn.Module]()

    def visit(module: nn.Module) -> bool:
        if module not in seen:
            seen.add(module)
            inside = [visit(child) for child in module.children()]  # all of them, so no `any` yet
            if module in wanted or any(inside):
                found.add(module)
        return module in found

    visit(root)
    return found
