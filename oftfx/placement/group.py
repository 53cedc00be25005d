"""Sites that read the same tensor: it is rotated for all of them in one product."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from oftfx.placement.base import Placement
from oftfx.placement.handout import HandOut
from oftfx.rotation.autocast import without_autocast
from oftfx.rotation.caching import steps
from oftfx.rotation.frozen import FrozenRotation
from oftfx.rotation.kept import Kept
from oftfx.rotation.module import Rotation, cayley_of
from oftfx.rotation.operators import jointly_in_graph
from oftfx.rotation.rotate import rotate_jointly


class _Last(NamedTuple):
    """What a rotation has made of a tensor, and the versions of both; gone when the tensor is."""

    source: weakref.ref[Tensor]
    blocks: Tensor
    y: Tensor
    versions: tuple[int, int]

    def is_of(self, x: Tensor, blocks: Tensor | None) -> bool:
        """Whether it is what these blocks make of this tensor now."""
        now = x._version, self.y._version
        return self.versions == now and self.blocks is blocks and self.source() is x


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
        self._kept: Kept | None = None
        self._known: tuple[Any, dict[str, Any]] = (None, {})
        self._shared: dict[Rotation, bool] = {}
        self._last: _Last | None = None

    def add(self, placement: Placement) -> None:
        """Let a site be one of the group."""
        self.placements[placement.site] = placement
        self.forget()

    def rotate(self, placement: Placement, x: Tensor) -> Tensor:
        """What the rotations of one site make of ``x``; the others get theirs when they ask for the same ``x``."""
        if _is_decoding(x):
            return self._once(placement, x)
        sites, rotations, joint = self._together(placement)
        if not sites or (joint and not _in_reach(rotations, x)):
            return placement.alone(x)

        def everything() -> dict[str, Tensor]:
            if joint and all(r.is_in_graph(x) for r in rotations):
                texts = [r.recipe_text for r in rotations]
                return dict(zip(sites, jointly_in_graph(x, [r.tensor for r in rotations], texts), strict=True))
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

    def _once(self, placement: Placement, x: Tensor) -> Tensor:
        """The same for a token or a few, which the sites of one rotation get from the first of them.

        Without a gradient a result is a number like any other, and needs no key but the tensors that it was made of.
        """
        chain = placement.in_effect()
        rotation = chain[0] if len(chain) == 1 else None
        if not isinstance(rotation, Rotation) or not self._is_shared(rotation) or x.is_inference():
            return placement.alone(x)
        blocks, last = rotation.current(x.dtype), self._last  # read once: another thread may replace it
        if last is not None and last.is_of(x, blocks):
            return last.y
        y = placement.alone(x)
        if blocks is not None and not y.is_inference() and rotation.current(x.dtype) is blocks:
            self._last = _Last(weakref.ref(x, self._drop), blocks, y, (x._version, y._version))
        return y

    def _is_shared(self, rotation: Rotation) -> bool:
        found = self._shared.get(rotation)
        if found is None:
            sites = [p for p in self.placements.values() if any(r is rotation for r in p.rotations.values())]
            found = self._shared[rotation] = len(sites) > 1
        return found

    def _drop(self, x: weakref.ref[Tensor]) -> None:
        last = self._last
        if last is not None and last.source is x:
            self._last = None

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
        if None in states:
            return _side_by_side(rotations, dtype)
        kept = self._kept
        if kept is None or kept.dtype is not dtype or not _are_of(kept, rotations):
            first, *others = [r.source(r.tensor) for r in rotations]
            kept = self._kept = first.kept(tuple(others), tuple(r.recipe_text for r in rotations), dtype)
        return kept.read([r.tensor for r in rotations], (*states, steps()))

    def forget(self) -> None:
        """Drop what is kept."""
        self._kept = None
        self._known = (None, {})
        self._shared, self._last = {}, None
        self.handout.forget()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None, "_known": (None, {}), "_shared": {}, "_last": None}


def _are_of(kept: Kept, rotations: list[Rotation | FrozenRotation]) -> bool:
    return len(kept.sources) == len(rotations) and all(
        s.tensor() is r.tensor for s, r in zip(kept.sources, rotations, strict=True)
    )


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
