"""Sites that read the same tensor: it is rotated for all of them in one product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from oftfx.placement.base import Placement
from oftfx.placement.handout import HandOut
from oftfx.rotation.autocast import without_autocast
from oftfx.rotation.caching import caching
from oftfx.rotation.frozen import FrozenRotation
from oftfx.rotation.module import Rotation, cayley_of
from oftfx.rotation.rotate import rotate_jointly


class InputGroup:
    """Sites of one parent module that read the same tensor.

    Where they share their rotations, the tensor is rotated once. Where each has one of its own, of equal block size,
    all results come from one batched product, and in training all Cayley transforms from one batch. Otherwise each
    site rotates for itself.

    Args:
        key: name of the group.
        local: whether the layer around the sites makes the tensor itself; see `HandOut`.
    """

    def __init__(self, key: str, *, local: bool = False) -> None:
        self.placements: dict[str, Placement] = {}
        self.handout = HandOut(key, local=local)
        self._cached: tuple[Any, Tensor] | None = None
        self._known: tuple[Any, dict[str, Any]] = (None, {})

    def add(self, placement: Placement) -> None:
        """Let a site be one of the group."""
        self.placements[placement.site] = placement
        self.forget()

    def rotate(self, placement: Placement, x: Tensor) -> Tensor:
        """What the rotations of one site make of ``x``; the others get theirs when they ask for the same ``x``."""
        if _is_decoding(x):
            return placement.alone(x)
        sites, rotations, joint = self._together(placement)
        if not sites or (joint and not _in_reach(rotations, x)):
            return placement.alone(x)

        def everything() -> dict[str, Tensor]:
            if joint:
                return dict(zip(sites, rotate_jointly(x, self._blocks(rotations, x.dtype)), strict=True))
            return dict.fromkeys(sites, placement.alone(x))

        return self.handout.take(
            x,
            lambda: tuple(r.stamp() for r in rotations),
            placement.site,
            everything,
            lambda: placement.alone(x),
        )

    def _together(self, placement: Placement) -> tuple[tuple[str, ...], list[Rotation | FrozenRotation], bool]:
        """The sites that get their results with this one, the rotations that make them, and whether each has its own.

        No sites: this one rotates for itself. Kept until others act at a site of the group; who changes the rotations
        behind a name says so by `Placement.forget`.
        """
        if torch.compiler.is_compiling():
            return self._find_together(placement)
        acting = tuple(
            (p.active, len(p.fixed), len(p.rotations), p.fold_in_effect() is None) for p in self.placements.values()
        )
        known = self._known  # read once: another thread may replace it
        if known[0] != acting:
            known = self._known = (acting, {})
        found = known[1].get(placement.site)
        if found is None:
            found = known[1][placement.site] = self._find_together(placement)
        return found

    def _find_together(self, placement: Placement) -> tuple[tuple[str, ...], list[Rotation | FrozenRotation], bool]:
        mine = placement.in_effect()
        chains = {site: p.in_effect() for site, p in self.placements.items() if p.fold_in_effect() is None}
        chains = {site: chain for site, chain in chains.items() if chain}  # the others never ask for their part
        if all(_same(c, mine) for c in chains.values()):
            return tuple(chains), mine, False
        joint = {s: c[0] for s, c in chains.items() if len(c) == 1 and len(mine) == 1 and _alike(c[0], mine[0])}
        return tuple(joint) if len(joint) > 1 else (), list(joint.values()), True

    def _blocks(self, rotations: list[Rotation | FrozenRotation], dtype: torch.dtype) -> Tensor:
        """Blocks of several rotations side by side, ``(blocks, b, count * b)``; kept in eval mode."""
        states = [r.state() for r in rotations]
        if None in states or not caching():
            return _side_by_side(rotations, dtype)
        key = (*states, dtype)
        cached = self._cached
        if cached is None or cached[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                cached = (key, _side_by_side(rotations, dtype).contiguous())
            if type(cached[1]) is Tensor:  # neither fake nor functional
                self._cached = cached
        return cached[1]

    def forget(self) -> None:
        """Drop what is kept."""
        self._cached = None
        self._known = (None, {})
        self.handout.forget()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": None, "_known": (None, {})}


_META = torch.device("meta")


def _same(a: list[Rotation | FrozenRotation], b: list[Rotation | FrozenRotation]) -> bool:
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


def _alike(a: Rotation | FrozenRotation, b: Rotation | FrozenRotation) -> bool:
    return type(a) is type(b) and a.shape == b.shape


def _is_decoding(x: Tensor) -> bool:
    """One token or a few: a product of its own is then cheaper than handing out (22 against 29 microseconds a site)."""
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling() and x.numel() <= 4 * x.shape[-1]


def _in_reach(rotations: list[Rotation | FrozenRotation], x: Tensor) -> bool:
    """Whether several rotations can be used together here: on one device.

    An exported file keeps each site's blocks under their own name; accelerate fills in what it has offloaded only
    around a module's own forward.
    """
    if torch.compiler.is_compiling():
        return torch.compiler.is_dynamo_compiling()
    devices = {r.device for r in rotations}
    return x.is_meta or (len(devices) == 1 and devices != {_META})


def _side_by_side(rotations: list[Rotation | FrozenRotation], dtype: torch.dtype) -> Tensor:
    with without_autocast(rotations[0].device):
        return torch.cat([b.to(dtype) for b in cayley_of(rotations)], dim=2)
