"""What a trainable rotation turns by, in float64."""

from __future__ import annotations

import math

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.adapter.contents import check_in_place, rotation_by_site
from oftfx.adapter.store import AdapterStore
from oftfx.errors import AdapterError
from oftfx.placement.find import rotated_sites
from oftfx.rotation.logarithm import NEAREST_PI, logarithm, nearest_rotation
from oftfx.rotation.module import Rotation, whole


def rotations_of(root: nn.Module, store: AdapterStore, adapter: str) -> dict[str, Rotation]:
    """The rotations of one adapter by site, in the order of the model; sites that share one have the same object.

    Raises:
        AdapterError: an unknown name; its sites are inside other layers; or its sites compute with the codes of a fold,
            which no rotation tells.
    """
    store.require(adapter)
    check_in_place(root, store, adapter)
    found = dict(rotated_sites(root))
    for fqn, placement in found.items():
        if any(adapter in names and not aware.turns for names, aware in placement.through.items()):
            raise AdapterError(
                f"adapter {adapter!r} is fold-aware: {fqn} computes with codes and scales, not with its rotation. Let "
                "the rotations act again first: oftfx.fold_aware(model, None)"
            )
    rotations = rotation_by_site(root, store, adapter)
    return {fqn: rotations[fqn] for fqn in found if fqn in rotations}


@torch.no_grad()
def turn_of(rotation: Rotation, fqn: str, adapter: str) -> tuple[Tensor, float]:
    """The rotation that a module's blocks are nearest to, and how far they are from it.

    Blocks are what the forward computes, of every parameterization, but in float64.

    Args:
        rotation: the module.
        fqn: path of its site, for the message.
        adapter: its name, for the message.

    Returns:
        ``(blocks, b, b)`` float64, orthogonal; and the largest factor by which a block stretches a vector, less one.

    Raises:
        AdapterError: numbers that are not finite, or none.
    """
    if rotation.device.type == "meta":
        raise AdapterError(
            f"adapter {adapter!r}: {fqn}: the rotation is on the meta device and has no numbers; load it"
        )
    rows = rotation.formula(whole(rotation.skew).detach().double())
    if not bool(torch.isfinite(rows).all()):
        raise AdapterError(f"adapter {adapter!r}: {fqn}: the rotation holds numbers that are not finite")
    nearest, departures = nearest_rotation(rows)
    return rotation.spread(nearest), float(departures.max()) if len(departures) else 0.0


def check_departure(departure: float, bound: float, fqn: str, adapter: str) -> None:
    """Refuse blocks that are too far from a rotation to be taken for one.

    Raises:
        AdapterError: they are.
    """
    if departure > bound:
        raise AdapterError(
            f"adapter {adapter!r}: {fqn}: its blocks stretch a vector by up to {departure:.2%}, over bound={bound:g}: "
            "a truncated series is orthogonal near the identity only. What stretches is left out of a blend; give a "
            "larger bound if that is fine, or train with OFT(parameterization='cayley')"
        )


def log_of(turn: Tensor, fqn: str, adapter: str) -> Tensor:
    """The logarithm ``(blocks, b, b)`` of a rotation.

    Raises:
        AdapterError: an angle of pi, where there is none or are several.
    """
    log, largest = logarithm(turn)
    if bool((largest > math.pi - NEAREST_PI).any()):
        raise AdapterError(
            f"adapter {adapter!r}: {fqn}: block {int(largest.argmax())} turns by {float(largest.max()):.7f}, which is "
            "pi: half of that could be either way round. Such a rotation cannot be blended"
        )
    return log
