"""Which modules of a model become one node of its recorded program."""

from __future__ import annotations

from collections.abc import Collection

import torch.nn as nn

from oftfx.model.sites import is_experts
from oftfx.model.structure import is_own_module
from oftfx.placement.find import rotated_sites
from oftfx.rotation.module import Rotation


def leaf_modules(
    root: nn.Module, layers: Collection[nn.Module], look_into: Collection[nn.Module] = ()
) -> set[nn.Module]:
    """Layers, attention and experts, and whatever has none of these inside. Rotations are looked through.

    Args:
        root: the model.
        layers: its modules with a format.
        look_into: modules that are looked through all the same, as are those whose weight rotates inside.
    """
    rotated = {p.reader for _, p in rotated_sites(root) if p.kind == "weight" and p.in_effect()}
    kept = rotated.union(look_into)
    others = (m for m in root.modules() if isinstance(m, nn.MultiheadAttention) or is_experts(m))
    opaque = {*layers, *others} - kept
    above = _holding(root, opaque | kept)
    leaves: set[nn.Module] = set()
    for module in root.modules():
        if isinstance(module, Rotation) or (is_own_module(module) and any(module.children())):
            continue
        if module in opaque or module not in above:
            leaves.add(module)
    leaves.discard(root)
    return leaves


def _holding(root: nn.Module, wanted: set[nn.Module]) -> set[nn.Module]:
    """Modules that are one of these or have one inside."""
    found = set[nn.Module]()
    _add_holding(root, wanted, found, set())
    return found


def _add_holding(module: nn.Module, wanted: set[nn.Module], found: set[nn.Module], seen: set[nn.Module]) -> bool:
    # No closure: one that calls itself is a circle, which keeps the modules until Python looks for circles.
    if module not in seen:
        seen.add(module)
        inside = [_add_holding(child, wanted, found, seen) for child in module.children()]  # all, so no `any` yet
        if module in wanted or any(inside):
            found.add(module)
    return module in found
